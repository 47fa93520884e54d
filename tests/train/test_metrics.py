"""What a run writes down, for people and for programs."""

from __future__ import annotations

import io
from pathlib import Path

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
