"""What a run writes down, for people and for programs."""

from __future__ import annotations

import io
import itertools
import types
from pathlib import Path

import pytest
from rich.console import Console

from dsv2.train.metrics import MetricsLog, RunProgress, read_metrics


def test_a_resumed_log_drops_what_will_be_repeated(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.close()
    log = MetricsLog(tmp_path, 2)
    log.write(3, {"loss": 30.0})
    log.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_tensorboard_reads_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0)
    log.write(5, {"loss": 2.5, "held_out_bits_per_byte": {"english": 1.5}})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(5, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("held_out_bits_per_byte/english")] == [(5, 1.5)]


def test_off_a_terminal_progress_is_lines_with_the_time_left() -> None:
    console = Console(record=True, force_terminal=False, width=100, file=io.StringIO())
    progress = RunProgress(console, label="pretrain", num_steps=10, start_step=0)
    progress.update(5, "loss 1.0")
    progress.update(10, "loss 0.5")
    progress.close()
    text = console.export_text()
    assert "pretrain 5/10  loss 1.0" in text
    assert "pretrain 10/10  loss 0.5  0s left" in text


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard orders its files by the second they were begun in: here every look at the clock is another one."""
    seconds = itertools.count(1_700_000_000)
    clock = types.SimpleNamespace(time=lambda: float(next(seconds)))
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time", clock)


@pytest.mark.usefixtures("later")
def test_tensorboard_forgets_what_a_resume_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, value in ((0, 1.0), (2, 2.0)):
        log = MetricsLog(tmp_path, start)
        for step in range(start + 1, 5):
            log.write(step, {"loss": value})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


@pytest.mark.usefixtures("later")
def test_a_run_begun_again_keeps_nothing_of_the_first_attempt(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for value in (1.0, 2.0):
        log = MetricsLog(tmp_path, 0)
        log.write(0, {"loss": value})
        log.write(1, {"loss": value})
        log.close()
    assert [r["loss"] for r in read_metrics(tmp_path)] == [2.0, 2.0]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 2.0), (1, 2.0)]


def test_a_log_cut_short_is_read_up_to_the_cut(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 1.0})
    log.write(2, {"loss": 2.0})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    for cut in range(text.index("\n") + 1, len(text) - 1):
        (tmp_path / "metrics.jsonl").write_text(text[:cut])
        assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def test_without_a_log_there_are_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "absent") == []


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 1.0})
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
    log.close()


def test_on_a_terminal_progress_is_a_bar_that_starts_where_the_run_does() -> None:
    console = Console(force_terminal=True, width=120, file=io.StringIO(), record=True)
    progress = RunProgress(console, label="pretrain", num_steps=10, start_step=4)
    progress.update(7, "loss 1.0")
    progress.close()
    text = console.export_text()
    assert "7/10" in text
    assert "loss 1.0" in text
