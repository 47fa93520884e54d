"""`PretrainConfig`: a training run as a recipe (TOML) describes it, with `--set section.key=value` on top.

The defaults are DeepSeek-V2's published values (section 3.1.2); what a run must decide for itself has no default.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv2.config import schema
from dsv2.config.model import ModelConfig
from dsv2.config.presets import preset
from dsv2.config.schema import require


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where the tokens are. Paths are relative to the working directory."""

    train: str
    """Directory of token shards."""
    tokenizer: str
    """Directory of the tokenizer that made them; copied into every checkpoint."""
    held_out: str | None = None
    """Directory of token shards for bits per byte; None: no evaluation."""
    sequence_length: int = 4096

    def __post_init__(self) -> None:
        require(self.sequence_length > 0, f"data.sequence_length={self.sequence_length} must be positive")


_POSITIVE = (
    *("batch_sequences", "grad_clip"),
    *("log_every", "eval_every", "eval_tokens", "checkpoint_every", "keep_checkpoints"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """AdamW with linear warm-up and step decays (section 3.1.2)."""

    steps: int | None = None
    tokens: int | None = None
    """How long to train: one of the two. Tokens are rounded up to whole batches."""
    batch_sequences: int
    micro_batch_sequences: int | None = None
    """Sequences in memory at once; None: the whole batch."""
    batch_ramp_from: int | None = None
    """Sequences of the first batch; from there to `batch_sequences` over the first `batch_ramp_tokens`."""
    batch_ramp_tokens: int | None = None
    lr_peak: float
    warmup_steps: int = 2000
    decay_at: tuple[float, ...] = (0.6, 0.9)
    """Shares of the run's tokens after which the learning rate is multiplied by `decay_factor`."""
    decay_factor: float = 0.316
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    """Not disclosed in the paper: AdamW's usual value."""
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    expert_balance_alpha: float = 0.003
    """alpha_1 of equation 23; the other two matter where experts are limited to devices (section 2.2.2)."""
    device_balance_alpha: float = 0.05
    """alpha_2 of equation 26."""
    communication_balance_alpha: float = 0.02
    """alpha_3 of equation 29."""
    capacity_factor: float = 1.0
    """Rows that a device takes in a micro-batch, in mean loads (section 2.2.4); inf: nothing is dropped."""
    exempt_share: float = 0.1
    """Share of the sequences whose tokens are never dropped."""
    seed: int = 0
    device: str = "auto"
    log_every: int = 10
    eval_every: int = 1000
    eval_tokens: int = 65536
    """Held-out tokens a source in evaluations along the way; the last one takes all."""
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            require(value > 0, f"train.{name}={value} must be positive")
        for name in ("warmup_steps", "weight_decay", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}={value} must not be negative")
        for name in ("expert_balance_alpha", "device_balance_alpha", "communication_balance_alpha"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"train.{name}={value} must be finite and not negative")
        for name in ("lr_peak", "decay_factor", "adam_eps"):
            value = getattr(self, name)
            # With adam_eps 0 an expert that no token chose yet would become 0/0.
            require(0 < value < math.inf, f"train.{name}={value} must be positive and finite")
        # Infinite is a value: TOML has no null.
        require(self.capacity_factor > 0, f"train.capacity_factor={self.capacity_factor} must be positive")
        require(0 <= self.exempt_share <= 1, f"train.exempt_share={self.exempt_share} must be in [0, 1]")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}={value} must be in [0, 1)")
        self._check_length()
        self._check_batches()
        require(
            list(self.decay_at) == sorted(self.decay_at) and all(0 < d <= 1 for d in self.decay_at),
            f"train.decay_at={list(self.decay_at)} must rise within (0, 1]",
        )

    def _check_length(self) -> None:
        steps, tokens = self.steps, self.tokens
        require((steps is None) != (tokens is None), f"train.steps={steps} and train.tokens={tokens}: give one of them")
        require(steps is None or steps > 0, f"train.steps={steps} must be positive")
        require(tokens is None or tokens > 0, f"train.tokens={tokens} must be positive")

    def _check_batches(self) -> None:
        micro, whole = self.micro_batch_sequences, self.batch_sequences
        first, tokens = self.batch_ramp_from, self.batch_ramp_tokens
        require(
            micro is None or (micro > 0 and whole % micro == 0),
            f"train.batch_sequences={whole} must be a multiple of micro_batch_sequences={micro}",
        )
        require(
            (first is None) == (tokens is None),
            f"train.batch_ramp_from={first} and train.batch_ramp_tokens={tokens}: give both or none",
        )
        if first is not None and tokens is not None:
            require(tokens > 0, f"train.batch_ramp_tokens={tokens} must be positive")
            require(micro is not None, "train.batch_ramp_from needs micro_batch_sequences: batches grow by whole ones")
            require(
                0 < first <= whole and first % (micro or 1) == 0,
                f"train.batch_ramp_from={first} must be a multiple of micro_batch_sequences={micro}, "
                f"at most batch_sequences={whole}",
            )

    @property
    def balance_alphas(self) -> tuple[float, float, float]:
        """Weights of what `model.balance.balance_losses` gives."""
        return self.expert_balance_alpha, self.device_balance_alpha, self.communication_balance_alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """Everything that decides a pretraining run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        if moe := self.model.moe:
            require(
                moe.device_limit[0] == moe.num_groups,
                f"model.moe.num_groups={moe.num_groups} needs model.moe.router='group_limited_greedy', got "
                f"{moe.router!r}: groups are devices, whose balance and capacity it would not heed",
            )

    def to_dict(self) -> dict[str, Any]:
        return schema.to_dict(self)


def load_pretrain(recipe: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a recipe. Raises ValueError for a missing file, invalid TOML, and unknown, missing or mistyped keys."""
    return pretrain_from_dict(read_recipe(recipe, overrides), str(recipe))


def read_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of a TOML file with `overrides` laid over them. Raises ValueError for a missing file and bad TOML."""
    path = Path(recipe)
    if not path.is_file():
        raise ValueError(f"no recipe at {path}")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    for text in overrides:
        data = schema.merge(data, parse_override(text))
    return data


def pretrain_from_dict(data: dict[str, Any], where: str = "recipe") -> PretrainConfig:
    """`model.preset` names a base over which the other keys of `model` are laid."""
    data = dict(data)
    model = data.get("model")
    if isinstance(model, dict) and "preset" in model:
        model = dict(model)
        name = model.pop("preset")
        require(isinstance(name, str), f"{where}.model.preset must be str, got {name!r}")
        data["model"] = schema.merge(preset(name).to_dict(), model)
    return schema.from_dict(PretrainConfig, data, where)


def parse_override(text: str) -> dict[str, Any]:
    """`section.key=value` as a nested table; the value is TOML, or a string where it is not."""
    key, sep, value = text.partition("=")
    if not sep or not key.strip():
        raise ValueError(f"--set {text!r} must read section.key=value")
    try:
        parsed: Any = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return parsed


def to_toml(data: dict[str, Any], prefix: str = "") -> str:
    """Nested tables of numbers, strings, booleans and lists as TOML (the standard library only reads it)."""
    scalars = {k: v for k, v in data.items() if not isinstance(v, dict)}
    lines = [f"[{prefix}]"] if prefix and scalars else []
    lines += [f"{k} = {_toml_value(v)}" for k, v in scalars.items()]
    blocks = ["\n".join(lines)] if lines else []
    blocks += [
        to_toml(v, f"{prefix}.{k}" if prefix else k).rstrip("\n") for k, v in data.items() if isinstance(v, dict)
    ]
    return "\n\n".join(blocks) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's too, and TOML wants DEL escaped as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    return repr(value)
