"""`dsv2 bench latency` and `throughput`: figures that follow from tokens and times, and files that last."""

from __future__ import annotations

import io
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from dsv2 import cli
from dsv2.bench import engine as bench
from dsv2.bench.engine import Setup, decode_bytes, latency, make_engine, print_results, random_model, run_latency
from dsv2.config.counts import active_parameters_without_embedding, kv_elements_per_token, parameters
from dsv2.engine.core import Engine
from dsv2.weights import save
from tests.numerics import SMALL_MODELS

IMPORTED_S = time.monotonic()
CPU = torch.device("cpu")
QUIET = Console(quiet=True)
TINY = ["--preset", "tiny", "--device", "cpu"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    """With pages for two sequences of 64 tokens that run at once."""
    return make_engine(random_model(SMALL_MODELS["v2-lite"](), CPU, torch.float32), [2], 128)


@pytest.fixture
def _ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at the clock finds it a second later than before."""
    monkeypatch.setattr(bench, "process_age_s", lambda: 100.0)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=itertools.count().__next__))


# Measures ---------------------------------------------------------------------------------------------------------


def test_weights_spread_tokens_over_the_experts() -> None:
    model = random_model(SMALL_MODELS["v2"](), CPU, torch.float32)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (weight == 1).all()
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert not weight.requires_grad


def test_a_sequence_alone_reads_the_active_parameters_and_its_cache() -> None:
    cfg = SMALL_MODELS["v2"]()
    assert decode_bytes(cfg, 1, 0, 2) == pytest.approx(2 * active_parameters_without_embedding(cfg))
    assert decode_bytes(cfg, 1, 100, 2) - decode_bytes(cfg, 1, 0, 2) == pytest.approx(200 * kv_elements_per_token(cfg))


def test_many_sequences_read_every_parameter_but_the_embedding() -> None:
    cfg = SMALL_MODELS["v2"]()
    assert decode_bytes(cfg, 10**4, 0, 4) == pytest.approx(4 * (parameters(cfg) - cfg.vocab_size * cfg.hidden_size))


def test_a_dense_model_reads_the_same_weights_for_any_number_of_sequences() -> None:
    cfg = SMALL_MODELS["llama"]()
    assert decode_bytes(cfg, 1, 0, 2) == decode_bytes(cfg, 9, 0, 2) == 2 * active_parameters_without_embedding(cfg)


@pytest.mark.usefixtures("_ticking")
def test_the_decode_rate_is_that_of_steps_in_which_all_sequences_decode(engine: Engine) -> None:
    # Five steps of a second and two tokens. The last finishes the sequences, so three of them count.
    row = latency(engine, 2, 3, 5, num_iters=1, bytes_per_s=None)
    assert row["runs"] == [[1, 2, 5]]
    assert (row["prefill_tokens_per_s"], row["decode_tokens_per_s"], row["latency_s"]) == (6, 2, 5)


def test_a_row_tells_medians_and_how_near_they_come_to_the_roofline(engine: Engine, monkeypatch) -> None:
    runs = iter([(9.0, 9.0, 9.0), (2.0, 100.0, 4.0), (1.0, 200.0, 6.0), (3.0, 400.0, 5.0)])  # the first warms up
    monkeypatch.setattr(bench, "_batch", lambda *_: next(runs))
    row = latency(engine, 2, 10, 6, num_iters=3, bytes_per_s=1e6)
    assert (row["prefill_s"], row["decode_tokens_per_s"], row["latency_s"]) == (2, 200, 5)
    assert (row["prefill_tokens_per_s"], row["decode_step_ms"]) == (10, 10)
    num_bytes = decode_bytes(engine.model.cfg, 2, 13, 4)
    assert row["decode_step_bytes"] == num_bytes
    assert row["roofline"] == pytest.approx(num_bytes / 1e6 / 0.010)


def test_a_batch_that_would_run_in_pieces_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"a batch of 2 with 100 \+ 30 tokens each needs 8 pages, the cache has 4"):
        latency(engine, 2, 100, 30, num_iters=1, bytes_per_s=None)


@pytest.mark.usefixtures("_ticking")
def test_throughput_counts_the_tokens_of_all_requests(engine: Engine) -> None:
    row = bench.throughput(engine, 5, 6, 4)
    assert (row["input_tokens"], row["output_tokens"]) == (30, 20)
    assert (row["elapsed_s"], row["requests_per_s"], row["output_tokens_per_s"], row["tokens_per_s"]) == (1, 5, 20, 50)


def test_lengths_vary_by_the_ratio_and_no_more(engine: Engine, monkeypatch) -> None:
    lengths: list[tuple[int, int]] = []
    add = engine.add

    def record(prompt: Any, params: Any) -> Any:
        lengths.append((len(prompt), params.max_tokens))
        return add(prompt, params)

    monkeypatch.setattr(engine, "add", record)
    bench.throughput(engine, 20, 20, 4, range_ratio=0.5)
    assert all(10 <= num_input <= 30 and 2 <= num_output <= 6 for num_input, num_output in lengths)
    assert statistics.pstdev(num_input for num_input, _ in lengths) > 2


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_process_is_older_than_this_module_and_younger_than_the_machine() -> None:
    age_s = bench.process_age_s()
    assert age_s is not None
    # Linux counts in hundredths of a second.
    assert time.monotonic() - IMPORTED_S - 0.01 < age_s < time.clock_gettime(time.CLOCK_BOOTTIME)


# Commands ---------------------------------------------------------------------------------------------------------


def dsv2(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", *arguments], catch_exceptions=False)


def test_latency_writes_a_table_and_json(tmp_path: Path) -> None:
    out = tmp_path / "new" / "r.json"
    sizes = ["--batch-size", "1,2", "--input-len", "5", "--output-len", "3", "--num-iters", "1"]
    done = dsv2("latency", *TINY, *sizes, "--commit", "abc", "--out", str(out))
    assert done.exit_code == 0
    assert "decode tokens/s" in done.output
    assert "of roofline" not in done.output
    assert "it says nothing about a GPU" in done.output
    results = json.loads(out.read_text())
    assert (results["what"], results["commit"], results["torch"]) == ("latency", "abc", torch.__version__)
    assert (results["model"], results["dtype"], results["implementation"]) == ("tiny", "float32", "reference")
    assert [(row["batch_size"], len(row["runs"])) for row in results["rows"]] == [(1, 1), (2, 1)]


def test_throughput_measures_a_checkpoint_after_a_run_that_does_not_count(tmp_path: Path, monkeypatch) -> None:
    save(random_model(SMALL_MODELS["mixtral"](), CPU, torch.float32), tmp_path / "model")
    counted, throughput = [], bench.throughput

    def record(*args: Any, **options: Any) -> Any:
        counted.append(throughput(*args, **options))
        return counted[-1]

    monkeypatch.setattr(bench, "throughput", record)
    out = tmp_path / "r.json"
    lengths = ["--num-prompts", "3", "--input-len", "5", "--output-len", "4", "--range-ratio", "0.5"]
    done = dsv2("throughput", str(tmp_path / "model"), *lengths, "--device", "cpu", "--out", str(out))
    assert done.exit_code == 0
    assert "requests/s" in done.output
    assert len(counted) == 2
    assert json.loads(out.read_text())["rows"] == counted[1:]


@pytest.mark.usefixtures("_ticking")
def test_a_batch_starts_with_all_its_sequences() -> None:
    # Of 70 tokens and 4, which fill two pages each, without another that the scheduler would have to spare.
    (row,) = run_latency(Setup(preset="tiny", device="cpu"), [3], 70, 4, 1, QUIET)["rows"]
    assert row["runs"] == [[1, 3, 4]]


def test_an_interrupted_run_keeps_the_rows_it_has(tmp_path: Path, monkeypatch) -> None:
    def interrupted(_: Engine, batch_size: int, *__: Any, **___: Any) -> dict[str, Any]:
        if batch_size == 2:
            raise KeyboardInterrupt
        return {"batch_size": batch_size}

    monkeypatch.setattr(bench, "latency", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_latency(Setup(preset="tiny", device="cpu", out=tmp_path / "r.json"), [1, 2], 4, 4, 1, QUIET)
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == [{"batch_size": 1}]


@pytest.mark.usefixtures("_ticking")
def test_the_start_is_measured_without_the_weights(monkeypatch) -> None:
    make = bench.random_model

    def slow(*args: Any) -> Any:
        for _ in range(1000):
            bench.time.perf_counter()
        return make(*args)

    monkeypatch.setattr(bench, "random_model", slow)
    monkeypatch.setattr(bench, "_batch", lambda *_: (1.0, 1.0, 1.0))
    results = run_latency(Setup(preset="tiny", device="cpu"), [1], 4, 4, 1, QUIET)
    assert (results["startup_s"], results["first_request_s"]) == (101, 1)


def test_the_table_shows_the_roofline_of_a_known_card() -> None:
    row = {"batch_size": 4, "input_len": 1024, "output_len": 128, "latency_s": 1.5, "prefill_tokens_per_s": 98765.4}
    row |= {"decode_step_ms": 6.25, "decode_tokens_per_s": 640.0, "roofline": 0.83}
    head = {"what": "latency", "card": "H", "torch": "2", "commit": "c", "model": "m", "dtype": "bfloat16", "note": ""}
    head |= {"ceilings": {"read_gb_per_s": 3000}, "startup_s": 9.0, "first_request_s": 2.0}
    out = io.StringIO()
    print_results(Console(file=out, width=40, soft_wrap=True), head | {"rows": [row]})
    text = out.getvalue()
    (line,) = [line for line in text.splitlines() if "1,024" in line]
    assert line.split() == ["4", "1,024", "128", "1.500", "98,765", "6.25", "640", "83%"]
    assert "ready 9.0 s after the process began" in text


MISTAKES = {
    "neither": (["latency", "--device", "cpu"], "give either a checkpoint or --preset NAME"),
    "both": (["throughput", "somewhere", *TINY], "give either a checkpoint or --preset NAME"),
    "no number": (["latency", *TINY, "--batch-size", "1,x"], "--batch-size '1,x' must be numbers"),
    "no batch": (["latency", *TINY, "--batch-size", "4,0"], "--batch-size 0 must be positive"),
    "preset": (["latency", "--preset", "tinny", "--device", "cpu"], "did you mean 'tiny'"),
    "dtype": (["latency", *TINY, "--dtype", "int3"], "dtype 'int3'"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_told(what: str) -> None:
    arguments, message = MISTAKES[what]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        dsv2(*arguments)
