"""Files are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from dsv2 import files
from dsv2.files import remove_leftovers, replacing_directory, require_replaceable, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def fill(target: Path, text: str, marker: str | None = None) -> None:
    with replacing_directory(target, marker=marker) as tmp:
        (tmp / "file").write_text(text)


# Folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_appears_only_when_the_block_has_ended(tmp_path: Path) -> None:
    with replacing_directory(tmp_path / "out") as tmp:
        (tmp / "file").write_text("new")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "new"


def test_missing_parents_are_made(tmp_path: Path) -> None:
    fill(tmp_path / "a" / "b" / "out", "new")
    assert (tmp_path / "a" / "b" / "out" / "file").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), replacing_directory(tmp_path / "out") as tmp:
        (tmp / "file").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_a_block_that_raises_leaves_the_old_folder(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="halfway"), replacing_directory(tmp_path / "out", marker="file") as tmp:
        (tmp / "file").write_text("half")
        raise ValueError("halfway")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


@pytest.mark.parametrize("swaps", [True, False], ids=["in-one-step", "in-two-steps"])
def test_a_folder_with_the_marker_is_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    if not swaps:
        monkeypatch.setattr(files, "_swap", lambda *_: False)
    fill(tmp_path / "out", "old")
    (tmp_path / "out" / "more").write_text("old")
    fill(tmp_path / "out", "new", marker="fil*")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file"]
    assert (tmp_path / "out" / "file").read_text() == "new"


def test_the_old_folder_comes_back_where_the_second_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "out", "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, "rename failed")
        return rename(self, target)

    monkeypatch.setattr(files, "_swap", lambda *_: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="rename failed"):
        fill(tmp_path / "out", "new", marker="file")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "new"


@pytest.mark.parametrize("marker", [None, "model*.safetensors"])
def test_a_folder_of_something_else_is_refused_untouched(tmp_path: Path, marker: str | None) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("precious")
    with pytest.raises(ValueError, match="out exists already and may not be replaced"):
        fill(tmp_path / "out", "new", marker)
    with pytest.raises(ValueError, match="out exists already and may not be replaced"):
        require_replaceable(tmp_path / "out", marker)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["letter.txt"]


def test_a_file_in_the_folders_place_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ValueError, match="out exists already"):
        fill(tmp_path / "out", "new", marker="*")
    assert (tmp_path / "out").read_text() == "precious"


def test_others_may_read_the_folder(tmp_path: Path) -> None:
    fill(tmp_path / "out", "new")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


# Files ------------------------------------------------------------------------------------------------------------


def test_a_text_is_written_and_replaced(tmp_path: Path) -> None:
    for text in ("old", "new 中"):
        write_text(tmp_path / "a", text)
        assert (tmp_path / "a").read_text(encoding="utf-8") == text
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("failing", ["sync", "replace", "encode"])
def test_a_text_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_text(tmp_path / "a", "old")
    if failing == "sync":
        monkeypatch.setattr(files, "sync", full)
    elif failing == "replace":
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises((OSError, UnicodeEncodeError)):
        write_text(tmp_path / "a", "new \ud800" if failing == "encode" else "new")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_json_reads_back(tmp_path: Path) -> None:
    data = {"a": [1, 2.5, None], "中": "文"}
    write_json(tmp_path / "a.json", data)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == data
    assert "中" in text
    assert text.endswith("}\n")


def test_leftovers_of_a_name_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".step-1.abc.tmp", ".step-2.old.tmp"):
        (tmp_path / name / "nested").mkdir(parents=True)
    for name in (".config.toml.12.tmp", ".notes.12.tmp", "step-3.abc.tmp", ".step-4", "step-1"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path, "step-*")
    remove_leftovers(tmp_path, "config.toml")
    assert names(tmp_path) == [".notes.12.tmp", ".step-4", "step-1", "step-3.abc.tmp"]
