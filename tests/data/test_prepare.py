"""Claims about `prepare`: the same bytes whatever made them, nothing half-written, everything counted, faults named.

Sources are three small folders with planted duplicates and bad records. Processes are killed where a test says so.
This room does not test single filters, hashes or mixtures.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsv2.config import schema
from dsv2.config.data import PrepareConfig
from dsv2.data import FIM_TOKENS, Preparation, TokenShards, prepare
from dsv2.data.prepare import parse_task
from dsv2.text import Tokenizer

ROOT = Path(__file__).parents[2]
NUM_ENGLISH, NUM_CHINESE, NUM_CODE = 30, 12, 10


def english(seed: int) -> str:
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshr", k=rng.randint(3, 8))) for _ in range(72)]
    return "".join(" ".join(["the", *words[i : i + 9], "of"]) + ".\n" for i in range(0, 72, 9))


def chinese(seed: int) -> str:
    rng = random.Random(seed)
    return "".join("".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(30)) + "。\n" for _ in range(6))


def code(seed: int) -> str:
    names = ["".join(random.Random(100 * seed + i).choices("abcdefgh", k=8)) for i in range(12)]
    return "".join(
        f"def {name}({other}):\n    return {other}\n" for name, other in zip(names, names[::-1], strict=True)
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`web` of JSON lines with faults, `books` of text that repeats some of it, `code` of Python."""
    root = tmp_path_factory.mktemp("text")
    for folder in ("web", "books", "code"):
        (root / folder).mkdir()
    lines = [json.dumps({"text": english(i)}) for i in range(NUM_ENGLISH)]
    lines += [json.dumps({"text": chinese(i)}, ensure_ascii=False) for i in range(NUM_CHINESE)]
    lines += ["{", json.dumps({"text": "too short"}), json.dumps({"text": " "})]
    for i in range(5):
        (root / "web" / f"{i}.jsonl").write_text("\n".join(lines[i::5]) + "\n", encoding="utf-8")
    # Two that the web has, one of them with other blanks; one with a word of 88 changed; one of its own.
    repeated = [english(0), english(1).replace("\n", "\n\n"), english(2).replace(".\n", ". x\n", 1), english(999)]
    for i, book in enumerate(repeated):
        (root / "books" / f"{i}.txt").write_text(book, encoding="utf-8")
    for i in range(NUM_CODE):
        (root / "code" / f"{i}.py").write_text(code(i), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([english(5), code(5), chinese(5)], 600, FIM_TOKENS)


def recipe(text: Path, **changes: Any) -> PrepareConfig:
    """A part is some files of a folder."""
    sources = [{"name": name, "paths": [str(text / name)]} for name in ("web", "books", "code")]
    plain = {"tokenizer": "tokenizer", "sources": sources, "part_bytes": 8000, "held_out_fraction": 0.2}
    return schema.from_dict(PrepareConfig, plain | changes)


def files(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


class Made:
    """What `prepare` left, uninterrupted and alone."""

    def __init__(self, root: Path, text: Path, tokenizer: Tokenizer) -> None:
        self.preparation = Preparation(recipe(text), tokenizer, root / "parts")
        self.report = prepare(self.preparation, root / "out")
        self.root, self.out = root, root / "out"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, text: Path, tokenizer: Tokenizer) -> Made:
    return Made(tmp_path_factory.mktemp("made"), text, tokenizer)


def texts(folder: Path, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(tokens) for _, _, tokens in TokenShards.open(folder).documents()]


# What comes out


def test_every_document_has_its_outcome(made):
    found = Counter()
    for row in made.report["outcomes"]:
        found[row["source"], row["language"], row["outcome"]] += row["documents"]
    assert found == {
        ("web", "unknown", "malformed"): 1,
        ("web", "english", "empty"): 1,
        ("web", "english", "too_short"): 1,
        ("web", "english", "kept"): NUM_ENGLISH,
        ("web", "chinese", "kept"): NUM_CHINESE,
        ("books", "english", "exact_duplicate"): 2,
        ("books", "english", "near_duplicate"): 1,
        ("books", "english", "kept"): 1,
        ("code", "code", "kept"): NUM_CODE,
    }


def test_train_and_held_out_together_are_what_was_kept(made, tokenizer):
    train, held_out = (texts(made.out / name, tokenizer) for name in ("train", "held_out"))
    kept = [english(i) for i in (*range(NUM_ENGLISH), 999)]
    kept += [chinese(i) for i in range(NUM_CHINESE)] + [code(i) for i in range(NUM_CODE)]
    assert sorted(train + held_out) == sorted(kept)
    assert held_out


def test_shards_remember_the_tokenizer_and_pass_their_checksums(made, tokenizer):
    for name in ("train", "held_out"):
        shards = TokenShards.open(made.out / name)
        shards.check_tokenizer(tokenizer.fingerprint)
        shards.verify()


def test_report_on_disk_is_the_one_returned_and_names_the_malformed_line(made):
    report = json.loads((made.out / "report.json").read_text(encoding="utf-8"))
    assert report == made.report
    (malformed,) = report["examples"]["malformed"]
    assert "web/2.jsonl:9: not JSON" in malformed["id"]


def test_report_adds_up_to_the_shards(made):
    train = TokenShards.open(made.out / "train").manifest
    assert made.report["train"] == {"documents": train.num_documents, "tokens": train.num_tokens}
    assert sum(share["tokens"] for share in made.report["mixture"]) == train.num_tokens
    kept = sum(row["documents"] for row in made.report["outcomes"] if row["outcome"] == "kept")
    assert sum(row["documents"] for row in made.report["document_tokens"]) == kept


# The same bytes


def test_the_number_of_processes_changes_no_byte(made, text, tokenizer, tmp_path):
    preparation = Preparation(recipe(text), tokenizer, tmp_path / "parts")
    prepare(preparation, tmp_path / "out", workers=3)
    assert len(preparation.parts) > 3
    assert files(tmp_path / "out") == files(made.out)


def test_shares_of_several_machines_make_the_same_parts(made, text, tokenizer, tmp_path):
    for rank in (2, 0, 1):
        Preparation(recipe(text), tokenizer, tmp_path / "parts").run_share(rank, 3)
    assert files(tmp_path / "parts") == files(made.root / "parts")


def test_datatroves_executor_runs_the_shares(made, text, tokenizer, tmp_path):
    executor = pytest.importorskip("datatrove.executor", reason="needs datatrove (pip install 'dsv2[data]')")

    def step(_data: object, rank: int, world_size: int) -> None:
        Preparation(recipe(text), tokenizer, tmp_path / "parts").run_share(rank, world_size)

    executor.LocalPipelineExecutor([step], tasks=3, workers=1, logging_dir=str(tmp_path / "logs")).run()
    assert files(tmp_path / "parts") == files(made.root / "parts")


def test_growing_a_source_moves_no_document_between_train_and_held_out(made, text, tokenizer, tmp_path):
    (tmp_path / "more.txt").write_text(english(1000), encoding="utf-8")
    plain = recipe(text)
    grown = schema.from_dict(
        PrepareConfig,
        plain.to_dict() | {"sources": [{"name": "more", "paths": [str(tmp_path / "more.txt")]}, *plain.sources]},
    )
    prepare(Preparation(grown, tokenizer, made.root / "parts"), tmp_path / "out")
    for name in ("train", "held_out"):
        before, after = (set(texts(out / name, tokenizer)) for out in (made.out, tmp_path / "out"))
        assert before <= after


# Restarting

_KILLED = """
import os, signal, sys
from pathlib import Path
from dsv2.config import schema
from dsv2.config.data import PrepareConfig
from dsv2.data import Preparation, parts, prepare, shards
from dsv2.text import Tokenizer
import json

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

config = schema.from_dict(PrepareConfig, json.loads(sys.argv[1]))
preparation = Preparation(config, Tokenizer.load(sys.argv[2]), sys.argv[3])
moment = sys.argv[5]
if moment == "part":
    count = iter(range(9))
    real = parts.write_json
    parts.write_json = lambda *a: die() if next(count) == 1 else real(*a)
else:
    real = shards.ShardWriter.finish
    preparation.run_share()
    shards.ShardWriter.finish = die
prepare(preparation, sys.argv[4])
"""


@pytest.mark.parametrize("moment", ["part", "shards"])
def test_a_killed_run_leaves_nothing_half_written_and_goes_on(made, text, tokenizer, tmp_path, moment):
    tokenizer.save(tmp_path / "tokenizer")
    config = json.dumps(recipe(text).to_dict())
    arguments = [config, str(tmp_path / "tokenizer"), str(tmp_path / "parts"), str(tmp_path / "out"), moment]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", _KILLED, *arguments], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    left_over = [path for path in (*tmp_path.iterdir(), *(tmp_path / "parts").iterdir()) if path.suffix == ".tmp"]
    assert len(left_over) == 1

    preparation = Preparation(recipe(text), tokenizer, tmp_path / "parts")
    done = [folder for folder in preparation.folders if folder.exists()]
    assert len(done) == (1 if moment == "part" else len(preparation.parts))
    before = [folder.stat().st_ino for folder in done]
    prepare(preparation, tmp_path / "out")
    assert [folder.stat().st_ino for folder in done] == before
    assert files(tmp_path / "out") == files(made.out)
    assert not left_over[0].exists()


def test_another_mixture_reuses_the_parts(made, text, tokenizer, tmp_path):
    weights = {"english": 1.0, "chinese": 1.12, "code": 1.0}
    mixture = {"by": "language", "weights": weights, "tokens": 15_000}
    preparation = Preparation(recipe(text, mixture=mixture), tokenizer, made.root / "parts")
    assert preparation.missing() == []
    report = prepare(preparation, tmp_path / "out")
    found = Counter()
    for share in report["mixture"]:
        found[share["language"]] += share["tokens"]
    longest = int(np.diff(TokenShards.open(tmp_path / "out" / "train").document_starts).max())
    for language, weight in weights.items():
        assert 0 <= 15_000 * weight / 3.12 - found[language] < longest + 1


@pytest.mark.parametrize("change", ["text", "filters", "tokenizer"])
def test_what_decides_a_part_makes_it_anew(made, text, tokenizer, tmp_path, change):
    config, other = recipe(text), tokenizer
    if change == "filters":
        config = recipe(text, filters={"min_words": 51})
    elif change == "tokenizer":
        other = Tokenizer.train([english(5), "another"], 600, FIM_TOKENS)
    else:
        (tmp_path / "web").mkdir()
        (tmp_path / "web" / "0.jsonl").write_text('{"text": ""}', encoding="utf-8")
        sources = [{"name": "web", "paths": [str(tmp_path / "web")]}]
        config = recipe(text, sources=sources)
    preparation = Preparation(config, other, made.root / "parts")
    assert len(preparation.missing()) == len(preparation.parts)


# Other sources and settings


class _Rows:
    """What `prepare` asks of a streamed dataset: 3 rows a shard."""

    num_shards = 2

    def shard(self, num_shards: int, index: int) -> list[dict[str, str]]:
        assert num_shards == self.num_shards
        return [{"body": english(10 * index + i)} for i in range(3)]


def test_a_dataset_is_read_shard_by_shard(text, tokenizer, tmp_path, monkeypatch):
    asked = []
    fake = SimpleNamespace(load_dataset=lambda *args, **options: asked.append((args, options)) or _Rows())
    monkeypatch.setitem(sys.modules, "datasets", fake)
    sources = [{"name": "hub", "dataset": "owner/name", "dataset_config": "en", "text_field": "body"}]
    preparation = Preparation(recipe(text, sources=sources, held_out_fraction=0.0), tokenizer, tmp_path / "parts")
    assert len(preparation.parts) == 2
    prepare(preparation, tmp_path / "out")
    assert texts(tmp_path / "out" / "train", tokenizer) == [english(i) for i in (0, 1, 2, 10, 11, 12)]
    assert {str(call) for call in asked} == {str((("owner/name", "en"), {"split": "train", "streaming": True}))}


@pytest.mark.slow
def test_a_folder_of_rows_is_a_dataset_to_the_library_too(text, tokenizer, tmp_path):
    (tmp_path / "rows").mkdir()
    for i in range(2):
        (tmp_path / "rows" / f"{i}.jsonl").write_text(json.dumps({"body": english(i)}), encoding="utf-8")
    sources = [{"name": "hub", "dataset": str(tmp_path / "rows"), "text_field": "body"}]
    preparation = Preparation(recipe(text, sources=sources, held_out_fraction=0.0), tokenizer, tmp_path / "parts")
    prepare(preparation, tmp_path / "out")
    assert texts(tmp_path / "out" / "train", tokenizer) == [english(0), english(1)]


def test_rate_of_a_source_rearranges_its_documents_alone(text, tokenizer, tmp_path):
    sources = [
        {"name": "web", "paths": [str(text / "web")]},
        {"name": "code", "paths": [str(text / "code")], "fim_rate": 1.0},
    ]
    preparation = Preparation(recipe(text, sources=sources), tokenizer, tmp_path / "parts")
    prepare(preparation, tmp_path / "out")
    begin = tokenizer.control_tokens[FIM_TOKENS[0]]
    for source, _, tokens in TokenShards.open(tmp_path / "out" / "train").documents():
        assert (begin in tokens.tolist()) == (source == "code")


@pytest.mark.parametrize(("method", "num_kept"), [("none", 4), ("exact", 2), ("minhash", 1)])
def test_method_decides_which_duplicates_go(text, tokenizer, tmp_path, method, num_kept):
    config = recipe(text, dedup={"method": method}, held_out_fraction=0.0)
    report = prepare(Preparation(config, tokenizer, tmp_path / "parts"), tmp_path / "out")
    books = [row for row in report["outcomes"] if row["source"] == "books" and row["outcome"] == "kept"]
    assert [row["documents"] for row in books] == [num_kept]


def test_filters_can_be_turned_off(text, tokenizer, tmp_path):
    config = recipe(text, filters={"enabled": False})
    report = prepare(Preparation(config, tokenizer, tmp_path / "parts"), tmp_path / "out")
    assert {row["outcome"] for row in report["outcomes"]} == {"malformed", "exact_duplicate", "near_duplicate", "kept"}


# Refusals


def _with_line(tmp_path: Path, line: str) -> dict[str, Any]:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.jsonl").write_text(f"{json.dumps({'text': english(0)})}\n{line}\n", encoding="utf-8")
    return {"sources": [{"name": "bad", "paths": [str(tmp_path / "bad")]}]}


@pytest.mark.parametrize("workers", [1, 2])
def test_missing_field_stops_the_run_with_field_file_and_line(text, tokenizer, tmp_path, workers):
    sources = [*_with_line(tmp_path, '{"txt": "a"}')["sources"], {"name": "code", "paths": [str(text / "code")]}]
    preparation = Preparation(recipe(text, sources=sources), tokenizer, tmp_path / "parts")
    with pytest.raises(ValueError, match=r"bad/0\.jsonl:2: expected an object with a string 'text'"):
        prepare(preparation, tmp_path / "out", workers=workers)
    assert not (tmp_path / "out").exists()


def test_malformed_line_stops_the_run_where_the_recipe_says_so(text, tokenizer, tmp_path):
    config = recipe(text, filters={"malformed": "error"}, **_with_line(tmp_path, "{"))
    with pytest.raises(ValueError, match=r"bad/0\.jsonl:2: not JSON"):
        prepare(Preparation(config, tokenizer, tmp_path / "parts"), tmp_path / "out")


def test_a_killed_process_is_an_error_and_not_a_wait(text, tokenizer, tmp_path):
    # Nobody writes into the pipe: the process that reads it cannot end before it is killed.
    os.mkfifo(tmp_path / "pipe.txt")
    sources = [
        {"name": name, "paths": [str(path)]} for name, path in (("p", tmp_path / "pipe.txt"), ("c", text / "code"))
    ]
    preparation = Preparation(recipe(text, sources=sources), tokenizer, tmp_path / "parts")

    def kill(*_: object) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(OSError, match="a process was killed.*run the same command"):
        prepare(preparation, tmp_path / "out", workers=2, progress=kill)


def test_occupied_target_is_refused_before_any_work(text, tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("precious")
    with pytest.raises(ValueError, match="out exists already"):
        prepare(Preparation(recipe(text), tokenizer, tmp_path / "parts"), tmp_path / "out")
    assert not (tmp_path / "parts").exists()


def test_nothing_left_is_refused_and_nothing_written(text, tokenizer, tmp_path):
    config = recipe(text, filters={"min_words": 5000}, sources=[{"name": "web", "paths": [str(text / "web")]}])
    with pytest.raises(ValueError, match="no document is left to train on"):
        prepare(Preparation(config, tokenizer, tmp_path / "parts"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["rows.bin", "tokens/shard-00000.bin"])
def test_truncated_part_is_refused_by_name(text, tokenizer, tmp_path, name):
    preparation = Preparation(recipe(text), tokenizer, tmp_path / "parts")
    preparation.run_share()
    path = preparation.folders[0] / name
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(ValueError, match=str(path)):
        prepare(preparation, tmp_path / "out")


def test_rate_with_a_tokenizer_without_the_tokens_is_refused_at_once(text, tmp_path):
    sources = [{"name": "code", "paths": [str(text / "code")], "fim_rate": 0.5}]
    with pytest.raises(ValueError, match=r"fim_rate=0\.5 needs a tokenizer with"):
        Preparation(recipe(text, sources=sources), Tokenizer.train([code(0)], 300), tmp_path / "parts")


@pytest.mark.parametrize("task", ["3/3", "1", "a/3", "-1/3", "0/0", "1/3/5"])
def test_task_that_is_no_share_is_refused(task):
    with pytest.raises(ValueError, match="expected I/N"):
        parse_task(task)


def test_task_is_a_rank_of_a_world():
    assert parse_task("2/3") == (2, 3)
