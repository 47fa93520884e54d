"""Results of `dsv2 bench kernels` for people: a table on the terminal, and docs/kernels.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from dsv2.files import write_text

COLUMNS = ("benchmark", "us", "p10 to p90", "TFLOP/s", "GB/s", "ceiling us", "%", "target us", "error", "baselines", "")

INTRODUCTION = """\
# Kernels

Written by `dsv2 bench table` from the JSON files of `dsv2 bench kernels`; not edited by hand. Shapes, counted work,
baselines and targets are in each room's `dsv2/kernels/<room>/cases.py`.

- **us**: median time of one call in microseconds, over 30 replays of a CUDA graph of several calls; **p10 to p90**: the
  spread of those replays. Rows named `backward` time the forward pass and all its gradients. A difference smaller than
  the spread is no difference.
- **TFLOP/s**, **GB/s**: counted work over the median. Counted is the least that any implementation must do: each input
  read once, each output written once, no arithmetic done twice.
- **ceiling us**: the larger of counted bytes over the card's read bandwidth and counted FLOPs over its bf16 matmul
  rate, both measured at the start of the run (a sum over 2 GiB, a product of 8192 x 8192 matrices). **%**: the ceiling
  over the median. It can pass 100 where inputs stay in the L2 cache, or arithmetic is in fp8.
- **target us**: the time set as a goal before the work began, and whether it is met.
- **error**: relative norm of the difference from the reference in fp32, the largest over outputs and gradients. Values
  above 1e-2, gradients above 5e-2 and unequal integers make a row WRONG, and no time is reported. "skipped" where the
  reference does not fit the card's memory; the tests compare small shapes in any case.
- **baselines**: other implementations of the same call, timed the same way in the same process. 2.0x: ours takes half
  the time.
- "in L2": the inputs fit the L2 cache, so the bytes came from there. "eager": the call waits for the GPU or cannot be
  captured in a graph, so its time includes the host's.
"""


def print_results(console: Console, results: Mapping[str, Any]) -> None:
    """The table without the columns that no row fills, as wide as it needs; then what failed, and why."""
    rows = [cells(row) for row in results["rows"]]
    filled = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]
    table = Table(title=_title(results), title_justify="left", box=box.SIMPLE_HEAD)
    for i in filled:
        table.add_column(COLUMNS[i], justify="right" if 0 < i < 9 else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(row[i] for i in filled))
    table.width = Measurement.get(console, console.options.update(width=1000), table).maximum
    console.print(table, crop=False, highlight=False)
    failures = [f"{row['benchmark']} failed: {row['failed']}" for row in results["rows"] if "failed" in row]
    for line in (*failures, *([results["note"]] if results["note"] else [])):
        console.print(line, markup=False, highlight=False)


def write_page(files: Iterable[Path], out: Path) -> None:
    """docs/kernels.md: the introduction, then a section a file. ValueError for anything else, or a file given twice."""
    files = list(files)
    paths = [file.resolve() for file in files]
    for file, path in zip(files, paths, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f"{file} is given twice")
    sections = [INTRODUCTION, *(_section_of(file) for file in files)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "\n".join(sections))


def _section_of(file: Path) -> str:
    results = _read(file)
    try:
        return _section(results)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(results, dict) or results.get("what") != "kernels":
        raise ValueError(f"{file} does not hold results of `dsv2 bench kernels`")
    return results


def _section(results: Mapping[str, Any]) -> str:
    lines = [f"## {_title(results)}", "", *([results["note"], ""] if results["note"] else [])]
    lines += [_markdown_row(COLUMNS), _markdown_row(["---", *["---:"] * 8, "---", "---"])]
    lines += [_markdown_row(cells(row)) for row in results["rows"]]
    return "\n".join(lines) + "\n"


def _markdown_row(values: Iterable[str]) -> str:
    return "| " + " | ".join(v.replace("|", "\\|") for v in values) + " |"


def _title(results: Mapping[str, Any]) -> str:
    parts = [results["card"], f"torch {results['torch']}", f"triton {results['triton']}", f"commit {results['commit']}"]
    parts.append(results["date"][:10])
    if c := results["ceilings"]:
        parts += [f"{c['read_gb_per_s']:,.0f} GB/s", f"{c['bf16_matmul_tflops']:,.0f} TFLOP/s"]
    if results["implementation"] == "reference":
        parts.append("reference implementations")
    return ", ".join(parts)


def cells(row: Mapping[str, Any]) -> list[str]:
    """One cell a column; empty where nothing was measured."""
    name = row["benchmark"]
    if "failed" in row:
        return [name, *[""] * 9, "failed"]
    error = _error(row["errors"])
    if row["parity"] == "WRONG":
        return [name, *[""] * 7, error, "", "WRONG"]
    spread = f"{_number(row['p10_us'])} to {_number(row['p90_us'])}"
    rates = [_number(row.get(key)) for key in ("tflops", "gb_per_s", "ceiling_us", "percent_of_ceiling")]
    baselines = ", ".join(_baseline(*item) for item in row["baselines"].items())
    return [name, _number(row["us"]), spread, *rates, _target(row), error, baselines, _notes(row)]


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:,.1f}" if x < 1000 else f"{x:,.0f}"


def _error(errors: Mapping[str, float | None]) -> str:
    """The largest; infinite ones are saved as null."""
    if None in errors.values():
        return "inf"
    largest = max((e for e in errors.values() if e is not None), default=None)
    return "" if largest is None else f"{largest:.0e}" if largest else "0"


def _target(row: Mapping[str, Any]) -> str:
    if row.get("target_us") is None:
        return ""
    return f"{_number(row['target_us'])} {'met' if row['meets_target'] else 'missed'}"


def _baseline(name: str, figures: Mapping[str, Any]) -> str:
    if "failed" in figures:
        return f"{name} failed"
    return f"{name} {_number(figures['us'])} ({figures['speedup']:.2f}x{'' if figures['graph'] else ', eager'})"


def _notes(row: Mapping[str, Any]) -> str:
    notes = {
        "parity skipped: too large": row["parity"] != "ok",
        "eager": not row["graph"] and row.get("ceiling_us") is not None,
        "in L2": row["fits_l2"],
    }
    return ", ".join(note for note, holds in notes.items() if holds)
