"""LoRA adapters in PEFT's files, written without our code, and what they must make of a checkpoint, in float64."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv2 import weights
from dsv2.model import Transformer

PREFIX = "base_model.model."
EMBED = "model.embed_tokens"
RANK, ALPHA = 4, 6

# As peft 0.18 writes it.
CONFIG = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "deepseek-ai/DeepSeek-V2-Lite",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": ALPHA,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.18.0",
    "qalora_group_size": 16,
    "r": RANK,
    "rank_pattern": {},
    "revision": None,
    "target_modules": [],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def matrices(model: Transformer) -> dict[str, tuple[int, int]]:
    """Rows and columns of every matrix, by the name of its module in the checkpoint."""
    table = weights.name_table(model.cfg, model)
    shapes = {name.removesuffix(".weight"): slot.shape for name, slot in table.items() if len(slot.shape) == 2}
    return {module: (shape[0], shape[1]) for module, shape in shapes.items()}


def random_pair(module: str, shape: tuple[int, int], rank: int, seed: int) -> dict[str, Tensor]:
    """A and B of a module under PEFT's names; in A @ x columns are inputs, of an embedding they are token ids."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[::-1] if module == EMBED else shape
    a, b = (torch.randn(size, generator=generator) * 0.2 for size in ((rank, columns), (rows, rank)))
    name = PREFIX + module
    if module == EMBED:
        return {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def write_adapter(
    path: Path, model: Transformer, modules: Iterable[str] | None = None, seed: int = 0, **config: Any
) -> Path:
    """A random adapter of these modules of the checkpoint, or of all; `config` is laid over CONFIG."""
    shapes = matrices(model)
    modules = list(shapes if modules is None else modules)
    tensors: dict[str, Tensor] = {}
    for i, module in enumerate(modules):
        tensors |= random_pair(module, shapes[module], RANK, 1000 * seed + i)
    path.mkdir()
    write_tensors(path, tensors)
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | {"target_modules": modules} | config))
    return path


def write_tensors(adapter: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, adapter / "adapter_model.safetensors")


def read_tensors(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def edited(weight: Tensor, tensors: dict[str, Tensor], module: str, scale: float = ALPHA / RANK) -> Tensor:
    """W + scale B A in float64."""
    name = PREFIX + module
    if module == EMBED:
        a, b = (tensors[f"{name}.lora_embedding_{part}"].double() for part in "AB")
        return weight.double() + scale * (b @ a).T
    a, b = (tensors[f"{name}.lora_{part}.weight"].double() for part in "AB")
    return weight.double() + scale * (b @ a)


def edited_model(model: Transformer, adapter: Path, tmp: Path) -> Transformer:
    """Another model: the checkpoint of this one, its tensors edited by name."""
    weights.save(model, tmp)
    file, tensors = tmp / "model.safetensors", read_tensors(adapter)
    checkpoint = load_file(file)
    for module in json.loads((adapter / "adapter_config.json").read_text())["target_modules"]:
        name = f"{module}.weight"
        checkpoint[name] = edited(checkpoint[name], tensors, module).to(checkpoint[name].dtype).contiguous()
    save_file(checkpoint, file, metadata={"format": "pt"})
    return weights.load(tmp)


def state(model: Transformer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
