"""Files that are complete or absent: temporary names, fsync, rename. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing_directory(path: str | Path, *, marker: str | None = None) -> Iterator[Path]:
    """A temporary sibling that takes the place of `path` when the block ends well, and vanishes when it does not.

    An existing directory is replaced only if it is empty or holds a file that matches the pattern `marker`; ValueError
    otherwise. Where the system can swap two paths in one step, `path` holds the old or the new one at every moment.
    """
    target = require_replaceable(path, marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        tmp.chmod(0o755)
        yield tmp
        sync(tmp)
        if not target.exists():
            tmp.rename(target)
        elif not _swap(tmp, target):
            _replace_in_two_steps(tmp, target)
        sync(target.parent)
    finally:
        # After a swap this is what was replaced.
        shutil.rmtree(tmp, ignore_errors=True)


def _swap(a: Path, b: Path) -> bool:
    """Exchange two paths in one step. False, with nothing done, where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    working_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    return renameat2(working_directory, os.fsencode(a), working_directory, os.fsencode(b), exchange) == 0


def _replace_in_two_steps(new: Path, target: Path) -> None:
    old = new.with_suffix(".old")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def require_replaceable(path: str | Path, marker: str | None = None) -> Path:
    """The absolute path, once it is clear that `replacing_directory` may have it. ValueError otherwise."""
    target = Path(path).resolve()
    if target.exists() and not _may_replace(target, marker):
        also = f", or one that holds {marker}" if marker else ""
        raise ValueError(f"{target} exists already and may not be replaced: expected a new or an empty folder{also}")
    return target


def _may_replace(target: Path, marker: str | None) -> bool:
    if not target.is_dir():
        return False
    return not any(target.iterdir()) or (marker is not None and any(target.glob(marker)))


def write_text(file: Path, text: str) -> None:
    """Replace `file` in one rename; the old one stays if this fails."""
    tmp = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        tmp.write_text(text, encoding="utf-8")
        sync(tmp)
        tmp.replace(file)
    finally:
        tmp.unlink(missing_ok=True)


def remove_leftovers(directory: Path, name: str) -> None:
    """Delete what processes that were killed left of the files and folders called `name`, a pattern."""
    for path in directory.glob(f".{name}.*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_json(file: Path, data: Any) -> None:
    write_text(file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Reach the disk before anything is renamed, so that a lost power supply leaves old or new, never half."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
