"""`LoRAConfig`: which weights an adapter changes, by what rank and scale. PEFT's fields, and its meaning of them.

Reads `adapter_config.json`, and refuses what makes of an adapter anything but W + scale * B A. Modules are names here;
tensors are in `dsv2.adapters`. Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dsv2.config.schema import from_dict, read_object, require

T = TypeVar("T")

# What else an adapter may say, and the values that change nothing here. Initialisations that are missing (pissa, olora,
# corda, loftq) change the base model too, unless PEFT converted the adapter, and then it says `true`.
_ONLY: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
# About how an adapter came to be.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAConfig:
    """Modules are named by path (`model.layers.0.self_attn.q_proj`). Raises ValueError outside the ranges.

    Lists of modules hold the ends of their paths, or are one regular expression of whole paths. Patterns' keys are
    regular expressions of a path, or of its end after a dot; the first that fits counts.
    """

    r: int
    lora_alpha: float
    target_modules: str | tuple[str, ...]
    """Modules whose matrix gets a product of two of rank `r`."""
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    """Ends of the paths of modules that are replaced as a whole."""
    layers_to_transform: int | tuple[int, ...] | None = None
    """Of targets that are not named by their whole path, only those in layers of these numbers."""
    layers_pattern: str | tuple[str, ...] = ()
    """What comes before a layer's number; none: anything, and the last number of a path counts, be it an expert's."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    """Whether the scale is alpha / sqrt(r) rather than alpha / r."""

    def __post_init__(self) -> None:
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            require(rank > 0, f"lora: rank {name}={rank} must be positive")
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            require(math.isfinite(alpha), f"lora: alpha {name}={alpha} must be finite")
        patterns = [each for each in (self.target_modules, self.exclude_modules) if isinstance(each, str)]
        for pattern in (*patterns, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"lora: {pattern!r} is no regular expression: {error}") from None

    @classmethod
    def from_peft(cls, file: Path) -> LoRAConfig:
        """Read an `adapter_config.json`. Null counts as absent.

        Raises ValueError for a missing file, invalid JSON, another kind of adapter, and every setting that is not
        implemented, also of later versions of PEFT: an unknown key may be off (false, empty), but not on.
        """
        known = {each.name for each in dataclasses.fields(cls)}
        data = {key: value for key, value in read_object(file).items() if value is not None}
        require("peft_type" in data, f"{file.name}: missing key 'peft_type'")
        for key, value in data.items():
            if key in _ONLY:
                only = " or ".join(map(repr, _ONLY[key]))
                require(value in _ONLY[key], f"{file.name}: {key}={value!r} is not supported, only {only}")
            elif key not in known and key not in _WITHOUT_EFFECT:
                require(not value, f"{file.name}: {key}={value!r} is not supported")
        return from_dict(cls, {key: value for key, value in data.items() if key in known}, file.name)

    def targets(self, module: str) -> bool:
        """Whether the module's matrix gets a product."""
        if _names(self.exclude_modules, module) or not _names(self.target_modules, module):
            return False
        layers = self.layers_to_transform
        if layers in (None, ()) or isinstance(self.target_modules, str) or module in self.target_modules:
            return True
        return self._layer_of(module) in (layers if isinstance(layers, tuple) else (layers,))

    def _layer_of(self, module: str) -> int | None:
        patterns = self.layers_pattern or "[^.]*"
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            if found := re.match(rf".*\.{pattern}\.(\d+)\.", module):
                return int(found[1])
        return None

    def saves(self, tensor: str) -> bool:
        """Whether the tensor (`model.norm.weight`) is of a module that is replaced as a whole."""
        return any(f"{end}." in tensor for end in self.modules_to_save)

    def rank(self, module: str) -> int:
        return _first(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What the product is multiplied by."""
        rank = self.rank(module)
        return _first(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _names(modules: str | tuple[str, ...], module: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(module == end or module.endswith(f".{end}") for end in modules)


def _first(patterns: Mapping[str, T], module: str, default: T) -> T:
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, default)
