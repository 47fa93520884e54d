"""`dsv2 describe`: what an architecture costs, by closed form, and its parameters' shapes from the meta device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dsv2.config import PRESETS, ModelConfig
from dsv2.config.counts import describe


def find_config(name: str) -> ModelConfig:
    """A preset by name, or the configuration of a checkpoint directory or `config.json`.

    A folder that is called as a preset is (`demo`, after the demo) must be written as a path: `./demo`.
    """
    if name in PRESETS:
        return ModelConfig.preset(name)
    if Path(name).exists():
        return ModelConfig.from_hf(name)
    if "/" in name or name.endswith(".json"):
        raise ValueError(f"no checkpoint at {name}; presets: {', '.join(PRESETS)}")
    return ModelConfig.preset(name)


def module_shapes(cfg: ModelConfig) -> list[dict[str, Any]]:
    """Every parameter, layers of equal shapes together: name, shape, how often it occurs, parameters in all."""
    import torch

    from dsv2.model import Transformer

    with torch.device("meta"):
        model = Transformer(cfg)
    rows: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for name, p in model.named_parameters():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        key = f"model.layers.*.{found[2]}" if found else name
        rows.setdefault((key, tuple(p.shape)), []).append(int(found[1]) if found else -1)
    return [
        {
            "name": name.replace("*", _span(layers)),
            "shape": list(shape),
            "count": len(layers),
            "parameters": len(layers) * torch.Size(shape).numel(),
        }
        for (name, shape), layers in rows.items()
    ]


def _span(layers: list[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{{{layers[0]}-{layers[-1]}}}"


def print_description(console: Console, name: str, cfg: ModelConfig, context_length: int) -> None:
    """The figures as a table, for people."""
    d = describe(cfg, context_length)
    table = Table(title=f"{name} ({cfg.model_type})", show_header=False, title_justify="left")
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("parameters", f"{d['parameters']:,}")
    table.add_row("active a token", f"{d['active_parameters']:,}")
    table.add_row("active a token, without input embedding", f"{d['active_parameters_without_embedding']:,}")
    table.add_row("KV cache elements a token", f"{d['kv_elements_per_token']:,}")
    table.add_row("KV cache bytes a token, 16 bit", f"{d['kv_bytes_per_token']:,}")
    table.add_row(f"training GFLOP a token at {context_length:,}", f"{d['flops_per_token'] / 1e9:,.2f}")
    table.add_row(f"forward GFLOP a token at {context_length:,}", f"{d['forward_flops_per_token'] / 1e9:,.2f}")
    console.print(table)


def print_modules(console: Console, cfg: ModelConfig) -> None:
    """The shape listing, for people."""
    table = Table(title="parameters", title_justify="left")
    for column, justify in (("name", "left"), ("shape", "right"), ("count", "right"), ("parameters", "right")):
        table.add_column(column, justify=justify, no_wrap=column == "name")  # type: ignore[arg-type]
    for row in module_shapes(cfg):
        shape = " x ".join(f"{n:,}" for n in row["shape"])
        table.add_row(row["name"], shape, str(row["count"]), f"{row['parameters']:,}")
    console.print(table)
