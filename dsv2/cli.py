"""The `dsv2` command: parse, call one function, turn a ValueError into one line. No logic of its own."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from dsv2 import __version__
from dsv2.bench.cli import app as bench_app
from dsv2.config.serve import ServeConfig

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__
)
data_app = typer.Typer(no_args_is_help=True, help="Text into tokenizers and token shards.")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

console = Console(soft_wrap=True)

# What several commands take.
Checkpoint = Annotated[str, typer.Argument(help="A checkpoint directory or hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the file's.")]
Adapter = Annotated[str | None, typer.Option(help="LoRA weights in PEFT's layout: a directory or hub id.")]

_SERVE = ServeConfig()


def main() -> None:
    """Entry point. Exit status 2 for what the user can mend, 130 when interrupted."""
    try:
        app()
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(f"error: {message}", markup=False, highlight=False)
        sys.exit(2)


def stop_on_signal() -> Callable[[], bool]:
    """After Ctrl-C (or SIGTERM) the returned function says so; a second one ends the process at once."""
    stopped: list[int] = []

    def handle(number: int, _frame: object) -> None:
        if stopped:
            sys.exit(130)
        stopped.append(number)
        console.print("stopping after this step (again to stop at once)", highlight=False)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return lambda: bool(stopped)


@app.command()
def describe(
    model: Annotated[str, typer.Argument(help="A preset, a checkpoint directory, or a config.json.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    modules: Annotated[bool, typer.Option("--modules", help="List every parameter's shape too.")] = False,
    context: Annotated[int, typer.Option(min=1, help="Sequence length for attention FLOPs.")] = 4096,
) -> None:
    """Parameters, active parameters, KV cache and FLOPs a token of an architecture."""
    from dsv2 import describe as room
    from dsv2.config.counts import describe as figures

    cfg = room.find_config(model)
    if as_json:
        out = figures(cfg, context) | ({"modules": room.module_shapes(cfg)} if modules else {})
        typer.echo(json.dumps(out, indent=2))
        return
    room.print_description(console, model, cfg, context)
    if modules:
        room.print_modules(console, cfg)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    stage: Annotated[str | None, typer.Option(help="Run only this stage, again if it ran before.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less text and fewer steps: under a minute.")] = False,
    list_stages: Annotated[bool, typer.Option("--list", help="Show the stages and stop.")] = False,
) -> None:
    """The whole life of a small model on a laptop: tokenizer, pretraining, evaluation, generation, report."""
    from dsv2.demo import STAGES, Demo, DemoConfig

    if list_stages:
        for s in STAGES:
            typer.echo(f"{s.name:12}{s.title}")
        return
    should_stop = stop_on_signal()
    run = Demo(out, DemoConfig.quick() if quick else DemoConfig(), console)
    run.run(only=stage, should_stop=should_stop)
    if should_stop():
        console.print(f"stopped; the same command continues in {out}", highlight=False)
        raise typer.Exit(130)


@data_app.command("tokenizer")
def data_tokenizer(
    inputs: Annotated[list[Path], typer.Argument(help="Text files, JSONL files or folders.")],
    out: Annotated[Path, typer.Option(help="Directory for tokenizer.json.")],
    vocab_size: Annotated[int, typer.Option(help="Ids in all, special tokens included.")] = 32768,
    fim: Annotated[bool, typer.Option("--fim", help="Add the control tokens for filling in the middle.")] = False,
) -> None:
    """Train a byte-level BPE tokenizer on the given text."""
    from dsv2.data import FIM_TOKENS, read_documents
    from dsv2.text import Tokenizer

    control_tokens = FIM_TOKENS if fim else ()
    tokenizer = Tokenizer.train((d.text for d in read_documents(inputs)), vocab_size, control_tokens)
    tokenizer.save(out)
    console.print(f"{tokenizer.vocab_size} ids in {out}", highlight=False)


@data_app.command("shards")
def data_shards(
    inputs: Annotated[list[Path], typer.Argument(help="Text files, JSONL files or folders.")],
    tokenizer: Annotated[Path, typer.Option(help="Directory or tokenizer.json.")],
    out: Annotated[Path, typer.Option(help="Directory for the shards; must not exist.")],
    held_out: Annotated[Path | None, typer.Option(help="Also hold documents out, into this directory.")] = None,
    held_out_fraction: Annotated[float, typer.Option(help="Share of the documents to hold out.")] = 0.01,
) -> None:
    """Tokenise text once, into memory-mapped shards that `pretrain` reads."""
    from dsv2.data import read_documents, split_held_out, write_shards
    from dsv2.files import require_replaceable
    from dsv2.text import Tokenizer

    if held_out is not None and held_out.resolve() == out.resolve():
        raise ValueError(f"--held-out {held_out} must be another directory than --out")
    for directory in (out, held_out):  # both, before either is written
        if directory is not None:
            require_replaceable(directory)
    tok = Tokenizer.load(tokenizer)
    documents = read_documents(inputs)
    parts = [(out, documents)]
    if held_out is not None:
        train, held = split_held_out(documents, held_out_fraction)
        parts = [(out, iter(train)), (held_out, iter(held))]
    for directory, docs in parts:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(f"{directory} (documents)", total=None)
            manifest = write_shards(docs, tok, directory, progress=lambda n, b=bar, t=task: b.update(t, completed=n))
        console.print(
            f"{directory}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens", highlight=False
        )


@data_app.command("prepare")
def data_prepare(
    recipe: Annotated[Path, typer.Argument(help="A TOML file: tokenizer, [[sources]], [filters], [dedup], [mixture].")],
    out: Annotated[Path, typer.Option(help="Directory for train/, held_out/ and the report; must not exist.")],
    work: Annotated[Path | None, typer.Option(help="Directory for finished parts; default: OUT.parts.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; they do not change the result.")] = 1,
    task: Annotated[str | None, typer.Option(help="I/N: make only the I-th of N shares of the parts.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, repeatable.")] = None,
) -> None:
    """Filter, deduplicate, mix and tokenise sources as a recipe says; the same command resumes."""
    from dsv2.config.data import load_prepare
    from dsv2.data import Preparation, prepare
    from dsv2.data.prepare import parse_task
    from dsv2.report import data_sections, write_report
    from dsv2.text import Tokenizer

    config = load_prepare(recipe, overrides or [])
    preparation = Preparation(config, Tokenizer.load(config.tokenizer), work or out.with_name(f"{out.name}.parts"))
    if task is not None:
        preparation.run_share(*parse_task(task))
        console.print(f"share {task} is in {preparation.work}", highlight=False)
        return
    with Progress(console=console, transient=True) as bar:
        rows: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in rows:
                rows[what] = bar.add_task(what)
            bar.update(rows[what], completed=done, total=total)

        report = prepare(preparation, out, workers=workers, progress=show)
    write_report(out / "report.html", f"Data: {recipe.stem}", data_sections(report))
    train = report["train"]
    console.print(f"{out}: {train['documents']:,} documents, {train['tokens']:,} tokens to train on", highlight=False)
    console.print(f"what was dropped and why: {out / 'report.html'}", highlight=False)


@app.command()
def pretrain(
    recipe: Annotated[Path, typer.Argument(help="A TOML file: [model], [data], [train].")],
    out: Annotated[Path, typer.Option(help="Run directory; a run that is in it is resumed.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, repeatable.")] = None,
) -> None:
    """Train a model from scratch as a recipe says; stopped runs resume exactly."""
    from dsv2.config.run import load_pretrain
    from dsv2.report import run_sections, write_report
    from dsv2.train.metrics import read_metrics
    from dsv2.train.pretrain import Pretraining

    should_stop = stop_on_signal()
    run = Pretraining(load_pretrain(recipe, overrides or []), out, console)
    complete = run.run(should_stop)
    if any("loss" in record for record in read_metrics(out)):  # none where it was stopped before the first
        write_report(out / "report.html", f"Pretraining: {recipe.stem}", run_sections(out))
    if not complete:
        console.print(f"stopped at step {run.step}; the same command continues", highlight=False)
        raise typer.Exit(130)
    console.print(f"done: {out / 'checkpoints'}, {out / 'report.html'}", highlight=False)


@app.command()
def generate(
    path: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is no limit.")] = 0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template.")] = False,
    device: Device = "auto",
    dtype: Dtype = None,
    adapter: Adapter = None,
) -> None:
    """Continue a prompt with a model, token by token."""
    from dsv2.adapters import merge_adapter
    from dsv2.device import pick_device
    from dsv2.engine.generate import Sampling
    from dsv2.engine.generate import generate as run
    from dsv2.text import StreamDecoder, Tokenizer, encode_chat
    from dsv2.weights import load, parse_dtype, resolve

    if not prompt:
        raise ValueError("--prompt is empty: give some text to continue")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    directory = resolve(path)
    tokenizer = Tokenizer.load(directory)
    if chat:
        ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    else:
        ids = tokenizer.encode(prompt, add_bos=True)
    model = load(directory, device=pick_device(device), dtype=parse_dtype(dtype))
    if adapter is not None:
        merge_adapter(adapter, model)
    if not chat:
        typer.echo(prompt, nl=False)
    decoder = StreamDecoder(tokenizer)
    run(
        model,
        [ids],
        max_new_tokens=max_tokens,
        sampling=sampling,
        on_token=lambda _, token: typer.echo(decoder.push(token), nl=False),
    )
    typer.echo(decoder.flush())


@app.command()
def chat(
    path: Checkpoint,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.3,
    top_p: float = 0.95,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 1024,
    seed: Annotated[int | None, typer.Option(help="Default: another one each time.")] = None,
    template: Annotated[str | None, typer.Option(help="v2, v2.5 or a jinja file; default: the tokenizer's.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    adapter: Adapter = None,
) -> None:
    """Talk with a model: a line is a question. /reset, /system TEXT, /retry, /quit; Ctrl-C stops an answer."""
    from dsv2.engine.sampling import SamplingParams

    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    from dsv2.engine.terminal import chat as run

    run(path, params, template=template, device=device, dtype=dtype, adapter=adapter)


@app.command()
def serve(
    path: Checkpoint,
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; default: ADAPTER, or else PATH.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="DSV2_API_KEY", help="What clients must send.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    adapter: Adapter = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of a sequence; default: the model's most.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that run at once.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of a step.")] = 8192,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the GPU's memory to use.")] = 0.9,
    enable_prefix_caching: Annotated[bool, typer.Option(help="Share equal beginnings of prompts.")] = True,
    num_draft_tokens: Annotated[int, typer.Option(help="Tokens guessed ahead, 0 to 7; the text is the same.")] = 0,
    draft_model: Annotated[
        str | None, typer.Option(help="A small checkpoint that guesses them; default: what repeats.")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Of a request.")] = _SERVE.max_body_bytes,
    max_queued_seqs: Annotated[int, typer.Option(help="More are refused.")] = _SERVE.max_queued_seqs,
    max_connections: Annotated[int, typer.Option(help="At once.")] = _SERVE.max_connections,
    idle_timeout_s: Annotated[float, typer.Option(help="Closes silent connections.")] = _SERVE.idle_timeout_s,
    shutdown_timeout_s: Annotated[float, typer.Option(help="To finish in.")] = _SERVE.shutdown_timeout_s,
) -> None:
    """Serve a model over OpenAI's HTTP API, and a chat page, until Ctrl-C or SIGTERM."""
    from dsv2.serve.command import serve as run

    limits = ServeConfig(
        api_key=api_key,
        max_body_bytes=max_body_bytes,
        max_queued_seqs=max_queued_seqs,
        max_connections=max_connections,
        idle_timeout_s=idle_timeout_s,
        shutdown_timeout_s=shutdown_timeout_s,
    )
    run(
        path,
        host,
        port,
        limits,
        version=__version__,
        served_model_name=served_model_name,
        adapter=adapter,
        on_start=lambda url: console.print(f"serving {path} at {url}", highlight=False),
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        enable_prefix_caching=enable_prefix_caching,
        num_draft_tokens=num_draft_tokens,
        draft_model=draft_model,
    )


@app.command()
def convert(
    source: Checkpoint,
    target: Annotated[Path, typer.Argument(help="Directory to write.")],
    dtype: Dtype = None,
    max_shard_gb: Annotated[float, typer.Option(help="Largest shard, in 10^9 bytes.")] = 5.0,
    adapter: Adapter = None,
) -> None:
    """Rewrite a checkpoint in another dtype or sharding, or with an adapter merged, in the official layout."""
    from dsv2.adapters import merge_adapter
    from dsv2.weights import convert as run
    from dsv2.weights import parse_dtype

    if not 0 < max_shard_gb < float("inf"):
        raise ValueError(f"--max-shard-gb {max_shard_gb} must be positive")
    change = None if adapter is None else partial(merge_adapter, adapter)
    run(source, target, dtype=parse_dtype(dtype), max_shard_bytes=int(max_shard_gb * 1e9), change=change)
    console.print(f"wrote {target}", highlight=False)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run directory, or one of `data prepare`.")],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the run directory.")] = None,
) -> None:
    """Write report.html of a run (loss, held-out bits per byte, expert load) or of prepared data."""
    from dsv2.report import data_sections, run_sections, write_report

    target, data = out or run / "report.html", run / "report.json"
    sections = data_sections(json.loads(data.read_text(encoding="utf-8"))) if data.is_file() else run_sections(run)
    write_report(target, f"Run {run.resolve().name}", sections)
    console.print(f"wrote {target}", highlight=False)
