"""What a run tells: `metrics.jsonl`, TensorBoard events, and a progress bar or plain lines."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsv2.files import write_text

METRICS_FILE = "metrics.jsonl"
_LINE_EVERY_S = 15.0


class MetricsLog:
    """Appends records to `metrics.jsonl` and their scalars to TensorBoard; drops what a resume will repeat."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self.path = run_dir / METRICS_FILE
        kept = [r for r in read_metrics(run_dir) if r["step"] <= start_step] if start_step else []
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(run_dir, start_step)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """One line `{"step": step, ...}`; numbers, also nested, become TensorBoard scalars `outer/inner`."""
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _scalars(record):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run, oldest first; a last line cut short by a kill is left out."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                records.append(record)
    return records


def _tensorboard(run_dir: Path, start_step: int) -> Any | None:
    """A writer, or None where tensorboard is not installed (it is no dependency of the core)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else 0)


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{key}", float(value)


class RunProgress:
    """A bar with tokens/s and time left on a terminal; elsewhere a line now and then."""

    def __init__(self, console: Console, *, label: str, num_steps: int, start_step: int) -> None:
        self.console, self.label, self.num_steps = console, label, num_steps
        self._first, self._began, self._last_line = start_step, time.monotonic(), 0.0
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, *times, console=console)
            self._task = self._bar.add_task(label, total=num_steps, completed=start_step, note="")
            self._bar.start()

    def update(self, step: int, note: str) -> None:
        """`step` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= _LINE_EVERY_S or step == self.num_steps:
            self._last_line = now
            left_s = (now - self._began) / max(step - self._first, 1) * (self.num_steps - step)
            self.console.print(f"{self.label} {step}/{self.num_steps}  {note}  {left_s:.0f}s left", highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
