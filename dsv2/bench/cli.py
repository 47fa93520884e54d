"""The `dsv2 bench` commands: parse, call one function, print. No logic of their own, as in `dsv2.cli`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, help="Measurements, and the tables made of them.")

console = Console(soft_wrap=True)

# What several commands take.
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the file's.")]
Out = Annotated[Path | None, typer.Option(help="Write the results as JSON, too.")]
Commit = Annotated[str, typer.Option(help="Recorded with the results.")]
Measured = Annotated[str | None, typer.Argument(help="A checkpoint directory or hub id.")]
Preset = Annotated[str | None, typer.Option(help="Random weights in this architecture instead.")]
Lengths = Annotated[int, typer.Option(min=1, help="Tokens of a request.")]
Card = Annotated[str, typer.Option(help="cuda, cuda:1, ..., or cpu, which says nothing about a GPU.")]


@app.command("kernels")
def kernels(
    rooms: Annotated[list[str] | None, typer.Argument(help="Rooms under dsv2/kernels; default: all.")] = None,
    out: Out = None,
    commit: Commit = "unknown",
    only: Annotated[str, typer.Option(help="Only benchmarks whose name contains this.")] = "",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, ..., or cpu: references on small inputs.")] = "cuda",
) -> None:
    """Every kernel: parity first, then its time beside the card's limits and a baseline. Status 1 if one is wrong."""
    from dsv2.bench.kernels import is_sound, run
    from dsv2.bench.table import print_results

    results = run(rooms or (), only=only, device=device, commit=commit, out=out, console=console)
    print_results(console, results)
    if not is_sound(results):
        raise typer.Exit(1)


@app.command("table")
def table(
    results: Annotated[list[Path], typer.Argument(help="JSON files of `dsv2 bench kernels`.")],
    out: Annotated[Path, typer.Option(help="Markdown file to write.")],
) -> None:
    """Write results as a page with tables, such as docs/kernels.md."""
    from dsv2.bench.table import write_page

    write_page(results, out)
    console.print(f"wrote {out}", highlight=False)


@app.command("latency")
def latency(
    path: Measured = None,
    preset: Preset = None,
    batch_size: Annotated[str, typer.Option(help="One or several, with commas between them.")] = "1,32,256",
    input_len: Lengths = 1024,
    output_len: Lengths = 128,
    num_iters: Annotated[int, typer.Option(min=1, help="Batches that count; one before them does not.")] = 3,
    dtype: Dtype = None,
    device: Card = "cuda",
    out: Out = None,
    commit: Commit = "unknown",
) -> None:
    """Batches of equal requests: prefill, time a step and decode rate, beside what the card's memory allows."""
    from dsv2.bench.engine import Setup, print_results, run_latency

    if not all(size.strip().isdecimal() for size in batch_size.split(",")):
        raise ValueError(f"--batch-size {batch_size!r} must be numbers with commas between them, such as 1,32")
    setup = Setup(path=path, preset=preset, device=device, dtype=dtype, commit=commit, out=out)
    sizes = [int(size) for size in batch_size.split(",")]
    print_results(console, run_latency(setup, sizes, input_len, output_len, num_iters, console))


@app.command("throughput")
def throughput(
    path: Measured = None,
    preset: Preset = None,
    num_prompts: Annotated[int, typer.Option(min=1)] = 1000,
    input_len: Lengths = 1024,
    output_len: Lengths = 128,
    range_ratio: Annotated[float, typer.Option(min=0, max=1, help="Lengths vary by this share.")] = 0.0,
    dtype: Dtype = None,
    device: Card = "cuda",
    out: Out = None,
    commit: Commit = "unknown",
) -> None:
    """Many requests at once: tokens a second."""
    from dsv2.bench.engine import Setup, print_results, run_throughput

    setup = Setup(path=path, preset=preset, device=device, dtype=dtype, commit=commit, out=out)
    print_results(console, run_throughput(setup, num_prompts, input_len, output_len, range_ratio, console))


@app.command("serve")
def serve(
    url: Annotated[str, typer.Option(help="Of a running server, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="What the server calls it; default: its first.")] = None,
    num_prompts: int = 100,
    request_rate: Annotated[float, typer.Option(help="Requests a second, Poisson; default: all at once.")] = math.inf,
    max_concurrency: Annotated[int | None, typer.Option(help="Requests on their way at once.")] = None,
    input_len: Lengths = 1024,
    output_len: Lengths = 128,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Default: the server says.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="DSV2_API_KEY")] = None,
    seed: int = 0,
    out: Out = None,
    commit: Commit = "unknown",
) -> None:
    """What clients of a server see: times to first and between tokens, rates. Status 1 if a request failed."""
    from dsv2.bench.serve import Load, print_results, run

    load = Load(
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        request_rate=request_rate,
        max_concurrency=max_concurrency,
        seed=seed,
    )
    results = run(
        url, load, model=model, vocab_size=vocab_size, api_key=api_key, commit=commit, out=out, console=console
    )
    print_results(console, results)
    if results["failed"]:
        raise typer.Exit(1)
