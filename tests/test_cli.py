"""The `dsv2` command as a person types it: output, exit status, one line for every mistake."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import dsv2
from dsv2 import cli
from dsv2.adapters import merge_adapter
from dsv2.config.run import to_toml
from dsv2.data import TokenShards
from dsv2.text import encode_chat
from dsv2.train.step import StepStats, train_step
from tests.adapted import same, state, write_adapter
from tests.numerics import random_model
from tests.train.tiny import documents, recipe, write_corpus


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`dsv2 ...` in this process, which spares each test two seconds of imports."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["dsv2", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    status = exit_.value.code
    assert status is None or isinstance(status, int)
    return subprocess.CompletedProcess(arguments, status or 0, out.getvalue(), err.getvalue())


def run_as_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "dsv2", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_corpus(folder)
    (folder / "recipe.toml").write_text(to_toml(recipe(folder, steps=2).to_dict()), encoding="utf-8")
    model = random_model(recipe(folder).model)
    dsv2.save(model, folder / "model", dsv2.Tokenizer.load(folder / "tokenizer"))
    return folder


@pytest.mark.parametrize(
    ("preset", "parameters", "kv"), [("v2", 235_741_434_880, 34_560), ("v2-lite", 15_706_484_224, 15_552)]
)
def test_describe_gives_the_published_sizes_as_json(preset, parameters, kv):
    out = json.loads(run("describe", preset, "--json", "--modules").stdout)
    assert (out["parameters"], out["kv_elements_per_token"], out["kv_bytes_per_token"]) == (parameters, kv, 2 * kv)
    assert sum(row["parameters"] for row in out["modules"]) == parameters
    assert out["flops_per_token"] > 6 * out["active_parameters_without_embedding"]


def test_describe_reads_a_checkpoint(corpus):
    out = json.loads(run("describe", str(corpus / "model"), "--json").stdout)
    assert out["parameters"] == sum(p.numel() for p in dsv2.load(corpus / "model").parameters())


def test_describe_prints_a_table_for_people():
    text = run("describe", "v2", "--modules").stdout
    assert "235,741,434,880" in text
    assert "kv_a_proj_with_mqa.weight" in text


def test_demo_lists_its_stages():
    assert [line.split()[0] for line in run("demo", "--list").stdout.splitlines()] == [
        *("text", "tokenizer", "shards", "pretrain", "evaluate", "generate", "serve", "kernels", "report")
    ]


def test_a_recipe_trains_and_the_result_generates(corpus, tmp_path):
    trained = run("pretrain", str(corpus / "recipe.toml"), "--out", str(tmp_path / "run"), "--set", "train.seed=3")
    assert trained.returncode == 0, trained.stderr
    assert "seed = 3" in (tmp_path / "run" / "config.toml").read_text()
    assert (tmp_path / "run" / "report.html").is_file()
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step-00000002")
    said = run("generate", checkpoint, "--prompt", "hello", "--max-tokens", "4")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("hello")


def test_convert_rewrites_dtype_and_keeps_the_tokenizer(corpus, tmp_path):
    done = run("convert", str(corpus / "model"), str(tmp_path / "half"), "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert str(dsv2.load(tmp_path / "half").dtype) == "torch.bfloat16"
    assert dsv2.Tokenizer.load(tmp_path / "half").fingerprint == dsv2.Tokenizer.load(corpus / "tokenizer").fingerprint


MISTAKES = {
    "unknown preset": (["describe", "v2-light"], "did you mean 'v2-lite'"),
    "no such checkpoint": (["describe", "no/such"], "no checkpoint at no/such"),
    "missing recipe": (["pretrain", "nowhere.toml", "--out", "{tmp}/r"], "no recipe at nowhere.toml"),
    "misspelt key": (["pretrain", "{c}/recipe.toml", "--out", "{tmp}/r", "--set", "train.lr_peek=1"], "'lr_peak'"),
    "missing data": (["pretrain", "{c}/recipe.toml", "--out", "{tmp}/r", "--set", "data.train={tmp}/no"], "{tmp}/no"),
    "override without value": (
        ["pretrain", "{c}/recipe.toml", "--out", "{tmp}/r", "--set", "x"],
        "section.key=value",
    ),
    "empty prompt": (["generate", "{c}/model", "--prompt", ""], "--prompt is empty"),
    "bad temperature": (["generate", "{c}/model", "--prompt", "a", "--temperature", "nan"], "temperature=nan"),
    "unknown dtype": (["generate", "{c}/model", "--prompt", "a", "--dtype", "int3"], "dtype 'int3'"),
    "unknown device": (["generate", "{c}/model", "--prompt", "a", "--device", "toaster"], "device 'toaster'"),
    "missing text": (["data", "tokenizer", "{tmp}/none", "--out", "{tmp}/t"], "{tmp}/none"),
    "report of nothing": (["report", "{tmp}"], "holds no training metrics"),
    "no such adapter": (["convert", "{c}/model", "{tmp}/m", "--adapter", "{c}"], "no adapter_config.json at {c}"),
    "convert onto something else": (["convert", "{c}/model", "{c}"], "may not be replaced"),
    "held out into the training text": (
        [
            "data",
            "shards",
            "{c}/recipe.toml",
            "--tokenizer",
            "{c}/tokenizer",
            "--out",
            "{tmp}/r",
            "--held-out",
            "{tmp}/r",
        ],
        "must be another directory than --out",
    ),
    "missing data recipe": (["data", "prepare", "nowhere.toml", "--out", "{tmp}/r"], "no recipe at nowhere.toml"),
    "unknown stage": (["demo", "--out", "{tmp}/d", "--stage", "train"], "no stage 'train'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(corpus, tmp_path, name):
    arguments, message = MISTAKES[name]
    fill = {"c": str(corpus), "tmp": str(tmp_path)}
    result = run(*(a.format(**fill) for a in arguments))
    assert result.returncode == 2
    assert message.format(**fill) in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "r").exists()


# From text to a conversation --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files, and one file of JSON lines."""
    folder = tmp_path_factory.mktemp("text")
    for i, document in enumerate(documents(5, 30)):
        (folder / f"{i}.txt").write_text(document.text, encoding="utf-8")
    (folder / "more.jsonl").write_text('{"text": "once more"}\n', encoding="utf-8")
    return folder


def test_text_becomes_a_tokenizer_and_two_disjoint_sets_of_shards(text, tmp_path):
    made = run("data", "tokenizer", str(text), "--vocab-size", "300", "--out", str(tmp_path / "tokenizer"))
    assert made.stdout == f"300 ids in {tmp_path / 'tokenizer'}\n"
    tokenizer = dsv2.Tokenizer.load(tmp_path / "tokenizer")
    train, held_out = tmp_path / "train", tmp_path / "held_out"
    wrote = run(
        *("data", "shards", str(text), "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(train)),
        *("--held-out", str(held_out), "--held-out-fraction", "0.2"),
    )
    shards = [TokenShards.open(folder) for folder in (train, held_out)]
    texts = [{tokenizer.decode(tokens) for _, _, tokens in s.documents()} for s in shards]
    assert texts[0].isdisjoint(texts[1])
    assert texts[0] | texts[1] == {d.text for d in documents(5, 30)} | {"once more"}
    assert len(texts[1]) >= 1
    for folder, s in zip((train, held_out), shards, strict=True):
        assert f"{folder}: {s.manifest.num_documents} documents, {s.num_tokens:,} tokens" in wrote.stdout
        s.check_tokenizer(tokenizer.fingerprint)


def test_without_held_out_all_documents_are_for_training(corpus, text, tmp_path):
    run("data", "shards", str(text), "--tokenizer", str(corpus / "tokenizer"), "--out", str(tmp_path / "train"))
    assert TokenShards.open(tmp_path / "train").manifest.num_documents == 31


def test_shards_are_not_begun_where_the_held_out_ones_cannot_go(corpus, text, tmp_path):
    (tmp_path / "held_out").mkdir()
    (tmp_path / "held_out" / "letter.txt").write_text("precious")
    result = run(
        *("data", "shards", str(text), "--tokenizer", str(corpus / "tokenizer"), "--out", str(tmp_path / "train")),
        *("--held-out", str(tmp_path / "held_out")),
    )
    assert result.returncode == 2
    assert "held_out exists already" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["held_out"]


def test_a_recipe_becomes_shards_and_a_report_of_what_was_dropped(corpus, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "good.py").write_text("def one():\n    return first + second\n", encoding="utf-8")
    (tmp_path / "code" / "bad.py").write_text("x = " + "y + " * 40 + "z\n", encoding="utf-8")
    (tmp_path / "data.toml").write_text(
        f'tokenizer = "{corpus / "tokenizer"}"\n[[sources]]\nname = "code"\npaths = ["{tmp_path / "code"}"]\n'
    )
    arguments = ["data", "prepare", str(tmp_path / "data.toml"), "--out", str(tmp_path / "out")]
    shared = run(*arguments, "--task", "0/1")
    assert shared.stdout == f"share 0/1 is in {tmp_path / 'out.parts'}\n"
    assert not (tmp_path / "out").exists()
    made = run(*arguments)
    train = TokenShards.open(tmp_path / "out" / "train")
    assert f"1 documents, {train.num_tokens:,} tokens to train on" in made.stdout
    run("report", str(tmp_path / "out"), "--out", str(tmp_path / "again.html"))
    for page in (tmp_path / "out" / "report.html", tmp_path / "again.html"):
        assert "<td>long_lines</td>" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1.0", "--top-k", "50", "--top-p", "0.9", "--seed", "3"]])
def test_generate_says_what_the_library_says(corpus, sampling):
    said = run("generate", str(corpus / "model"), "--prompt", "ten", "--max-tokens", "5", "--device", "cpu", *sampling)
    model, tokenizer = dsv2.load(corpus / "model"), dsv2.Tokenizer.load(corpus / "model")
    chosen = dsv2.Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=3) if sampling else None
    prompt = tokenizer.encode("ten", add_bos=True)
    (ids,) = dsv2.generate(model, [prompt], max_new_tokens=5, sampling=chosen)
    assert said.stdout == "ten" + tokenizer.decode(ids) + "\n"


def test_generate_and_convert_take_an_adapter(corpus, tmp_path):
    merged = dsv2.load(corpus / "model")
    adapter = str(write_adapter(tmp_path / "adapter", merged))
    merge_adapter(adapter, merged)
    options = ["--prompt", "ten", "--max-tokens", "5", "--device", "cpu"]
    said = run("generate", str(corpus / "model"), "--adapter", adapter, *options)
    assert run("convert", str(corpus / "model"), str(tmp_path / "merged"), "--adapter", adapter).returncode == 0
    assert same(state(dsv2.load(tmp_path / "merged")), state(merged))
    assert said.stdout == run("generate", str(tmp_path / "merged"), *options).stdout
    assert said.stdout != run("generate", str(corpus / "model"), *options).stdout


def test_chat_answers_a_templated_prompt_without_repeating_it(corpus):
    said = run("generate", str(corpus / "model"), "--chat", "--prompt", "ten", "--max-tokens", "5", "--device", "cpu")
    model, tokenizer = dsv2.load(corpus / "model"), dsv2.Tokenizer.load(corpus / "model")
    ids = encode_chat(tokenizer, [{"role": "user", "content": "ten"}])
    assert said.stdout == tokenizer.decode(dsv2.generate(model, [ids], max_new_tokens=5)[0]) + "\n"


def test_report_writes_the_page_of_a_run_where_it_is_told(tmp_path):
    record = {"step": 1, "tokens": 8, "loss": 2.0, "lr": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    for arguments, page in (([], "report.html"), (["--out", str(tmp_path / "other.html")], "other.html")):
        assert run("report", str(tmp_path), *arguments).stdout == f"wrote {tmp_path / page}\n"
        assert "<svg" in (tmp_path / page).read_text()


def test_describe_prefers_a_preset_to_a_folder_of_that_name(tmp_path, monkeypatch):
    # The demo leaves a folder called as the preset it trains.
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert json.loads(run("describe", "demo", "--json").stdout)["model_type"] == "deepseek_v2"
    assert "no config.json" in run("describe", "./demo").stderr


# Ends -------------------------------------------------------------------------------------------------------------


def test_a_mistake_in_a_process_of_its_own_shows_no_traceback(tmp_path):
    result = run_as_process("pretrain", str(tmp_path / "none.toml"), "--out", str(tmp_path / "run"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: no recipe at {tmp_path / 'none.toml'}\n"


def test_an_error_of_several_lines_is_told_in_one(tmp_path):
    result = run("report", str(tmp_path / "two\nlines"))
    assert result.stderr == f"error: {tmp_path / 'two lines'} holds no training metrics\n"


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(corpus, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dsv2.weights.save_file", full)
    result = run("convert", str(corpus / "model"), str(tmp_path / "out"))
    assert (result.returncode, result.stderr) == (2, "error: [Errno 28] No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_command_ends_with_130(corpus, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsv2.weights.load", interrupted)
    assert run("generate", str(corpus / "model"), "--prompt", "ten").returncode == 130


def signalled(monkeypatch: pytest.MonkeyPatch, number: int, times: int = 1) -> None:
    """Every training step begins with a signal to the process."""

    def step(*arguments: Any) -> StepStats:
        for _ in range(times):
            os.kill(os.getpid(), number)
        return train_step(*arguments)

    monkeypatch.setattr("dsv2.train.pretrain.train_step", step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_pretraining_between_two_steps(corpus, tmp_path, monkeypatch, number):
    signalled(monkeypatch, number)
    result = run("pretrain", str(corpus / "recipe.toml"), "--out", str(tmp_path / "run"), "--set", "train.log_every=1")
    assert result.returncode == 130
    assert "stopping after this step" in result.stdout
    assert "stopped at step 1; the same command continues" in result.stdout
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_signal_before_anything_was_logged_still_ends_well(corpus, tmp_path, monkeypatch):
    arguments = ["pretrain", str(corpus / "recipe.toml"), "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM)
        stopped = run(*arguments)
    assert (stopped.returncode, stopped.stderr) == (130, "")
    resumed = run(*arguments)
    assert resumed.returncode == 0
    assert "at step 1" in resumed.stdout


def test_a_second_signal_ends_at_once(corpus, tmp_path, monkeypatch):
    signalled(monkeypatch, signal.SIGTERM, times=2)
    assert run("pretrain", str(corpus / "recipe.toml"), "--out", str(tmp_path / "run")).returncode == 130
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
