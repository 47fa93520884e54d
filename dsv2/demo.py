"""`dsv2 demo`: the whole life of a small DeepSeek-V2 on a laptop, as a list of stages.

Each stage reads what earlier ones left in the output directory, so that stages run one by one, resume after an
interruption, and are done once. The text comes from installed packages and the interpreter's own library.
"""

from __future__ import annotations

import json
import lzma
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dsv2.config import ModelConfig, schema
from dsv2.config.counts import kv_elements_per_token, with_heads_cached
from dsv2.config.run import DataConfig, PretrainConfig, TrainConfig
from dsv2.data import CORPORA, Document, TokenShards, corpus, read_documents, split_held_out, write_shards
from dsv2.files import write_json
from dsv2.text import Tokenizer

PROMPTS = {
    "english": "The people of the United States",
    "chinese": "第一条 为了",
    "code": "def __init__(self",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Sizes that fit two CPU cores and eight minutes; `quick` ones fit a test."""

    english_bytes: int = 6_000_000
    chinese_bytes: int = 2_500_000
    code_bytes: int = 2_500_000
    held_out_fraction: float = 0.04
    vocab_size: int = 4096
    sequence_length: int = 256
    batch_sequences: int = 8
    steps: int = 700
    lr_peak: float = 4e-3
    kernel_rooms: tuple[str, ...] = ()
    """Rooms of dsv2/kernels to check and time; none: all."""
    seed: int = 0

    @staticmethod
    def quick() -> DemoConfig:
        return DemoConfig(
            english_bytes=800_000,
            chinese_bytes=200_000,
            code_bytes=200_000,
            vocab_size=1024,
            sequence_length=128,
            steps=150,
            kernel_rooms=("rms_norm", "route"),
        )

    def recipe(self, out: Path, vocab_size: int) -> PretrainConfig:
        """The pretraining run as `dsv2 pretrain` would read it from a file."""
        model = ModelConfig.preset("demo").replace(vocab_size=vocab_size)
        data = DataConfig(
            train=str(out / "shards" / "train"),
            held_out=str(out / "shards" / "held_out"),
            tokenizer=str(out / "tokenizer"),
            sequence_length=self.sequence_length,
        )
        train = TrainConfig(
            steps=self.steps,
            batch_sequences=self.batch_sequences,
            lr_peak=self.lr_peak,
            warmup_steps=self.steps // 15,
            seed=self.seed,
            eval_every=max(self.steps // 5, 1),
            eval_tokens=10_000,
            checkpoint_every=max(self.steps // 5, 1),
        )
        return PretrainConfig(model=model, data=data, train=train)


@dataclass(frozen=True, slots=True)
class Stage:
    """`run(demo)` does the work and returns one line that says what came out."""

    name: str
    title: str
    run: Callable[[Demo], str]


class Demo:
    """The stages over one output directory."""

    def __init__(self, out: str | Path, cfg: DemoConfig | None = None, console: Console | None = None) -> None:
        """Raises ValueError where the directory was begun with other sizes."""
        self.out, self.cfg, self.console = Path(out), cfg or DemoConfig(), console or Console()
        self._state_file = self.out / "stages.json"
        self._done: dict[str, Any] = {}
        if self._state_file.is_file():
            state = _read_state(self._state_file)
            if schema.from_dict(DemoConfig, state["config"]) != self.cfg:
                raise ValueError(f"{self.out} holds a demo of other sizes; give another --out, or delete it")
            self._done = state["done"]

    def run(self, only: str | None = None, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Run the stages that are not done, or only the named one (again). Returns whether all are done."""
        if only is not None and only not in STAGE_NAMES:
            raise ValueError(f"no stage '{only}'; stages: {', '.join(STAGE_NAMES)}")
        self.should_stop = should_stop
        self.out.mkdir(parents=True, exist_ok=True)
        for i, stage in enumerate(STAGES, 1):
            if only is not None and stage.name != only:
                continue
            if only is None and stage.name in self._done:
                self.console.print(f"[{i}/{len(STAGES)}] {stage.title}: done before", markup=False, highlight=False)
                continue
            self.console.print(f"[{i}/{len(STAGES)}] {stage.title}", markup=False, highlight=False)
            began = time.monotonic()
            line = stage.run(self)
            if should_stop():
                return False
            seconds = time.monotonic() - began
            self._mark(stage.name, seconds)
            self.console.print(f"      {line}  ({seconds:.0f} s)", markup=False, highlight=False)
        return all(name in self._done for name in STAGE_NAMES)

    def _mark(self, name: str, seconds: float) -> None:
        self._done[name] = round(seconds, 1)
        write_json(self._state_file, {"config": asdict(self.cfg), "done": self._done})

    def documents(self, split: str) -> list[Document]:
        return list(read_documents(self.out / "text" / f"{split}.jsonl"))

    @property
    def checkpoint(self) -> Path:
        from dsv2.train.checkpoint import list_checkpoints

        found = list_checkpoints(self.out / "run" / "checkpoints")
        if not found:
            raise ValueError(f"{self.out} holds no trained model yet: run the stage 'pretrain' first")
        return found[-1]

    def read(self, name: str) -> Any:
        """What an earlier stage left in `name`. Raises ValueError where it has not run."""
        file = self.out / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: run the earlier stages first")
        return json.loads(file.read_text(encoding="utf-8"))


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        return {"config": dict(state["config"]), "done": dict(state["done"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); give another --out, or delete it") from error


def _text(demo: Demo) -> str:
    train: list[Document] = []
    held_out: list[Document] = []
    for name in CORPORA:
        kept, held = split_held_out(corpus(name, getattr(demo.cfg, f"{name}_bytes")), demo.cfg.held_out_fraction)
        train, held_out = train + kept, held_out + held
    (demo.out / "text").mkdir(exist_ok=True)
    for split, documents in (("train", train), ("held_out", held_out)):
        lines = [json.dumps(asdict(d), ensure_ascii=False) + "\n" for d in documents]
        (demo.out / "text" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    sizes = ", ".join(f"{n} {_megabytes(d for d in train if d.source == n):.1f} MB" for n in CORPORA)
    return f"{len(train)} documents to train on ({sizes}), {len(held_out)} held out"


def _megabytes(documents: Iterable[Document]) -> float:
    return sum(len(d.text.encode()) for d in documents) / 1e6


def _tokenizer(demo: Demo) -> str:
    documents = demo.documents("train")
    tokenizer = Tokenizer.train((d.text for d in documents), demo.cfg.vocab_size)
    tokenizer.save(demo.out / "tokenizer")
    return f"byte-level BPE with {tokenizer.vocab_size} ids"


def _shards(demo: Demo) -> str:
    tokenizer = Tokenizer.load(demo.out / "tokenizer")
    parts = []
    for split in ("train", "held_out"):
        out = demo.out / "shards" / split
        if not out.exists():
            write_shards(demo.documents(split), tokenizer, out)
        parts.append(f"{TokenShards.open(out).num_tokens:,} tokens {split.replace('_', ' ')}")
    return ", ".join(parts)


def _pretrain(demo: Demo) -> str:
    from dsv2.config.counts import active_parameters, parameters
    from dsv2.train.pretrain import Pretraining

    recipe = demo.cfg.recipe(demo.out, Tokenizer.load(demo.out / "tokenizer").vocab_size)
    run = Pretraining(recipe, demo.out / "run", demo.console)
    run.run(demo.should_stop)
    total, active = parameters(recipe.model), active_parameters(recipe.model)
    return f"MLA + DeepSeekMoE, {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active, step {run.step}"


def _evaluate(demo: Demo) -> str:
    from dsv2.train.evaluate import bits_per_byte
    from dsv2.weights import load

    train, held_out = demo.documents("train"), demo.documents("held_out")
    with ThreadPoolExecutor(1) as pool:  # lzma works outside the interpreter lock
        xz = pool.submit(xz_bits_per_byte, train, held_out)
        window = demo.cfg.sequence_length
        shards = TokenShards.open(demo.out / "shards" / "held_out")
        scores = bits_per_byte(load(demo.checkpoint), shards, window=window, stride=window // 2)
        result = {
            name: {"bytes": round(s.num_bytes), "model": s.bits_per_byte, "xz": xz.result()[name]}
            for name, s in scores.items()
        }
    write_json(demo.out / "evaluation.json", result)
    table = Table(title="held-out bits per byte", title_justify="left")
    for column in ("text", "bytes", "model", "xz -9"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for row in _score_rows(result):
        table.add_row(*row)
    demo.console.print(table)
    return "bits per byte of the model and of xz -9 on the same documents"


def _score_rows(scores: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [(name, f"{s['bytes']:,}", f"{s['model']:.3f}", f"{s['xz']:.3f}") for name, s in scores.items()]


def xz_bits_per_byte(train: Sequence[Document], held_out: Sequence[Document]) -> dict[str, float]:
    """What `xz -9` needs for the held-out text of each source when it has seen all of the training text.

    The growth of the compressed training text when the held-out text is appended, in bits, over the bytes appended.
    """
    seen = "".join(d.text for d in train).encode()
    base = len(lzma.compress(seen, preset=9))
    out = {}
    for source in dict.fromkeys(d.source for d in held_out):
        text = "".join(d.text for d in held_out if d.source == source).encode()
        out[source] = 8 * (len(lzma.compress(seen + text, preset=9)) - base) / len(text)
    return out


def _generate(demo: Demo) -> str:
    from dsv2.engine.generate import Sampling, generate
    from dsv2.weights import load

    model, tokenizer = load(demo.checkpoint), Tokenizer.load(demo.checkpoint)
    prompts = [tokenizer.encode(p, add_bos=True) for p in PROMPTS.values()]
    sampling = Sampling(temperature=0.7, top_p=0.95, seed=demo.cfg.seed)
    outputs = generate(model, prompts, max_new_tokens=120, sampling=sampling)
    samples = [
        {"title": name, "prompt": prompt, "completion": tokenizer.decode(ids)}
        for (name, prompt), ids in zip(PROMPTS.items(), outputs, strict=True)
    ]
    write_json(demo.out / "samples.json", {"samples": samples})
    for s in samples:
        demo.console.print(f"--- {s['title']}\n{s['prompt']}{s['completion']}", markup=False, highlight=False)
    return f"{sum(map(len, outputs))} tokens"


def _serve(demo: Demo) -> str:
    from openai import OpenAI

    from dsv2.serve.process import served

    with served(demo.checkpoint, log=demo.out / "serve.log") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        model = client.models.list().data[0].id
        answer = client.completions.create(
            model=model, prompt=PROMPTS["english"], max_tokens=60, temperature=0.7, top_p=0.95, seed=demo.cfg.seed
        )
    text, usage = answer.choices[0].text, answer.usage
    sample = {"title": "over HTTP", "prompt": PROMPTS["english"], "completion": text}
    write_json(demo.out / "served.json", {"samples": [sample]})
    demo.console.print(f"--- {url}\n{PROMPTS['english']}{text}", markup=False, highlight=False)
    return f"{usage.completion_tokens if usage else 0} tokens for the openai client"


def _kernels(demo: Demo) -> str:
    from dsv2.bench.kernels import run
    from dsv2.device import pick_device

    device = pick_device().type
    out = demo.out / "kernels.json"
    rows = run(demo.cfg.kernel_rooms, device=device, out=out, console=demo.console)["rows"]
    wrong = [
        row["benchmark"] for row in rows if row.get("parity") != "ok" and not row.get("parity", "").startswith("sk")
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(rows)} kernel checks failed: {', '.join(wrong[:5])}; see {out}")
    what = "kernels timed" if device == "cuda" else "inputs through the reference implementations (no GPU)"
    return f"{len(rows)} {what}, all within their error budgets"


def _report(demo: Demo) -> str:
    from dsv2.report import Section, run_sections, samples_section, write_report

    evaluation = demo.read("evaluation.json")
    scores = Section(
        "Against a compressor",
        "Bits per byte on held-out documents; xz -9 has read the same training text. Lower is better.",
        ("text", "held-out bytes", "model", "xz -9"),
        _score_rows(evaluation),
    )
    sections = [scores, *run_sections(demo.out / "run"), _cache_section(demo), _kernel_section(demo)]
    sections.append(samples_section(demo.read("samples.json")["samples"] + demo.read("served.json")["samples"]))
    path = demo.out / "report.html"
    write_report(path, "A small DeepSeek-V2, start to end", sections)
    return f"open {path}"


def _cache_section(demo: Demo) -> Any:
    from dsv2.report import Section, bar_plot

    cfg = ModelConfig.from_hf(demo.checkpoint)
    H = cfg.num_heads
    rivals = {"MHA": H, "GQA, 2 KV heads": 2, "MQA": 1}
    elements = {"MLA (this model)": kv_elements_per_token(cfg)}
    elements |= {name: kv_elements_per_token(with_heads_cached(cfg, n)) for name, n in rivals.items()}
    v2 = ModelConfig.preset("v2")
    v2_mla, v2_mha = kv_elements_per_token(v2), kv_elements_per_token(with_heads_cached(v2, v2.num_heads))
    note = (
        "Elements cached a token in all layers, for this model and for other attentions with as many layers, heads "
        f"and channels a head. At DeepSeek-V2's own size MLA keeps {v2_mla:,} where MHA would keep {v2_mha:,}."
    )
    return Section("Cache size", note, markup=bar_plot(list(elements), list(elements.values()), "elements a token"))


def _kernel_section(demo: Demo) -> Any:
    """One row a room: how many inputs, the largest error, the slowest."""
    from dsv2.report import Section

    results = demo.read("kernels.json")
    by_room: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        by_room.setdefault(row["room"], []).append(row)
    table = [
        (
            room,
            str(len(rows)),
            f"{max((e for row in rows for e in row['errors'].values() if e is not None), default=0):.0e}",
            f"{max(row['us'] for row in rows if 'us' in row):,.0f}",
        )
        for room, rows in by_room.items()
    ]
    note = (
        f"{results['card']}: {results['implementation']}. {results['note']} Errors against the reference in more bits."
    )
    return Section("Kernels", note, ("operation", "inputs", "largest error", "slowest, us"), table)


STAGES = (
    Stage("text", "Read English, Chinese and code", _text),
    Stage("tokenizer", "Train a tokenizer", _tokenizer),
    Stage("shards", "Write token shards", _shards),
    Stage("pretrain", "Pretrain a small DeepSeek-V2", _pretrain),
    Stage("evaluate", "Evaluate on held-out text", _evaluate),
    Stage("generate", "Generate", _generate),
    Stage("serve", "Serve the model, and ask it over HTTP", _serve),
    Stage("kernels", "Check and time the kernels", _kernels),
    Stage("report", "Write the report", _report),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)
