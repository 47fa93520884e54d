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
from safetensors.torch import load_file, save_file

from dsv2.files import replacing_directory, sync, write_json
from dsv2.model import Transformer
from dsv2.text import Tokenizer
from dsv2.train import optim
from dsv2.weights import load_into, write_model

STATE_FILE = "trainer.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_STEP = re.compile(r"step-(\d{8})")


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    model: Transformer,
    optimizer: torch.optim.AdamW,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `directory/step-N` and delete all but the newest `keep`. OSError: nothing changed."""
    target = directory / f"step-{step:08d}"
    with replacing_directory(target, marker=STATE_FILE) as tmp:
        write_model(model, tmp)
        tokenizer.save(tmp)
        tensors = {k: v.detach().cpu().contiguous() for k, v in optim.state_tensors(model, optimizer).items()}
        save_file(tensors, tmp / OPTIMIZER_FILE)
        sync(tmp / OPTIMIZER_FILE)
        write_json(tmp / STATE_FILE, {"step": step, **state})
    for old in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
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
    return json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
