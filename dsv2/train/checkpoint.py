"""Training checkpoints: an official-layout model directory plus what an exact resume needs.

`checkpoints/step-00001000/` loads anywhere a model directory does. It appears by one rename when complete, so a killed
process or a full disk leaves the previous one as the latest.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dsv2.files import replacing_directory, write_json
from dsv2.model import Transformer
from dsv2.text import Tokenizer
from dsv2.train import optim
from dsv2.weights import load_into, write_model, write_tensors

STATE_FILE = "trainer.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_STEP = re.compile(r"step-(\d{8})")
_STATE_KEYS = frozenset({"step", "loader", "meter"})


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    model: Transformer,
    optimizer: torch.optim.AdamW,
    tokenizer: Tokenizer,
    loader: dict[str, Any],
    meter: dict[str, Any],
    keep: int,
) -> Path:
    """Write `directory/step-N` and delete all but the newest `keep`. OSError: nothing changed.

    `loader` and `meter` are the states of the data and of the statistics that are not logged yet, for JSON.
    """
    target = directory / f"step-{step:08d}"
    with replacing_directory(target, marker=STATE_FILE) as tmp:
        write_model(model, tmp)
        tokenizer.save(tmp)
        tensors = {k: v.detach().cpu().contiguous() for k, v in optim.state_tensors(model, optimizer).items()}
        write_tensors(tensors, tmp / OPTIMIZER_FILE)
        write_json(tmp / STATE_FILE, {"step": step, "loader": loader, "meter": meter})
    for old in list_checkpoints(directory)[:-keep]:
        # Killed halfway, this leaves a name that the next start removes, not a checkpoint without its files.
        shutil.rmtree(old.rename(directory / f".{old.name}.old.tmp"))
    return target


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in directory.glob("step-*") if _STEP.fullmatch(p.name) and (p / STATE_FILE).is_file()]
    return sorted(found)


def load_checkpoint(path: Path, *, model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Fill model and optimizer in place; return the saved state. Raises ValueError for a damaged checkpoint."""
    load_into(model, path)
    try:
        tensors = load_file(path / OPTIMIZER_FILE)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path / OPTIMIZER_FILE} is truncated, corrupt or missing: {error}") from error
    optim.load_state_tensors(model, optimizer, tensors)
    return _read_state(path / STATE_FILE)


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is truncated, corrupt or missing: {error}") from error
    if not isinstance(state, dict) or state.keys() != _STATE_KEYS:
        raise ValueError(f"{file} must hold {', '.join(sorted(_STATE_KEYS))}")
    return state
