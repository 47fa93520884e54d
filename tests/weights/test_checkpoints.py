"""Checkpoints travel both ways, bit for bit: between ours and ours, and between ours and transformers'."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv2 import weights
from dsv2.config import ModelConfig, MoEConfig
from dsv2.model import Transformer
from dsv2.text import Tokenizer
from tests.numerics import SMALL_MODELS, gqa_config, mla_config, random_model, random_tokens

IN_TRANSFORMERS = [name for name in SMALL_MODELS if name != "deepseek"]


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read without our code."""
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_bit_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def state(model: Transformer) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(params=SMALL_MODELS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return random_model(SMALL_MODELS[request.param]())


# Names ------------------------------------------------------------------------------------------------------------


def official_shapes(preset: str) -> dict[str, tuple[int, ...]]:
    cfg = ModelConfig.preset(preset)
    with torch.device("meta"):
        table = weights.name_table(cfg, Transformer(cfg))
    return {name: tuple(slot.shape) for name, slot in table.items()}


@pytest.mark.parametrize(("preset", "count"), [("v2", 29_102), ("v2-lite", 5_291)])
def test_the_official_checkpoints_have_so_many_tensors(preset: str, count: int) -> None:
    assert len(official_shapes(preset)) == count


def test_names_and_shapes_are_those_of_v2() -> None:
    layer, moe = "model.layers.59", "model.layers.59.mlp"
    expected = {
        "model.embed_tokens.weight": (102400, 5120),
        f"{layer}.input_layernorm.weight": (5120,),
        f"{layer}.self_attn.q_a_proj.weight": (1536, 5120),
        f"{layer}.self_attn.q_a_layernorm.weight": (1536,),
        f"{layer}.self_attn.q_b_proj.weight": (24576, 1536),
        f"{layer}.self_attn.kv_a_proj_with_mqa.weight": (576, 5120),
        f"{layer}.self_attn.kv_a_layernorm.weight": (512,),
        f"{layer}.self_attn.kv_b_proj.weight": (32768, 512),
        f"{layer}.self_attn.o_proj.weight": (5120, 16384),
        f"{layer}.post_attention_layernorm.weight": (5120,),
        "model.layers.0.mlp.gate_proj.weight": (12288, 5120),
        "model.layers.0.mlp.up_proj.weight": (12288, 5120),
        "model.layers.0.mlp.down_proj.weight": (5120, 12288),
        f"{moe}.gate.weight": (160, 5120),
        f"{moe}.experts.159.gate_proj.weight": (1536, 5120),
        f"{moe}.experts.159.up_proj.weight": (1536, 5120),
        f"{moe}.experts.159.down_proj.weight": (5120, 1536),
        f"{moe}.shared_experts.gate_proj.weight": (3072, 5120),
        f"{moe}.shared_experts.up_proj.weight": (3072, 5120),
        f"{moe}.shared_experts.down_proj.weight": (5120, 3072),
        "model.norm.weight": (5120,),
        "lm_head.weight": (102400, 5120),
    }
    shapes = official_shapes("v2")
    assert {name: shapes.get(name) for name in expected} == expected


def test_queries_of_v2_lite_are_one_matrix() -> None:
    shapes = official_shapes("v2-lite")
    assert shapes["model.layers.26.self_attn.q_proj.weight"] == (3072, 2048)
    assert shapes["model.layers.26.self_attn.kv_b_proj.weight"] == (4096, 512)
    assert shapes["model.layers.26.mlp.shared_experts.up_proj.weight"] == (2816, 2048)
    assert not [name for name in shapes if "q_a_" in name or "q_b_" in name]


def test_names_of_deepseekmoe_are_those_of_its_official_code() -> None:
    names = official_shapes("deepseekmoe-16b").keys()
    assert {n.replace("model.layers.1.", "") for n in names if n.startswith("model.layers.1.")} == {
        *("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate.weight"),
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"mlp.shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")),
        *(f"mlp.experts.{e}.{p}_proj.weight" for e in range(64) for p in ("gate", "up", "down")),
    }
    assert {n for n in names if not n.startswith("model.layers.")} == {
        *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    }


def test_names_of_mixtral_are_its_own() -> None:
    names = official_shapes("mixtral-8x22b")
    assert names["model.layers.55.block_sparse_moe.gate.weight"] == (8, 6144)
    assert names["model.layers.55.block_sparse_moe.experts.7.w1.weight"] == (16384, 6144)
    assert names["model.layers.55.block_sparse_moe.experts.7.w2.weight"] == (6144, 16384)
    assert names["model.layers.55.block_sparse_moe.experts.7.w3.weight"] == (16384, 6144)


def test_every_element_of_every_parameter_has_one_name(model: Transformer) -> None:
    counts = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for slot in weights.name_table(model.cfg, model).values():
        slot.of(counts[slot.parameter]).add_(1)
    assert all(bool((count == 1).all()) for count in counts.values())


# Ours and ours ----------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_bit_for_bit(model: Transformer, tmp_path: Path) -> None:
    weights.save(model, tmp_path / "out")
    loaded = weights.load(tmp_path / "out")
    assert loaded.cfg == model.cfg
    assert_bit_equal(state(loaded), state(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_checkpoint_keeps_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(mla_config()).to(dtype)
    weights.save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert_bit_equal(state(weights.load(tmp_path / "out")), state(model))


def test_loading_and_saving_in_another_dtype_rounds_once(tmp_path: Path) -> None:
    model = random_model(mla_config())
    rounded = {name: p.bfloat16() for name, p in state(model).items()}
    weights.save(model, tmp_path / "fp32")
    weights.save(model, tmp_path / "bf16", dtype=torch.bfloat16)
    assert_bit_equal(state(weights.load(tmp_path / "fp32", dtype=torch.bfloat16)), rounded)
    assert_bit_equal(state(weights.load(tmp_path / "bf16")), rounded)
    assert_bit_equal(state(model), state(random_model(mla_config())))


def test_shards_hold_every_tensor_once_and_keep_to_their_size(model: Transformer, tmp_path: Path) -> None:
    limit = 20_000
    weights.save(model, tmp_path / "out", max_shard_bytes=limit, dtype=torch.bfloat16)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(2 * p.numel() for p in model.parameters())
    for tensors in map(load_file, files):
        assert len(tensors) == 1 or 0 < sum(t.nbytes for t in tensors.values()) <= limit


@pytest.mark.parametrize("max_shard_bytes", [1, 20_000, 200_000])
def test_a_sharded_checkpoint_loads_like_a_whole_one(max_shard_bytes: int, tmp_path: Path) -> None:
    model = random_model(mla_config())
    weights.save(model, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert_bit_equal(state(weights.load(tmp_path / "out")), state(model))


def test_a_shard_size_below_one_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be positive"):
        weights.save(random_model(mla_config()), tmp_path / "out", max_shard_bytes=0)
    assert not list(tmp_path.iterdir())


def test_loading_into_a_model_that_exists_keeps_its_dtype(tmp_path: Path) -> None:
    model = random_model(mla_config())
    weights.save(model, tmp_path / "out")
    other = random_model(mla_config(), seed=1).bfloat16()
    weights.load_into(other, tmp_path / "out")
    assert_bit_equal(state(other), {name: p.bfloat16() for name, p in state(model).items()})


def test_saving_again_replaces_the_checkpoint_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    weights.save(random_model(mla_config()), tmp_path / "out", max_shard_bytes=20_000)
    model = random_model(mla_config(), seed=1)
    weights.save(model, tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert_bit_equal(state(weights.load(tmp_path / "out")), state(model))


def test_missing_parents_are_made(tmp_path: Path) -> None:
    weights.save(random_model(mla_config()), tmp_path / "a/b/out")
    assert (tmp_path / "a/b/out/model.safetensors").is_file()


@pytest.mark.parametrize("place", ["empty directory", "working directory", "link", "link to a checkpoint"])
def test_a_place_that_holds_nothing_else_is_used(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    path: str | Path = target
    if place == "working directory":
        monkeypatch.chdir(target)
        path = "."
    elif place.startswith("link"):
        path = tmp_path / "link"
        path.symlink_to(target)
        if place.endswith("checkpoint"):
            weights.save(random_model(mla_config(), seed=1), target)
    model = random_model(mla_config())
    weights.save(model, path)
    assert_bit_equal(state(weights.load(target)), state(model))
    assert not list(tmp_path.glob(".*"))


def test_a_tied_model_is_saved_without_its_output_projection(tmp_path: Path) -> None:
    model = random_model(gqa_config("llama", tie_embeddings=True))
    weights.save(model, tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert_bit_equal(state(weights.load(tmp_path / "out")), state(model))


def test_tensors_that_the_configuration_determines_are_read_past(tmp_path: Path) -> None:
    model = random_model(gqa_config("llama", tie_embeddings=True))
    weights.save(model, tmp_path / "out")
    extra = {"lm_head.weight": model.model.embed_tokens.weight.detach().clone()}
    extra |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    save_file(tensors_of(tmp_path / "out") | extra, tmp_path / "out/model.safetensors")
    assert_bit_equal(state(weights.load(tmp_path / "out")), state(model))


def test_the_order_of_tensors_in_a_file_does_not_matter(tmp_path: Path) -> None:
    model = random_model(mla_config())
    weights.save(model, tmp_path / "out")
    backwards = dict(reversed(list(tensors_of(tmp_path / "out").items())))
    save_file(backwards, tmp_path / "out/model.safetensors")
    assert_bit_equal(state(weights.load(tmp_path / "out")), state(model))


def test_a_checkpoint_carries_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["hello world, hello"], vocab_size=270)
    weights.save(random_model(mla_config()), tmp_path / "out", tokenizer)
    assert Tokenizer.load(tmp_path / "out").encode("hello") == tokenizer.encode("hello")


def test_convert_changes_dtype_and_sharding_and_keeps_the_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = random_model(mla_config()), Tokenizer.train(["hello world, hello"], vocab_size=270)
    weights.save(model, tmp_path / "fp32", tokenizer)
    weights.convert(tmp_path / "fp32", tmp_path / "bf16", dtype=torch.bfloat16, max_shard_bytes=20_000)
    assert len(list((tmp_path / "bf16").glob("*.safetensors"))) > 3
    assert_bit_equal(state(weights.load(tmp_path / "bf16")), {name: p.bfloat16() for name, p in state(model).items()})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "bf16" / file).read_bytes() == (tmp_path / "fp32" / file).read_bytes()


def test_convert_may_write_where_it_reads(tmp_path: Path) -> None:
    model = random_model(mla_config())
    weights.save(model, tmp_path / "out", max_shard_bytes=20_000)
    weights.convert(tmp_path / "out", tmp_path / "out")
    assert_bit_equal(tensors_of(tmp_path / "out"), tensors_of_state(model))


def tensors_of_state(model: Transformer) -> dict[str, Tensor]:
    parameters = state(model)
    return {name: slot.of(parameters[slot.parameter]) for name, slot in weights.name_table(model.cfg, model).items()}


# Ours and transformers' -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [40_000, 10**9], ids=["sharded", "whole"])
@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_transformers_reads_what_we_save(name: str, max_shard_bytes: int, tmp_path: Path) -> None:
    model = random_model(SMALL_MODELS[name]())
    weights.save(model, tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    theirs, report = loaded
    assert not any(report.values()), report
    theirs.save_pretrained(tmp_path / "theirs")
    assert_bit_equal(tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours"))


def their_config(name: str) -> Any:
    """Settings in the words of transformers' own classes, not read from a file of ours."""
    common: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "initializer_range": 0.1,
    }
    if name.startswith("v2"):
        lite = name == "v2-lite"
        yarn = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
        yarn |= {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1, "rope_theta": 10000.0}
        return transformers.DeepseekV2Config(
            **common,
            num_key_value_heads=4,
            q_lora_rank=None if lite else 32,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            n_routed_experts=8,
            n_shared_experts=2,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
            topk_method="greedy" if lite else "group_limited_greedy",
            n_group=1 if lite else 4,
            topk_group=1 if lite else 2,
            routed_scaling_factor=1.0 if lite else 2.0,
            rope_parameters=None if name == "v2-plain-rope" else yarn,
            max_position_embeddings=163840,
        )
    if name == "mixtral":
        return transformers.MixtralConfig(**common, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    if name == "qwen2":
        return transformers.Qwen2Config(**common, num_key_value_heads=2)
    return transformers.LlamaConfig(**common, num_key_value_heads=2)


@pytest.mark.parametrize("max_shard_size", ["40KB", "5GB"], ids=["sharded", "whole"])
@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_we_read_what_transformers_saves(name: str, max_shard_size: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(their_config(name))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    model = weights.load(tmp_path / "theirs")
    weights.save(model, tmp_path / "ours")
    assert_bit_equal(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs"))


@torch.no_grad()
@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_what_transformers_saves_computes_the_same_here(name: str, tmp_path: Path) -> None:
    # The configuration too must have travelled: theta, eps and factors show in the logits only.
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(their_config(name), attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = weights.load(tmp_path / "theirs")
    tokens_T = random_tokens(model.cfg, 40)
    assert torch.allclose(model(tokens_T), theirs(tokens_T[None]).logits[0], rtol=1e-4, atol=1e-4)


# Memory -----------------------------------------------------------------------------------------------------------

MEMORY_SCRIPT = """
import resource, sys
import torch
from dsv2 import weights

source, target, small = sys.argv[1:4]
dtype = getattr(torch, sys.argv[4])
weights.save(weights.load(small), small)  # loads every library that is needed

kilobytes = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
model_bytes = int(sys.argv[5]) * dtype.itemsize
limit = kilobytes * 1024 + int(1.35 * model_bytes)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
weights.save(weights.load(source, dtype=dtype), target, max_shard_bytes=20_000_000)
try:
    torch.zeros(int(1.4 * model_bytes), dtype=torch.uint8)
except RuntimeError:
    sys.exit(0)
sys.exit("the limit was not felt")
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A checkpoint of about 200 MB in fp32, and how many elements it holds."""
    moe = MoEConfig(num_experts=32, experts_per_token=3, expert_intermediate_size=256, num_shared_experts=2)
    cfg = gqa_config("deepseek", hidden_size=512, vocab_size=8192, intermediate_size=2048, num_layers=3, moe=moe)
    model = Transformer(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    path = tmp_path_factory.mktemp("large") / "model"
    weights.save(model, path, max_shard_bytes=20_000_000)
    elements = sum(p.numel() for p in model.parameters())
    assert 190e6 < 4 * elements < 230e6
    return path, elements


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts private memory against RLIMIT_DATA")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_and_saving_take_the_memory_of_one_model_and_a_third(
    dtype: str, large: tuple[Path, int], tmp_path: Path
) -> None:
    source, elements = large
    weights.save(random_model(gqa_config("deepseek")), tmp_path / "small")
    arguments = [source, tmp_path / "copy", tmp_path / "small", dtype, elements]
    done = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = sum(file.stat().st_size for file in (tmp_path / "copy").iterdir())
    assert written > elements * getattr(torch, dtype).itemsize
