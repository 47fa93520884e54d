"""Broken checkpoints and wrong places: one clear error that names the thing, and nothing half-written."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv2 import weights
from tests.numerics import mla_config, random_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GATE = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.2.mlp.experts.5.down_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint in one file; tests break copies of it."""
    path = tmp_path_factory.mktemp("good") / "model"
    weights.save(random_model(mla_config()), path)
    return path


@pytest.fixture(scope="module")
def saved_in_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "model"
    weights.save(random_model(mla_config()), path, max_shard_bytes=200_000)
    return path


@pytest.fixture
def whole(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def sharded(saved_in_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_in_shards, tmp_path / "model")


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / SINGLE)
    edit(tensors)
    save_file(tensors, directory / SINGLE)


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def is_model(directory: Path, seed: int) -> bool:
    """Whether the directory holds the random model of that seed, whole."""
    loaded, expected = weights.load(directory), random_model(mla_config(), seed)
    return all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))


# Tensors ----------------------------------------------------------------------------------------------------------


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(EXPERT), rf"1 missing \({EXPERT}\)"),
        (lambda t: t.update(bias=torch.ones(2)), r"1 unexpected \(bias\)"),
        (lambda t: rename(t, GATE, GATE + "s"), rf"1 missing \({GATE}\), 1 unexpected \({GATE}s\)"),
        (lambda t: t.update({GATE: torch.ones(9, 64)}), rf"{GATE} has shape \(9, 64\), expected \(8, 64\)"),
        (lambda t: t.update({GATE: torch.ones(512)}), rf"{GATE} has shape \(512,\), expected \(8, 64\)"),
        (
            lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}),
            rf"{EXPERT} has shape \(32, 64\), expected \(64, 32\)",
        ),
        (
            lambda t: t.update({EXPERT: torch.ones(64, 32, dtype=torch.int8)}),
            rf"{EXPERT} is stored as I8, expected one",
        ),
        (lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}), rf"{EXPERT} is stored as F8_E4M3, expected"),
        (lambda t: t.clear(), r"missing \(model.embed_tokens.weight, .*, .*, \.\.\.\)"),
    ],
    ids=["missing", "extra", "misnamed", "rows", "rank", "transposed", "integers", "fp8", "empty"],
)
def test_tensors_that_do_not_fit_are_named(edit: Callable[..., object], message: str, whole: Path) -> None:
    edit_tensors(whole, edit)
    with pytest.raises(ValueError, match=message):
        weights.load(whole)


def test_many_missing_tensors_are_counted_and_three_are_named(whole: Path) -> None:
    edit_tensors(whole, lambda t: [t.pop(n) for n in list(t) if ".experts.3." in n])
    with pytest.raises(ValueError, match=r"6 missing \(\S+, \S+, \S+, \.\.\.\)"):
        weights.load(whole)


def test_a_configuration_of_another_size_is_refused_before_memory_is_taken(whole: Path) -> None:
    edit_json(whole / "config.json", lambda c: c.update(vocab_size=10**12))
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(512, 64\), expected \(1000000000000, 64\)"):
        weights.load(whole)


def test_a_model_that_exists_is_left_as_it_was(whole: Path) -> None:
    edit_tensors(whole, lambda t: t.pop(EXPERT))
    model = random_model(mla_config(), seed=1)
    with pytest.raises(ValueError, match="1 missing"):
        weights.load_into(model, whole)
    expected = random_model(mla_config(), seed=1).parameters()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))


# Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.01, 0.5, 0.99999])
def test_a_truncated_file_is_refused(share: float, whole: Path) -> None:
    content = (whole / SINGLE).read_bytes()
    (whole / SINGLE).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"{SINGLE} is truncated or corrupt"):
        weights.load(whole)


def test_a_file_with_bytes_behind_its_end_is_refused(whole: Path) -> None:
    with (whole / SINGLE).open("ab") as f:
        f.write(b"\0")
    with pytest.raises(ValueError, match=f"{SINGLE} is truncated or corrupt"):
        weights.load(whole)


def test_a_file_of_another_kind_is_refused(whole: Path) -> None:
    (whole / SINGLE).write_text("<html>not found</html>" * 1000)
    with pytest.raises(ValueError, match=f"{SINGLE} is truncated or corrupt"):
        weights.load(whole)


def test_a_flipped_byte_of_the_header_is_refused_or_changes_nothing(whole: Path) -> None:
    content = bytearray((whole / SINGLE).read_bytes())
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    positions = [*range(8), *random.Random(0).sample(range(8, header_bytes), 150)]
    refused = 0
    for position in positions:
        flipped = content.copy()
        flipped[position] ^= 1 << (position % 8)
        (whole / SINGLE).write_bytes(flipped)
        try:
            assert is_model(whole, seed=0), position
        except ValueError:
            refused += 1
    assert refused > 0.9 * len(positions)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{shard.name} is truncated or corrupt"):
        weights.load(sharded)


def test_a_shard_that_the_index_names_and_nobody_has_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{INDEX} names the shard {shard.name}, which is missing"):
        weights.load(sharded)


def test_a_shard_that_the_index_forgot_is_missed(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    edit_json(sharded / INDEX, lambda i: [i["weight_map"].pop(n) for n in load_file(shard)])
    with pytest.raises(ValueError, match=f"{len(load_file(shard))} missing"):
        weights.load(sharded)


def test_a_tensor_in_two_shards_is_named_with_both(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    with pytest.raises(ValueError, match=f"tensor {name} is in both {first.name} and {second.name}"):
        weights.load(sharded)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["b"]}}', "\udcff"],
)
def test_an_index_that_is_none_is_refused(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"{INDEX} is not a safetensors index"):
        weights.load(sharded)


def test_an_index_may_not_lead_out_of_its_directory(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shutil.move(shard, sharded.parent / shard.name)
    edit_json(
        sharded / INDEX,
        lambda i: i["weight_map"].update(
            {n: f"../{shard.name}" for n, f in i["weight_map"].items() if f == shard.name}
        ),
    )
    with pytest.raises(ValueError, match=f"{INDEX} is not a safetensors index"):
        weights.load(sharded)


def test_a_directory_without_weights_is_named(whole: Path) -> None:
    (whole / SINGLE).unlink()
    with pytest.raises(ValueError, match=f"model has neither {SINGLE} nor {INDEX}"):
        weights.load(whole)


def test_a_directory_without_configuration_is_named(whole: Path) -> None:
    (whole / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json at .*model"):
        weights.load(whole)


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint directory at .*/nowhere"):
        weights.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' must be one of deepseek_v2"),
        ({"topk_method": "noaux_tc"}, "router='noaux_tc' must be one of greedy"),
        ({"kv_lora_rnk": 512}, r"unknown key 'kv_lora_rnk' \(did you mean 'kv_lora_rank'\?\)"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused_at_loading(
    change: dict[str, Any], message: str, whole: Path
) -> None:
    edit_json(whole / "config.json", lambda c: c.update(change))
    with pytest.raises(ValueError, match=message):
        weights.load(whole)


# Places -----------------------------------------------------------------------------------------------------------


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="may not be replaced"):
        weights.save(random_model(mla_config()), tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_a_configuration_file_alone_does_not_make_a_directory_a_checkpoint(tmp_path: Path) -> None:
    # Many programs call their settings config.json.
    for name in ("config.json", "notes.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="may not be replaced"):
        weights.save(random_model(mla_config()), tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "notes.txt"]


def test_a_file_is_not_replaced_by_a_directory(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ValueError, match="model exists already and may not be replaced"):
        weights.save(random_model(mla_config()), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_convert_writes_nothing_where_its_source_is_broken(whole: Path) -> None:
    edit_tensors(whole, lambda t: t.pop(EXPERT))
    with pytest.raises(ValueError, match="1 missing"):
        weights.convert(whole, whole.parent / "target")
    assert [f.name for f in whole.parent.iterdir()] == ["model"]


def test_a_gpu_without_memory_for_the_weights_is_told_of_in_bytes(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    weights.save(random_model(mla_config(), seed=1), tmp_path / "model")
    monkeypatch.setattr(torch.nn.Module, "to_empty", refuse)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**6, 2 * 10**9))
    with pytest.raises(
        ValueError, match=r"the weights take 0\.0 GB in torch\.float32, of which cpu has 0\.0 of 2\.0 GB"
    ):
        weights.load(tmp_path / "model")
