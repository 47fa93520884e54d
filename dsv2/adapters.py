"""LoRA adapters in PEFT's files, merged into a model's own parameters: W + scale * B A (Hu et al. 2021, section 4.1).

Merged in place, they cost nothing per token, and whatever reads the parameters where they are (joined projections, the
absorbed form, captured graphs) goes on as it is. One adapter at a time; when an engine may change is the engine's.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2.config.lora import LoRAConfig
from dsv2.model import Transformer
from dsv2.weights import EMBEDDING, Slot, check_names, check_tensor, name_table, open_tensors, resolve, tensors_of

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
# What PEFT wraps a model in.
PREFIX = "base_model.model."
# Matrices that PEFT also writes as a whole, unasked, where it adapts them or they were resized.
_VOCABULARY = (EMBEDDING, "lm_head.weight")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of a weight: `value`, or itself where that is None, plus scale * left @ right where there are such.

    left [rows, r] and right [r, columns], on the CPU.
    """

    value: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    scale: float = 0.0

    def of(self, weight: Tensor) -> Tensor:
        """The new weight, in fp32 or wider, not rounded to the weight's dtype yet."""
        wide = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        new = (weight if self.value is None else self.value).to(**wide)
        if self.left is None or self.right is None:
            return new
        return torch.addmm(new, self.left.to(**wide), self.right.to(**wide), alpha=self.scale)


@dataclass(frozen=True, slots=True)
class Adapter:
    """Changes by checkpoint name, all of which fit the model that the adapter was loaded for."""

    changes: Mapping[str, Change]

    def merge(self, model: Transformer) -> None:
        """Change the weights in place, each rounded once to the model's dtype."""
        weights = tensors_of(model)
        for name, change in self.changes.items():
            weights[name].copy_(change.of(weights[name]))

    def originals(self, model: Transformer) -> dict[str, Tensor]:
        """Copies on the CPU of the weights that `merge` changes, for `restore`."""
        weights = tensors_of(model)
        return {name: weights[name].to("cpu", copy=True) for name in self.changes}


def restore(model: Transformer, originals: Mapping[str, Tensor]) -> None:
    """Write weights back in place, bit for bit. `originals`: by checkpoint name."""
    weights = tensors_of(model)
    for name, original in originals.items():
        weights[name].copy_(original)


def merge_adapter(path: str | Path, model: Transformer) -> None:
    """Load an adapter and merge it for good. Raises ValueError as `load_adapter` does, with nothing changed."""
    load_adapter(path, model).merge(model)


def load_adapter(path: str | Path, model: Transformer) -> Adapter:
    """Read a LoRA adapter as PEFT writes it, from a directory or the hub, and check it against a model.

    Any matrix of the checkpoint may be adapted, under its name there (`mlp.experts.3.gate_proj`), and any module be
    replaced as a whole (`modules_to_save`). The model is not changed.

    Raises ValueError for what `LoRAConfig.from_peft` refuses, for a file that is absent, truncated or corrupt, for
    missing, extra or misshapen tensors, and for an embedding that the output projection shares: PEFT adapts the one
    without the other.
    """
    directory = resolve(path)
    config = LoRAConfig.from_peft(directory / CONFIG_FILE)
    file = directory / TENSOR_FILE
    if not file.is_file():
        raise ValueError(f"{directory} has no {TENSOR_FILE}")
    table = name_table(model.cfg, model)
    with open_tensors(file) as f:
        found = dict.fromkeys(f.keys())
        pairs = _pairs(config, table, found)
        values = {name: _value(name, name in pairs) for name in table if config.saves(name) or name in _VOCABULARY}
        expected = {name: shape for pair in pairs.values() for name, shape in pair.items()}
        expected |= {values[name]: slot.shape for name, slot in table.items() if config.saves(name)}
        allowed = {value: table[name].shape for name, value in values.items()} | expected
        check_names(directory, [n for n in expected if n not in found], [n for n in found if n not in allowed])
        for name in found:
            check_tensor(f.get_slice(name), name, allowed[name], file)
        values = {name: value for name, value in values.items() if value in found}
        changes = {name: _change(f, config, name, values.get(name), pairs.get(name)) for name in pairs | values}
    if not changes:
        raise ValueError(f"{directory} changes nothing: target_modules={config.target_modules!r} name no module")
    if model.cfg.tie_embeddings and EMBEDDING in changes:
        raise ValueError(f"{directory} changes {EMBEDDING}, which is the output projection of this model too")
    return Adapter(changes)


def _pairs(config: LoRAConfig, table: Mapping[str, Slot], found: Container[str]) -> dict[str, Shapes]:
    """By checkpoint name of every matrix that is adapted: A and B by their names in the file."""
    pairs = {
        name: _pair(name, slot.shape, config.rank(_module(name)))
        for name, slot in table.items()
        if len(slot.shape) == 2 and config.targets(_module(name))
    }
    # transformers 5 keeps routed experts as one parameter, to which PEFT is blind: all of them may be left alone.
    routed = {name for name in pairs if ".experts." in name}
    if any(tensor in found for name in routed for tensor in pairs[name]):
        return pairs
    return {name: pair for name, pair in pairs.items() if name not in routed}


def _pair(name: str, shape: tuple[int, ...], rank: int) -> Shapes:
    module, (rows, columns) = PREFIX + _module(name), shape
    if name == EMBEDDING:  # its matrix is that of a linear layer transposed
        return {f"{module}.lora_embedding_A": (rank, rows), f"{module}.lora_embedding_B": (columns, rank)}
    return {f"{module}.lora_A.weight": (rank, columns), f"{module}.lora_B.weight": (rows, rank)}


def _value(name: str, is_adapted: bool) -> str:
    """What a weight as a whole is called in the file."""
    return f"{PREFIX}{_module(name)}.base_layer.weight" if is_adapted else PREFIX + name


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _change(f: Any, config: LoRAConfig, name: str, value: str | None, pair: Iterable[str] | None) -> Change:
    whole = None if value is None else f.get_tensor(value)
    if pair is None:
        return Change(whole)
    a, b = map(f.get_tensor, pair)
    left, right = (a.T, b.T) if name == EMBEDDING else (b, a)
    return Change(whole, left, right, config.scale(_module(name)))
