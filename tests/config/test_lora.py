"""`adapter_config.json` is read with PEFT's meaning, and refused where it asks for more than W + scale * B A."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv2.config.lora import LoRAConfig
from tests.adapted import CONFIG

Q, OUT = "model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.o_proj"
EXPERT = "model.layers.3.mlp.experts.5.w1"


def config(**fields: Any) -> LoRAConfig:
    return LoRAConfig(**({"r": 4, "lora_alpha": 8.0, "target_modules": ("q_proj",)} | fields))


def read(tmp_path: Path, **changes: Any) -> LoRAConfig:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({k: v for k, v in (CONFIG | changes).items() if v != "absent"}))
    return LoRAConfig.from_peft(file)


def test_what_peft_writes_is_read(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        layers_to_transform=[1, 2],
        rank_pattern={"o_proj": 2},
        alpha_pattern={"o_proj": 3},
        use_rslora=True,
    )
    assert found == config(
        lora_alpha=6.0,
        modules_to_save=("lm_head",),
        layers_to_transform=(1, 2),
        rank_pattern={"o_proj": 2},
        alpha_pattern={"o_proj": 3.0},
        use_rslora=True,
    )


@pytest.mark.parametrize(
    ("fields", "module", "is_target"),
    [
        ({}, Q, True),
        ({}, OUT, False),
        ({"target_modules": ("proj",)}, Q, False),
        ({"target_modules": (Q,)}, Q, True),
        ({"target_modules": r".*\.self_attn\..*_proj"}, OUT, True),
        ({"target_modules": "q_proj"}, Q, False),
        ({"target_modules": ("q_proj", "o_proj"), "exclude_modules": ("o_proj",)}, OUT, False),
        ({"exclude_modules": r".*layers\.3.*"}, Q, False),
        ({"layers_to_transform": 3}, Q, True),
        ({"layers_to_transform": (1, 2)}, Q, False),
        ({"layers_to_transform": ()}, Q, True),
        ({"layers_to_transform": (1, 2), "target_modules": (Q,)}, Q, True),
        ({"layers_to_transform": (3,), "target_modules": ("head",)}, "model.head", False),
        # The last number of a path, unless it is said what lists the layers.
        ({"layers_to_transform": (5,), "target_modules": ("w1",)}, EXPERT, True),
        ({"layers_to_transform": (3,), "target_modules": ("w1",), "layers_pattern": "layers"}, EXPERT, True),
        ({"layers_to_transform": (3,), "target_modules": ("w1",)}, EXPERT, False),
    ],
)
def test_modules_are_targets_as_in_peft(fields: dict[str, Any], module: str, is_target: bool) -> None:
    assert config(**fields).targets(module) is is_target


@pytest.mark.parametrize(
    ("fields", "rank", "scale"),
    [
        ({}, 4, 2.0),
        ({"use_rslora": True}, 4, 4.0),
        ({"rank_pattern": {"q_proj": 16}}, 16, 0.5),
        ({"rank_pattern": {"q_proj": 16}, "use_rslora": True}, 16, 2.0),
        ({"alpha_pattern": {r"layers\.3\..*": 12.0}}, 4, 3.0),
        ({"rank_pattern": {"_proj": 16}}, 4, 2.0),
        ({"rank_pattern": {"^model.*q_proj": 8, "q_proj": 16}}, 8, 1.0),
    ],
)
def test_ranks_and_scales_are_pefts(fields: dict[str, Any], rank: int, scale: float) -> None:
    assert (config(**fields).rank(Q), config(**fields).scale(Q)) == (rank, scale)


def test_saved_modules_are_ends_of_paths_with_all_that_is_in_them() -> None:
    saved = config(modules_to_save=("0.mlp", "norm"))
    names = ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    assert [saved.saves(name) for name in names] == [True, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, r"peft_type='LOHA' is not supported, only 'LORA'"),
        ({"peft_type": None}, "missing key 'peft_type'"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS' is not supported, only 'CAUSAL_LM'"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported, only 'none'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters=.* is not supported"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.* is not supported"),
        ({"use_something_new": True}, "use_something_new=True is not supported"),
        ({"r": "absent"}, "missing key 'r'"),
        ({"target_modules": None}, "missing key 'target_modules'"),
        ({"r": 0}, "rank r=0 must be positive"),
        ({"r": 4.5}, r"adapter_config.json.r must be int, got 4.5"),
        ({"lora_alpha": float("nan")}, "alpha lora_alpha=nan must be finite"),
        ({"rank_pattern": {"q_proj": -1}}, "rank q_proj=-1 must be positive"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern.q_proj must be int, got '4'"),
        ({"rank_pattern": [4]}, r"rank_pattern must be a table, got \[4\]"),
        ({"alpha_pattern": {"(": 4}}, r"'\(' is no regular expression"),
        ({"target_modules": "*"}, r"'\*' is no regular expression"),
    ],
)
def test_what_is_not_plain_lora_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **changes)
