"""Checkpoints in the official Hugging Face layout: names, shards, index; streamed both ways.

`load` reads one tensor at a time into a model whose memory was laid out once; `save` writes one shard at a time into
a temporary folder that is renamed when complete. Knows names and files, not training state.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv2.config import ModelConfig
from dsv2.files import replacing_directory, sync, write_json
from dsv2.model import Transformer
from dsv2.text import Tokenizer

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
DEFAULT_SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What a directory must hold to be taken for a checkpoint, and replaced.
_CHECKPOINT = "model*.safetensors"

# What tensors may be stored as; anything else is quantised, or no model.
_STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# Buffers that older files carry and that the configuration already determines.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a checkpoint tensor lives: a parameter, or rows `start:stop` of expert `expert` of a packed one."""

    parameter: str
    shape: tuple[int, ...]
    expert: int | None = None
    start: int = 0

    def of(self, parameter: Tensor) -> Tensor:
        """The view of `parameter` that this tensor fills."""
        if self.expert is None:
            return parameter
        return parameter[self.expert, self.start : self.start + self.shape[0]]


def name_table(cfg: ModelConfig, model: Transformer) -> dict[str, Slot]:
    """Checkpoint name -> slot, for every tensor of the model, in the order they are saved."""
    table: dict[str, Slot] = {}
    for name, p in model.named_parameters():
        shape = tuple(p.shape)
        if name.endswith("mlp.experts.gate_up_proj"):
            E, F = shape[0], shape[1] // 2
            for e in range(E):
                for part, start in (("gate", 0), ("up", F)):
                    table[_expert_name(cfg, name, e, part)] = Slot(name, (F, shape[2]), e, start)
        elif name.endswith("mlp.experts.down_proj"):
            for e in range(shape[0]):
                table[_expert_name(cfg, name, e, "down")] = Slot(name, shape[1:], e)
        elif cfg.model_type == "mixtral" and name.endswith("mlp.gate.weight"):
            table[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = Slot(name, shape)
        else:
            table[name] = Slot(name, shape)
    return table


def tensors_of(model: Transformer) -> dict[str, Tensor]:
    """Checkpoint name -> the part of a parameter that it is, to read and to write in place, without gradients."""
    parameters = dict(model.named_parameters())
    return {name: slot.of(parameters[slot.parameter]).detach() for name, slot in name_table(model.cfg, model).items()}


def _expert_name(cfg: ModelConfig, parameter: str, expert: int, part: str) -> str:
    layer = parameter.split(".mlp.")[0]
    if cfg.model_type == "mixtral":
        return f"{layer}.block_sparse_moe.experts.{expert}.{ {'gate': 'w1', 'up': 'w3', 'down': 'w2'}[part] }.weight"
    return f"{layer}.mlp.experts.{expert}.{part}_proj.weight"


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """Load an official checkpoint from a directory, or from the hub where `path` is `owner/name` and no directory.

    Args:
        dtype: of the parameters; None keeps the files' own.

    Raises ValueError for a configuration that is not understood, for missing, extra or misshapen tensors, for a file
    that is absent, truncated or corrupt, and where a GPU has no memory for the weights. All names and shapes are
    checked before memory is taken.
    """
    directory = resolve(path)
    cfg = ModelConfig.from_hf(directory)
    with torch.device("meta"):
        model = Transformer(cfg)
    files = _check_tensors(directory, model)
    _allocate(model.to(dtype or _stored_dtype(files)), device)
    _fill(model, files)
    return model.eval()


def _allocate(model: Transformer, device: str | torch.device) -> None:
    """Memory for a model of the meta device. ValueError, saying what is needed and free, where it does not fit."""
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        model.to_empty(device=device)
    except torch.OutOfMemoryError as error:
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        raise ValueError(
            f"the weights take {num_bytes / 1e9:.1f} GB in {model.dtype}, of which {device} has "
            f"{free_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB free: a narrower dtype or another device may do"
        ) from error


def load_into(model: Transformer, path: str | Path) -> None:
    """Fill a model that exists, in place and in its own dtype. Errors as for `load`, before anything is written."""
    directory = resolve(path)
    _fill(model, _check_tensors(directory, model))


@torch.no_grad()
def _fill(model: Transformer, files: list[Path]) -> None:
    tensors = tensors_of(model)
    for file in files:
        with open_tensors(file) as f:
            for name in f.keys():  # noqa: SIM118 (not a mapping)
                if name in tensors:
                    tensors[name].copy_(f.get_tensor(name))


def save(
    model: Transformer,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write config.json, safetensors shards with an index, and the tokenizer, as the official repositories do.

    The directory appears complete or not at all; one that already holds a checkpoint is replaced once the new one
    is complete. Raises ValueError where `path` holds something else, OSError where the disk fails.
    """
    with replacing_directory(path, marker=_CHECKPOINT) as tmp:
        write_model(model, tmp, dtype=dtype, max_shard_bytes=max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(tmp)


def write_model(
    model: Transformer,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """The files of `save` without the tokenizer, straight into an existing directory."""
    dtype = dtype or model.dtype
    if dtype not in _STORED.values():
        raise ValueError(f"cannot save {dtype}: expected one of {', '.join(map(str, _STORED.values()))}")
    parts = tensors_of(model)
    shards = _plan_shards(name_table(model.cfg, model), dtype.itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: parts[n].to("cpu", dtype).contiguous() for n in names}
        write_tensors(tensors, directory / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(part.numel() for part in parts.values()) * dtype.itemsize
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = model.cfg.to_hf() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(directory / "config.json", config)


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """A safetensors file of contiguous tensors on the CPU, on disk when this returns. OSError where it fails."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        # What the library calls a full disk.
        raise OSError(f"cannot write {file}: {error}") from error
    sync(file)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    change: Callable[[Transformer], None] | None = None,
) -> None:
    """Rewrite a checkpoint in another dtype or sharding; the tokenizer's files are copied as they are.

    `change` may alter the weights, in place and in the new dtype already, before they are written.
    """
    directory = resolve(source)
    model = load(directory, dtype=dtype)
    if change is not None:
        change(model)
    with replacing_directory(target, marker=_CHECKPOINT) as tmp:
        write_model(model, tmp, max_shard_bytes=max_shard_bytes)
        for file in directory.iterdir():
            if file.name.startswith(("tokenizer", "special_tokens", "generation_config", "chat_template")):
                shutil.copyfile(file, tmp / file.name)


def resolve(path: str | Path) -> Path:
    """The local directory of a checkpoint, downloaded from the hub where `path` is an `owner/name` id."""
    directory = Path(path)
    if directory.is_dir():
        return directory
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ValueError(f"no checkpoint directory at {path}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{path} is neither a directory nor a hub repository that can be read: {error}") from error


def _checkpoint_files(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if not index.is_file():
        single = directory / SINGLE_FILE
        if not single.is_file():
            raise ValueError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")
        return [single]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{index} is not a safetensors index: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} is not a safetensors index: {name!r} is no file name")
        if not (directory / name).is_file():
            raise ValueError(f"{index} names the shard {name}, which is missing")
    return [directory / name for name in names]


@contextlib.contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """A safetensors file, open for reading on the CPU. ValueError where it is none, or not whole."""
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or corrupt: {error}") from error
    with handle as f:
        yield f


def _check_tensors(directory: Path, model: Transformer) -> list[Path]:
    """The files, once their headers show every expected tensor once, with its shape, and no other."""
    files = _checkpoint_files(directory)
    table = name_table(model.cfg, model)
    found: dict[str, Path] = {}
    for file in files:
        with open_tensors(file) as f:
            for name in f.keys():  # noqa: SIM118 (not a mapping)
                if name in found:
                    raise ValueError(f"tensor {name} is in both {found[name].name} and {file.name}")
                found[name] = file
                if name in table:
                    check_tensor(f.get_slice(name), name, table[name].shape, file)
    missing = [n for n in table if n not in found]
    extra = [n for n in found if n not in table and not _is_redundant(n, model.cfg)]
    check_names(directory, missing, extra)
    return files


def check_tensor(stored: Any, name: str, shape: tuple[int, ...], file: Path) -> None:
    """ValueError unless a slice of an open safetensors file is of this shape, and of a dtype that weights have."""
    found, dtype = tuple(stored.get_shape()), stored.get_dtype()
    if dtype not in _STORED:
        raise ValueError(f"tensor {name} is stored as {dtype}, expected one of {', '.join(_STORED)} ({file})")
    if found != shape:
        raise ValueError(f"tensor {name} has shape {found}, expected {shape} ({file})")


def check_names(directory: Path, missing: list[str], extra: list[str]) -> None:
    """ValueError, with some of the names, unless there are none."""
    if missing or extra:
        parts = [f"{len(v)} {k} ({_some(v)})" for k, v in (("missing", missing), ("unexpected", extra)) if v]
        raise ValueError(f"{directory}: tensors do not match the configuration: {', '.join(parts)}")


def _is_redundant(name: str, cfg: ModelConfig) -> bool:
    return bool(_DERIVED.search(name)) or (cfg.tie_embeddings and name == "lm_head.weight")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _stored_dtype(files: list[Path]) -> torch.dtype:
    """The embedding's: the layers of a checkpoint share one."""
    for file in files:
        with open_tensors(file) as f:
            if EMBEDDING in f.keys():  # noqa: SIM118 (not a mapping)
                return _STORED[f.get_slice(EMBEDDING).get_dtype()]
    raise ValueError(f"no tensor {EMBEDDING} in {', '.join(file.name for file in files)}")


def _plan_shards(table: dict[str, Slot], itemsize: int, max_shard_bytes: int) -> list[list[str]]:
    """Tensors in order, a new shard where the next one would not fit."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive")
    shards: list[list[str]] = [[]]
    used = 0
    for name, slot in table.items():
        size = itemsize * torch.Size(slot.shape).numel()
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A dtype by its checkpoint name; None stays None. Raises ValueError for any other name."""
    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} must be one of {', '.join(DTYPES)}")
    return DTYPES[name]
