"""LoRA adapters of PEFT's files become part of the weights they name, exactly, or are refused with nothing changed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2 import weights
from dsv2.adapters import load_adapter, merge_adapter, restore
from dsv2.model import Transformer
from tests.adapted import (
    EMBED,
    PREFIX,
    RANK,
    edited,
    edited_model,
    matrices,
    random_pair,
    read_tensors,
    same,
    state,
    write_adapter,
    write_tensors,
)
from tests.numerics import SMALL_MODELS, assert_close, random_model, random_tokens

ATTENTION, MLP = "model.layers.1.self_attn.", "model.layers.1.mlp."
Q, EXPERT = ATTENTION + "q_a_proj", MLP + "experts.3.up_proj"


def new_model(kind: str = "v2") -> Transformer:
    return random_model(SMALL_MODELS[kind]())


@cache
def base(kind: str = "v2") -> Transformer:
    """For reading only."""
    return new_model(kind)


# Merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v2", "v2-lite", "llama", "qwen2", "mixtral", "deepseek"])
def test_an_adapter_of_every_matrix_gives_the_logits_of_edited_weights(kind: str, tmp_path: Path) -> None:
    model = new_model(kind)
    adapter = write_adapter(tmp_path / "adapter", model)
    expected, tokens = edited_model(model, adapter, tmp_path / "edited"), random_tokens(model.cfg, 40)
    with torch.no_grad():
        before = model(tokens)
        merge_adapter(adapter, model)
        after = model(tokens)
        assert_close(after, expected(tokens))
    assert (after - before).norm() > 0.1 * before.norm()
    expected_state = state(expected)
    for name, p in model.named_parameters():
        assert_close(p, expected_state[name], what=name)


ALONE = {
    "v2": [
        EMBED,
        "lm_head",
        Q,
        *(ATTENTION + name for name in ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
        *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
        *(f"{MLP}shared_experts.{name}_proj" for name in ("gate", "up", "down")),
        *(f"{MLP}experts.3.{name}_proj" for name in ("gate", "up", "down")),
        MLP + "gate",
    ],
    "v2-lite": [ATTENTION + "q_proj"],
    "llama": [ATTENTION + f"{name}_proj" for name in "qkvo"],
    "mixtral": [f"model.layers.1.block_sparse_moe.{name}" for name in ("gate", "experts.2.w1", "experts.2.w2")],
}


@pytest.mark.parametrize(("kind", "module"), [(kind, module) for kind in ALONE for module in ALONE[kind]])
def test_each_projection_alone_changes_its_own_weight_and_the_output(kind: str, module: str, tmp_path: Path) -> None:
    model, tokens = new_model(kind), random_tokens(base(kind).cfg, 60)
    # All experts are adapted, or none: those that are not meant get a B of zeros.
    others = [name for name in matrices(model) if ".experts." in module and ".experts." in name and name != module]
    adapter = write_adapter(tmp_path / "adapter", model, [module, *others])
    tensors = read_tensors(adapter)
    write_tensors(
        adapter, tensors | {f"{PREFIX}{m}.lora_B.weight": 0 * tensors[f"{PREFIX}{m}.lora_B.weight"] for m in others}
    )
    merge_adapter(adapter, model)
    old, new = weights.tensors_of(base(kind)), weights.tensors_of(model)
    assert [name for name in old if not torch.equal(old[name], new[name])] == [f"{module}.weight"]
    assert_close(new[f"{module}.weight"], edited(old[f"{module}.weight"], tensors, module))
    with torch.no_grad():
        assert not torch.equal(model(tokens), base(kind)(tokens))


def test_a_merged_weight_is_rounded_once_to_the_models_dtype(tmp_path: Path) -> None:
    model = new_model().bfloat16()
    adapter = write_adapter(tmp_path / "adapter", model, [Q], lora_alpha=RANK)
    # Multiples of 1/16, so that the product is exact in fp32, and far from exact in bfloat16.
    tensors = {name: (t * 64).round() / 16 for name, t in read_tensors(adapter).items()}
    write_tensors(adapter, tensors)
    weight = weights.tensors_of(model)[f"{Q}.weight"]
    expected = edited(weight, tensors, Q, scale=1.0).bfloat16()
    merge_adapter(adapter, model)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, expected)


def test_ranks_and_scales_follow_patterns_and_rslora(tmp_path: Path) -> None:
    model, other = new_model(), ATTENTION + "o_proj"
    adapter = write_adapter(
        tmp_path / "adapter",
        model,
        [Q, other],
        use_rslora=True,
        rank_pattern={"o_proj": 9},
        alpha_pattern={"o_proj": 5},
    )
    tensors = read_tensors(adapter) | random_pair(other, matrices(model)[other], 9, seed=1)
    write_tensors(adapter, tensors)
    merge_adapter(adapter, model)
    old, new = weights.tensors_of(base()), weights.tensors_of(model)
    for module, scale in ((Q, 6 / RANK**0.5), (other, 5 / 9**0.5)):
        assert_close(new[f"{module}.weight"], edited(old[f"{module}.weight"], tensors, module, scale), what=module)


def test_what_was_merged_is_restored_bit_for_bit_in_the_same_memory(tmp_path: Path) -> None:
    model = new_model()
    model.join_projections()
    before, places = state(model), [p.data_ptr() for p in model.parameters()]
    adapter = load_adapter(write_adapter(tmp_path / "adapter", model), model)
    originals = adapter.originals(model)
    adapter.merge(model)
    assert not same(state(model), before)
    restore(model, originals)
    assert same(state(model), before)
    assert [p.data_ptr() for p in model.parameters()] == places


# Whole modules ----------------------------------------------------------------------------------------------------


def test_saved_modules_replace_the_models(tmp_path: Path) -> None:
    model = new_model("qwen2")
    adapter = write_adapter(
        tmp_path / "adapter", model, [ATTENTION + "o_proj"], modules_to_save=["0.self_attn.q_proj", "model.norm"]
    )
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"]
    old = weights.tensors_of(base("qwen2"))
    saved = {name: torch.randn(old[name].shape, generator=torch.Generator().manual_seed(5)) for name in names}
    write_tensors(adapter, read_tensors(adapter) | {PREFIX + name: t for name, t in saved.items()})
    merge_adapter(adapter, model)
    new = weights.tensors_of(model)
    assert all(torch.equal(new[name], saved[name]) for name in names)
    assert sum(not torch.equal(new[name], old[name]) for name in old) == len(names) + 1


@pytest.mark.parametrize("module", [EMBED, "lm_head"])
def test_an_adapted_vocabulary_brings_the_matrix_it_is_added_to(module: str, tmp_path: Path) -> None:
    model = new_model()
    adapter = write_adapter(tmp_path / "adapter", model, [module])
    own = torch.randn(matrices(model)[module], generator=torch.Generator().manual_seed(5))
    tensors = read_tensors(adapter) | {f"{PREFIX}{module}.base_layer.weight": own}
    write_tensors(adapter, tensors)
    merge_adapter(adapter, model)
    assert_close(weights.tensors_of(model)[f"{module}.weight"], edited(own, tensors, module))


def test_an_embedding_that_is_the_output_projection_too_is_not_adapted(tmp_path: Path) -> None:
    model = random_model(dataclasses.replace(SMALL_MODELS["v2"](), tie_embeddings=True))
    adapter = write_adapter(tmp_path / "adapter", model, [EMBED])
    with pytest.raises(ValueError, match=rf"adapter changes {EMBED}.weight, which is the output projection"):
        load_adapter(adapter, model)


# Targets ----------------------------------------------------------------------------------------------------------


def test_routed_experts_may_be_left_alone_as_transformers_5_does(tmp_path: Path) -> None:
    model = new_model()
    modules = [name for name in matrices(model) if name.endswith("up_proj") and ".experts." not in name]
    adapter = write_adapter(tmp_path / "adapter", model, modules, target_modules=["up_proj"])
    assert set(load_adapter(adapter, model).changes) == {f"{module}.weight" for module in modules}


def test_a_checkpoint_is_converted_with_an_adapter_in_it(tmp_path: Path) -> None:
    model = new_model("mixtral")
    weights.save(model, tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", model)
    weights.convert(
        tmp_path / "model", tmp_path / "merged", dtype=torch.bfloat16, change=lambda m: merge_adapter(adapter, m)
    )
    served = weights.load(tmp_path / "model", dtype=torch.bfloat16)
    merge_adapter(adapter, served)
    assert same(state(weights.load(tmp_path / "merged")), state(served))


# Bad input --------------------------------------------------------------------------------------------------------

A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
A_OF_EXPERT = f"{PREFIX}{EXPERT}.lora_A.weight"

Tensors = dict[str, Tensor]


def drop(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if name not in names}


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(shape, dtype=dtype)}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(B), rf"1 missing \({B}\)"),
        (drop(A, B), rf"2 missing \({A}, {B}\)"),
        (drop(A_OF_EXPERT), rf"1 missing \({A_OF_EXPERT}\)"),
        (put(f"{PREFIX}lm_head.lora_A.weight", 4, 64), r"1 unexpected \(.*lm_head.lora_A.weight\)"),
        (put(f"{PREFIX}{Q}.lora_magnitude_vector", 32), r"1 unexpected \(.*lora_magnitude_vector\)"),
        (put(f"{PREFIX}model.norm.weight", 64), r"1 unexpected \(.*model.norm.weight\)"),
        (put("model.layers.7.self_attn.q_proj.lora_A.weight", 4, 64), r"1 unexpected \(model.layers.7"),
        (put(A, 4, 128), rf"{A} has shape \(4, 128\), expected \(4, 64\)"),
        (put(B, 64, 4), rf"{B} has shape \(64, 4\), expected \(32, 4\)"),
        (put(A, 8, 64), rf"{A} has shape \(8, 64\), expected \(4, 64\)"),
        (put(A_OF_EXPERT, 4, 32), rf"{A_OF_EXPERT} has shape \(4, 32\), expected \(4, 64\)"),
        (put(A, 4, 64, dtype=torch.int8), rf"{A} is stored as I8, expected one of"),
        (put(f"{PREFIX}lm_head.weight", 512, 32), r"lm_head.weight has shape \(512, 32\), expected \(\d+, 64\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(edit: Callable[[Tensors], Tensors], message: str, tmp_path: Path) -> None:
    experts = [name for name in matrices(base()) if ".experts." in name]
    adapter = write_adapter(tmp_path / "adapter", base(), [Q, *experts])
    write_tensors(adapter, edit(read_tensors(adapter)))
    with pytest.raises(ValueError, match=message):
        load_adapter(adapter, base())


def edit_config(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base("llama"))
    with pytest.raises(ValueError, match="tensors do not match the configuration"):
        load_adapter(adapter, base())


def test_an_adapter_of_nothing_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base(), [], target_modules=["c_attn"])
    with pytest.raises(ValueError, match=r"changes nothing: target_modules=\('c_attn',\)"):
        load_adapter(adapter, base())


def test_saved_modules_must_be_there(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base(), [Q], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"1 missing \(base_model.model.lm_head.weight\)"):
        load_adapter(adapter, base())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_model.safetensors", None, "adapter has no adapter_model.safetensors"),
        ("adapter_model.safetensors", b"\x00" * 20, "adapter_model.safetensors is truncated or corrupt"),
        ("adapter_config.json", None, "no adapter_config.json at "),
        ("adapter_config.json", b"{", "adapter_config.json is not valid JSON"),
    ],
)
def test_broken_files_are_named(file: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base(), [Q])
    (adapter / file).unlink()
    if content is not None:
        (adapter / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_adapter(adapter, base())


def test_an_adapter_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    model = new_model()
    adapter = write_adapter(tmp_path / "adapter", model)
    write_tensors(adapter, put(f"{PREFIX}lm_head.lora_B.weight", 1, 4)(read_tensors(adapter)))
    with pytest.raises(ValueError, match=r"lm_head.lora_B.weight has shape \(1, 4\)"):
        merge_adapter(adapter, model)
    assert same(state(model), state(base()))
