"""`dsv2 data prepare`: parts made by processes; then, of all of them, the shards and a report in one step.

The paper's sections 3.1.1 and 3.1.2 say what goes in and name no method; docs/data.md says what is done here.
The result does not depend on the number of processes or machines. This room does not read text itself.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from dsv2.data.collection import Collection
from dsv2.data.parts import Preparation
from dsv2.files import remove_leftovers, replacing_directory, require_replaceable, write_json

Progress = Callable[[str, int, int], object]
_POLL_S = 0.5


def prepare(preparation: Preparation, out: str | Path, *, workers: int = 1, progress: Progress | None = None) -> dict:
    """Make all parts and, of them, the new folder `out`: `train/`, `held_out/` if asked for, `report.json`.

    Args:
        workers: processes; the result is the same, byte for byte, for any number.
        progress: called with what is being done, and how much of it in all.

    Returns:
        The report.

    Raises:
        ValueError: for an `out` that is not empty, text that cannot be read, nothing left, an impossible mixture.
        OSError: for a process that was killed.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    require_replaceable(out)
    progress = progress or (lambda *_: None)
    make_parts(preparation, workers, progress)
    # All parts are there: what looks unfinished was left by a process that was killed.
    remove_leftovers(preparation.work, "*")
    target = Path(out).resolve()
    remove_leftovers(target.parent, target.name)
    collection = Collection(preparation)
    with replacing_directory(target) as folder:
        collection.write(folder / "train", collection.copies, lambda n, total: progress("train", n, total))
        if collection.held_out.any():
            collection.write(folder / "held_out", collection.held_out, lambda n, total: progress("held out", n, total))
        report = collection.report()
        write_json(folder / "report.json", report)
    return report


def make_parts(preparation: Preparation, workers: int, progress: Progress) -> None:
    """Make the parts that are not done. Raises what a process raised, OSError where one was killed."""
    total = len(preparation.parts)
    preparation.work.mkdir(parents=True, exist_ok=True)
    workers = min(workers, len(preparation.missing()))
    if workers == 1:
        done = itertools.count(1)
        preparation.run_share(on_part=lambda: progress("parts", next(done), total))
    elif workers:
        _run_processes(preparation, workers, lambda: progress("parts", total - len(preparation.missing()), total))


def _run_processes(preparation: Preparation, workers: int, tell: Callable[[], object]) -> None:
    context = multiprocessing.get_context("spawn")
    faults = context.SimpleQueue()
    shares = [(preparation, rank, workers, faults) for rank in range(workers)]
    processes = [context.Process(target=_process, args=share, daemon=True) for share in shares]
    try:
        for process in processes:
            process.start()
        running = [process.sentinel for process in processes]
        while running:
            wait(running, _POLL_S)
            running = [process.sentinel for process in processes if process.exitcode is None]
            if any(process.exitcode for process in processes):
                killed = OSError("a process was killed, perhaps for want of memory; run the same command to go on")
                raise killed if faults.empty() else faults.get()
            tell()
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _process(preparation: Preparation, rank: int, world_size: int, faults: Any) -> None:
    # Threads of its own would only be in the way of the other processes.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        preparation.run_share(rank, world_size)
    except Exception as error:
        faults.put(error)
        raise SystemExit(1) from None


def parse_task(text: str) -> tuple[int, int]:
    """`I/N` as (rank, world size). Raises ValueError unless 0 <= I < N."""
    rank, _, world_size = text.partition("/")
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise ValueError(f"task {text!r}: expected I/N with I in 0..N-1")
    return int(rank), int(world_size)
