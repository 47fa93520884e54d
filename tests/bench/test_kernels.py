"""The benchmark runner: no time without parity, figures that follow from it, names that suggest, files that last."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from dsv2 import cli
from dsv2.bench import kernels, parity
from dsv2.bench.jobs import Job, find_jobs
from dsv2.bench.kernels import Machine, call_of, is_sound, run, run_job
from dsv2.bench.table import COLUMNS, INTRODUCTION, cells, print_results, write_page
from dsv2.bench.timing import REPLAYS, Ceilings, Timing, gpu_clock, measure_ceilings, wall_clock
from dsv2.kernels.case import Benchmark
from tests.numerics import BUDGETS, GRADIENT_BUDGETS

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")

TEN_US = Timing(us=10.0, p10_us=9.0, p90_us=12.0, calls=50, graph=True)
CEILINGS = Ceilings(bytes_per_s=1e12, flops_per_s=1e15)


def fake_clock(call: Callable[[], object]) -> Timing:
    """Everything takes ten microseconds, and is called once."""
    call()
    return TEN_US


MACHINE = Machine(torch.device("cpu"), fake_clock, torch.float32, CEILINGS, l2_bytes=100)


def square(x: Tensor) -> Tensor:
    return x * x


def numbers(device: torch.device) -> dict[str, Any]:
    return {"x": torch.arange(1.0, 9.0, device=device, dtype=torch.bfloat16)}


def job(function: Callable[..., Any] = square, reference: Callable[..., Any] = square, **changes: Any) -> Job:
    benchmark = Benchmark(name="T8", inputs=numbers, flops=2e9, bytes=4e6)
    return Job("toy", dataclasses.replace(benchmark, **changes), function, reference)


def measure(*arguments: Any, **changes: Any) -> dict[str, Any]:
    return run_job(job(*arguments, **changes), MACHINE)


# Parity -----------------------------------------------------------------------------------------------------------


def integers(x: Tensor) -> Tensor:
    return x.long()


def add_one(x: Tensor) -> Tensor:
    return x.add_(1)


class Straight(torch.autograd.Function):
    """The square of x, with the gradient of another function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


GRADIENT = {"gradients": ("x",), "backward": True}
WRONG: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "values": (lambda x: x * x * 1.02, square, {}),
    "gradient": (Straight.apply, square, GRADIENT),
    "one integer": (lambda x: x.long() + (x == 3), integers, {}),
    "NaN": (lambda x: torch.where(x == 3, torch.nan, x * x), square, {}),
    "infinity of the other sign": (lambda x: x / 0, lambda x: -x / 0, {}),
    "shape": (lambda x: (x * x)[None], square, {}),
    "missing output": (square, lambda x: (x * x, x), {}),
    "output too many": (lambda x: (x * x, x), square, {}),
    "argument not written": (lambda x: x + 1, add_one, {"mutated": ("x",)}),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_differs_from_the_reference_is_wrong_and_gets_no_time(what):
    function, reference, changes = WRONG[what]
    row = measure(function, reference, baselines={"torch": square}, **changes)
    assert row["parity"] == "WRONG"
    assert not {"us", "baselines", "failed"} & row.keys()
    assert not is_sound({"rows": [row]})


RIGHT: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "values within the budget": (lambda x: x * x * 1.004, square, {}),
    "gradients": (square, square, GRADIENT),
    "integers": (integers, integers, {}),
    "NaN in the same places": (lambda x: x / 0 * (x - 3), lambda x: x / 0 * (x - 3), {}),
    "several outputs": (lambda x: (x, None, x.long()), lambda x: [x, x.long()], {}),
    "argument written in place": (add_one, add_one, {"mutated": ("x",)}),
}


@pytest.mark.parametrize("what", RIGHT)
def test_what_equals_the_reference_gets_a_time(what):
    function, reference, changes = RIGHT[what]
    row = measure(function, reference, **changes)
    assert (row["parity"], row["us"]) == ("ok", 10.0)
    assert is_sound({"rows": [row]})


def test_the_reference_runs_on_the_same_numbers_in_a_wider_dtype():
    seen: list[Tensor] = []

    def reference(x: Tensor) -> Tensor:
        seen.append(x)
        return x * x

    measure(square, reference)
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], numbers(torch.device("cpu"))["x"].float())


def test_a_reference_that_does_not_fit_is_told_and_the_time_is_reported():
    def reference(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    row = measure(square, reference)
    assert (row["parity"], row["errors"], row["us"]) == ("skipped: too large", {}, 10.0)
    assert is_sound({"rows": [row]})


def test_a_benchmark_that_tells_nothing_to_compare_fails():
    assert "names none in `mutated`" in measure(lambda x: None, lambda x: None)["failed"]


def test_the_budgets_are_those_of_the_tests():
    assert (BUDGETS[torch.bfloat16], GRADIENT_BUDGETS[torch.bfloat16]) == (parity.BUDGET, parity.GRADIENT_BUDGET)


def test_the_error_is_relative_to_the_norm_of_the_reference():
    assert parity.relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(1 / 5)


def test_the_error_beside_a_reference_of_zeros_is_absolute():
    assert parity.relative_error(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0


def test_large_tensors_are_compared_to_their_end(monkeypatch):
    monkeypatch.setattr(parity, "_CHUNK", 4)
    x = torch.ones(10)
    assert parity.relative_error(x.index_fill(0, torch.tensor([9]), 2.0), x) == pytest.approx(1 / 10**0.5)


# Times and what follows from them ---------------------------------------------------------------------------------


def test_wall_clock_gives_median_and_deciles():
    # Calls take 1, 2, ..., 30 seconds.
    ticks = itertools.chain.from_iterable((0.0, float(i)) for i in range(1, REPLAYS + 1))
    timing = wall_clock(lambda: None, now=lambda: next(ticks))
    assert (timing.us, timing.p10_us, timing.p90_us) == pytest.approx((15.5e6, 3.9e6, 27.1e6))
    assert not timing.graph


@pytest.mark.parametrize(("flops", "num_bytes", "us"), [(2e9, 4e6, 4.0), (8e9, 4e6, 8.0)])
def test_the_ceiling_is_the_slower_of_bytes_and_flops(flops, num_bytes, us):
    assert CEILINGS.time_us(flops, num_bytes) == pytest.approx(us)


def test_rates_follow_from_the_median():
    row = measure()
    assert row["tflops"] == pytest.approx(200.0)  # 2e9 in 10 us
    assert row["gb_per_s"] == pytest.approx(400.0)  # 4e6 in 10 us
    assert (row["ceiling_us"], row["percent_of_ceiling"]) == pytest.approx((4.0, 40.0))


@pytest.mark.parametrize(("target_us", "met"), [(10.0, True), (9.9, False), (None, None)])
def test_a_target_is_met_by_the_median(target_us, met):
    assert measure(target_us=target_us)["meets_target"] is met


@pytest.mark.parametrize(("num_elements", "fits"), [(49, True), (50, False)])
def test_a_row_says_whether_its_inputs_fit_the_l2_cache(num_elements, fits):
    row = measure(inputs=lambda device: {"x": torch.ones(num_elements, device=device, dtype=torch.bfloat16)})
    assert (row["input_bytes"], row["fits_l2"]) == (2 * num_elements, fits)


@pytest.mark.parametrize(("backward", "called"), [(False, ["forward"]), (True, ["forward", "backward"])])
def test_a_backward_benchmark_times_the_gradients_too(backward, called):
    calls: list[str] = []

    def recording(x: Tensor) -> Tensor:
        calls.append("forward")
        y = x * x
        if y.requires_grad:
            y.register_hook(lambda g: calls.append("backward"))
        return y

    call = call_of(job(gradients=("x",), backward=backward).benchmark, numbers(torch.device("cpu")), recording)
    calls.clear()
    call()
    assert calls == called


def test_baselines_are_timed_beside():
    baseline = measure(baselines={"torch": square})["baselines"]["torch"]
    assert (baseline["us"], baseline["speedup"]) == (10.0, 1.0)


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel\nimage")


def test_a_baseline_that_fails_costs_only_itself():
    row = measure(baselines={"library": broken, "torch": square})
    assert row["baselines"]["library"] == {"failed": "RuntimeError: no kernel image"}
    assert row["baselines"]["torch"]["us"] == row["us"] == 10.0
    assert is_sound({"rows": [row]})


def test_a_benchmark_that_fails_is_a_row_that_says_so():
    row = measure(broken)
    assert row["failed"] == "RuntimeError: no kernel image"
    assert not is_sound({"rows": [row]})


@pytest.mark.gpu
@needs_gpu
def test_calls_are_replayed_from_a_graph():
    x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    timing = gpu_clock(lambda: torch.autograd.grad((x @ x).sum(), x))
    assert timing.graph
    assert 0 < timing.p10_us <= timing.us <= timing.p90_us
    assert timing.calls >= 3


@pytest.mark.gpu
@needs_gpu
def test_a_call_that_waits_for_the_gpu_is_timed_eagerly_and_spoils_no_later_graph():
    x = torch.randn(1024, device="cuda")
    assert not gpu_clock(lambda: x.sum().item()).graph
    assert gpu_clock(x.sum).graph


@pytest.mark.gpu
@needs_gpu
def test_ceilings_are_those_of_a_gpu():
    ceilings = measure_ceilings(CUDA)
    assert ceilings.bytes_per_s > 1e11
    assert ceilings.flops_per_s > 1e13


# What runs --------------------------------------------------------------------------------------------------------


def test_every_benchmark_has_a_label_of_its_own():
    labels = [j.label for j in find_jobs([], "", CUDA)]
    assert sorted(set(labels)) == sorted(labels)


def test_a_label_names_the_function_where_it_is_not_called_as_the_room():
    assert job().label == "toy/T8"
    assert Job("toy", dataclasses.replace(job().benchmark, function="other"), square, square).label == "toy/other/T8"


def test_benchmarks_are_chosen_by_a_part_of_their_name():
    names = [j.benchmark.name for j in find_jobs(["rms_norm"], "backward", CUDA)]
    assert names == ["T16384-D2048-backward"]


def test_without_a_gpu_the_test_cases_take_their_place():
    from dsv2.kernels.rms_norm.cases import CASES

    assert [j.benchmark.name for j in find_jobs(["rms_norm"], "", torch.device("cpu"))] == [c.name for c in CASES]


@pytest.mark.parametrize(
    ("rooms", "only", "message"),
    [
        (["rms_nrom"], "", r"no room 'rms_nrom' \(did you mean 'rms_norm'\?\)"),
        (["xyz"], "", r"no room 'xyz'; there are: .*rms_norm"),
        (["rms_norm"], "T64-D2047", r"no benchmark 'T64-D2047' \(did you mean 'T64-D2048'\?\)"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(rooms, only, message):
    with pytest.raises(ValueError, match=message):
        find_jobs(rooms, only, CUDA)


def test_an_interrupted_run_keeps_the_rows_it_has(tmp_path, monkeypatch):
    rows = iter([{"benchmark": "first"}])

    def interrupted(*_: object) -> dict[str, Any]:
        row = next(rows, None)
        if row is None:
            raise KeyboardInterrupt
        return row

    monkeypatch.setattr(kernels, "run_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(["rms_norm"], device="cpu", out=tmp_path / "new" / "r.json")
    assert json.loads((tmp_path / "new" / "r.json").read_text())["rows"] == [{"benchmark": "first"}]


# The command ------------------------------------------------------------------------------------------------------


def dsv2(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", *arguments], catch_exceptions=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_how_to_try_it():
    with pytest.raises(ValueError, match="no CUDA device for --device cuda: --device cpu"):
        dsv2("kernels")


def test_the_command_on_the_cpu_writes_a_table_json_and_page(tmp_path):
    out, page = tmp_path / "r.json", tmp_path / "docs" / "kernels.md"
    done = dsv2("kernels", "rms_norm", "--device", "cpu", "--only", "view", "--commit", "abc", "--out", str(out))
    assert done.exit_code == 0
    assert "rms_norm/view" in done.output
    assert "says nothing about the kernels" in done.output
    results = json.loads(out.read_text())
    assert (results["commit"], results["implementation"], results["torch"]) == ("abc", "reference", torch.__version__)
    assert [(row["benchmark"], row["parity"]) for row in results["rows"]] == [("rms_norm/view", "ok")]
    again = shutil.copy(out, tmp_path / "again.json")
    assert dsv2("table", str(out), str(again), "--out", str(page)).output == f"wrote {page}\n"
    assert page.read_text().count("| rms_norm/view |") == 2


def test_the_command_ends_with_1_where_a_kernel_is_wrong(monkeypatch):
    monkeypatch.setattr(kernels, "run_job", lambda *_: measure(lambda x: x, square))
    done = dsv2("kernels", "rms_norm", "--device", "cpu", "--only", "view")
    assert done.exit_code == 1
    assert "WRONG" in done.output


def test_importing_the_package_loads_nothing():
    code = "import sys, dsv2.bench; print({'torch', 'triton', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# Tables -----------------------------------------------------------------------------------------------------------


def cell(row: dict[str, Any], column: str) -> str:
    return cells(row)[COLUMNS.index(column)]


def test_a_row_shows_its_figures():
    row = measure(baselines={"torch": square, "library": broken}, target_us=12.0)
    assert cells(row) == [
        *("toy/T8", "10.0", "9.0 to 12.0", "200.0", "400.0", "4.0", "40.0", "12.0 met"),
        *(cell(row, "error"), "torch 10.0 (1.00x), library failed", "in L2"),
    ]


def test_a_wrong_row_shows_its_error_and_no_time():
    row = measure(lambda x: x * x * 1.5, square)
    assert [c for c in cells(row) if c] == ["toy/T8", "5e-01", "WRONG"]


def test_an_infinite_error_survives_the_json():
    row = json.loads(json.dumps(measure(lambda x: x[:3], square), allow_nan=False))
    assert cell(row, "error") == "inf"


def test_a_row_without_a_graph_says_eager():
    row = measure() | {"graph": False, "fits_l2": False}
    assert cell(row, "") == "eager"


def test_the_table_for_people_is_followed_by_what_failed():
    out = io.StringIO()
    rows = [measure(), measure(broken)]
    print_results(Console(file=out, width=40, soft_wrap=True), kernels.head(MACHINE, "abc") | {"rows": rows})
    lines = out.getvalue().splitlines()
    assert any("toy/T8" in line and "9.0 to 12.0" in line and "in L2" in line for line in lines)
    assert "toy/T8 failed: RuntimeError: no kernel image" in lines


def test_every_column_of_the_page_is_explained():
    assert [c for c in COLUMNS[1:-1] if f"**{c}**" not in INTRODUCTION] == []


def saved(tmp_path: Path, **changes: Any) -> Path:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(kernels.head(MACHINE, "abc") | {"rows": [measure()]} | changes))
    return file


@pytest.mark.parametrize(
    "changes",
    [{"rows": None}, {"rows": [{}]}, {"rows": [3]}, {"date": 7}, {"ceilings": {"read_gb_per_s": "fast"}}],
    ids=lambda changes: "-".join(changes),
)
def test_results_that_are_damaged_are_refused_by_name(tmp_path: Path, changes: dict[str, Any]):
    with pytest.raises(ValueError, match=r"r\.json is damaged: \w+: "):
        write_page([saved(tmp_path, **changes)], tmp_path / "kernels.md")
    assert not (tmp_path / "kernels.md").exists()


def test_one_file_of_results_is_refused_a_second_time(tmp_path: Path):
    file = saved(tmp_path)
    with pytest.raises(ValueError, match=r"r\.json is given twice"):
        write_page([file, file.parent / "." / ".." / file.parent.name / file.name], tmp_path / "kernels.md")


@pytest.mark.parametrize("text", ["{", "[]", '{"what": "engine"}'])
def test_a_page_of_something_else_is_refused_and_the_old_one_stays(tmp_path: Path, text):
    (tmp_path / "r.json").write_text(text)
    (tmp_path / "kernels.md").write_text("old")
    with pytest.raises(ValueError, match=r"r\.json"):
        write_page([tmp_path / "r.json"], tmp_path / "kernels.md")
    assert (tmp_path / "kernels.md").read_text() == "old"
