"""A training checkpoint is a model that loads anywhere, exact state beside it, and one clear error when damaged."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import dsv2
from dsv2.model import Transformer
from dsv2.text import Tokenizer
from dsv2.train.checkpoint import OPTIMIZER_FILE, STATE_FILE, list_checkpoints, load_checkpoint, save_checkpoint
from dsv2.train.optim import adamw, state_tensors
from dsv2.train.pretrain import Pretraining
from tests.train.tiny import QUIET, STEPS, recipe


@pytest.fixture
def checkpoint(finished: Path, tmp_path: Path) -> Path:
    """A copy of the last checkpoint, free to be damaged."""
    return Path(shutil.copytree(finished / "checkpoints" / f"step-{STEPS:08d}", tmp_path / "step-00000012"))


@pytest.fixture
def trained(corpus: Path, finished: Path) -> Pretraining:
    """The finished run in memory, resumed from its last checkpoint."""
    return Pretraining(recipe(corpus), finished, QUIET)


def save(run: Pretraining, directory: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(
        directory,
        step=step,
        model=run.model,
        optimizer=run.optimizer,
        tokenizer=run.tokenizer,
        loader=run.loader.state(),
        meter=run.meter.state(),
        keep=keep,
    )


def load(run: Pretraining, path: Path) -> dict[str, Any]:
    return load_checkpoint(path, model=run.model, optimizer=run.optimizer)


# Whole ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_model_and_a_tokenizer(checkpoint: Path, trained: Pretraining) -> None:
    model = dsv2.load(checkpoint)
    assert model.cfg == trained.model.cfg
    for name, p in model.named_parameters():
        assert torch.equal(p, dict(trained.model.named_parameters())[name]), name
    assert Tokenizer.load(checkpoint).fingerprint == trained.tokenizer.fingerprint


def test_what_is_saved_is_what_is_loaded(trained: Pretraining, tmp_path: Path) -> None:
    path = save(trained, tmp_path, 5)
    model = Transformer(trained.model.cfg)
    optimizer = adamw(model, trained.cfg.train)
    state = load_checkpoint(path, model=model, optimizer=optimizer)
    assert state == {"step": 5, "loader": trained.loader.state(), "meter": trained.meter.state()}
    expected = state_tensors(trained.model, trained.optimizer)
    for name, tensor in state_tensors(model, optimizer).items():
        assert torch.equal(tensor, expected[name]), name
    for name, p in model.named_parameters():
        assert torch.equal(p, dict(trained.model.named_parameters())[name]), name


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_are_kept(trained: Pretraining, tmp_path: Path, keep: int) -> None:
    for step in (2, 30, 100, 1000):
        save(trained, tmp_path, step, keep)
    expected = [f"step-{step:08d}" for step in (2, 30, 100, 1000)][-keep:]
    assert [p.name for p in list_checkpoints(tmp_path)] == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == expected


def test_a_step_that_was_saved_before_is_replaced(trained: Pretraining, tmp_path: Path) -> None:
    save(trained, tmp_path, 5)
    with torch.no_grad():
        trained.model.lm_head.weight.zero_()
    assert not dsv2.load(save(trained, tmp_path, 5)).lm_head.weight.any()


def test_folders_without_state_or_of_other_names_are_no_checkpoints(checkpoint: Path) -> None:
    directory = checkpoint.parent
    (directory / "step-00000013").mkdir()
    for name in ("step-14", ".step-00000015.abc.tmp", "best"):
        shutil.copytree(checkpoint, directory / name)
    assert list_checkpoints(directory) == [checkpoint]


def test_killed_while_deleting_an_old_checkpoint_leaves_no_half_of_one(
    trained: Pretraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **options: Any) -> None:
        if path.name.startswith(".step-00000001"):
            (path / "config.json").unlink()
            raise KeyboardInterrupt
        whole(path, **options)

    whole = shutil.rmtree
    save(trained, tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(trained, tmp_path, 2, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002"]
    assert load(trained, tmp_path / "step-00000002")["step"] == 2


# Full disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
@pytest.mark.parametrize("file", ["model.safetensors", OPTIMIZER_FILE])
def test_a_full_disk_is_an_oserror_and_changes_nothing(
    trained: Pretraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, error: Exception
) -> None:
    def full(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        save_file(tensors, path, **options)
        if path.name == file:
            raise error

    before = save(trained, tmp_path, 1, keep=1)
    monkeypatch.setattr("dsv2.weights.save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(trained, tmp_path, 2, keep=1)
    assert list(tmp_path.iterdir()) == [before]
    assert load(trained, before)["step"] == 1


# Damaged ----------------------------------------------------------------------------------------------------------


def halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)


def misshapen(file: Path) -> None:
    save_file({name: t.flatten()[:1] for name, t in load_file(file).items()}, file)


def without_key(file: Path) -> None:
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "loader"}))


def garbled(file: Path) -> None:
    file.write_bytes(b"\xff\xfe garbage")


@pytest.mark.parametrize("damage", [halved, without_tensor, misshapen, garbled, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", OPTIMIZER_FILE])
def test_damaged_tensors_are_named(
    trained: Pretraining, checkpoint: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(checkpoint / file)
    with pytest.raises(ValueError, match=r"safetensors|tensors do not match|optimizer state|has shape") as raised:
        load(trained, checkpoint)
    assert type(raised.value) is ValueError
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", [halved, without_key, garbled, Path.unlink, lambda file: file.write_text("[]")])
def test_damaged_state_is_named(trained: Pretraining, checkpoint: Path, damage: Callable[[Path], None]) -> None:
    damage(checkpoint / STATE_FILE)
    with pytest.raises(ValueError, match=STATE_FILE) as raised:
        load(trained, checkpoint)
    assert type(raised.value) is ValueError


def test_a_run_whose_latest_checkpoint_is_damaged_says_so(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    halved(list_checkpoints(run_dir / "checkpoints")[-1] / OPTIMIZER_FILE)
    with pytest.raises(ValueError, match=r"step-00000012/optimizer\.safetensors is truncated, corrupt or missing"):
        Pretraining(recipe(corpus), run_dir, QUIET)
