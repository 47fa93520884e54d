"""A run that takes a second: a model of V2's whole structure at toy widths, and text that a seed makes."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from dsv2.config import MLAConfig, ModelConfig
from dsv2.config.run import DataConfig, PretrainConfig, TrainConfig
from dsv2.data import Document, write_shards
from dsv2.text import Tokenizer
from dsv2.train.metrics import read_metrics

SEQUENCE_LENGTH = 32
STEPS = 12
RAMP_STEPS = 3
# They fall on different steps, so that nothing works only where two coincide.
LOG_EVERY, CHECKPOINT_EVERY, EVAL_EVERY = 5, 4, 3

QUIET = Console(quiet=True)


def documents(seed: int, count: int, words: int = 60) -> list[Document]:
    """Texts of words drawn from a small vocabulary, from two sources."""
    rng = random.Random(seed)
    lexicon = ["".join(rng.choices("etaoinshr", k=rng.randint(2, 6))) for _ in range(50)]
    texts = [" ".join(rng.choices(lexicon, k=rng.randint(words // 2, words))) for _ in range(count)]
    return [Document(f"{seed}/{i}", ("prose", "verse")[i % 2], text) for i, text in enumerate(texts)]


def write_corpus(folder: Path) -> None:
    """`tokenizer`, `train` and `held_out` in `folder`."""
    train = documents(1, 40)
    tokenizer = Tokenizer.train((d.text for d in train), 320)
    tokenizer.save(folder / "tokenizer")
    write_shards(train, tokenizer, folder / "train")
    write_shards(documents(2, 6), tokenizer, folder / "held_out")


def small_model(vocab_size: int) -> ModelConfig:
    """The `tiny` preset, shrunk: query compression, groups, shared experts and YaRN are all still there."""
    cfg = ModelConfig.preset("tiny")
    assert cfg.moe is not None
    return cfg.replace(
        vocab_size=vocab_size,
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        attention=MLAConfig(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
        moe=dataclasses.replace(cfg.moe, expert_intermediate_size=16),
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
    )


def recipe(corpus: Path, **train: Any) -> PretrainConfig:
    """A run over the corpus of `write_corpus`; keys of `train` on top."""
    every = {"log_every": LOG_EVERY, "checkpoint_every": CHECKPOINT_EVERY, "eval_every": EVAL_EVERY}
    sizes = {"steps": STEPS, "batch_sequences": 4, "micro_batch_sequences": 2, "eval_tokens": 100}
    # The first RAMP_STEPS batches have two sequences.
    ramp = {"batch_ramp_from": 2, "batch_ramp_tokens": RAMP_STEPS * 2 * SEQUENCE_LENGTH}
    keys: dict[str, Any] = {"lr_peak": 1e-2, "warmup_steps": 2, "device": "cpu"} | sizes | ramp | every | train
    return PretrainConfig(
        model=small_model(Tokenizer.load(corpus / "tokenizer").vocab_size),
        data=DataConfig(
            train=str(corpus / "train"),
            tokenizer=str(corpus / "tokenizer"),
            held_out=str(corpus / "held_out"),
            sequence_length=SEQUENCE_LENGTH,
        ),
        train=TrainConfig(**keys),
    )


def changed(cfg: PretrainConfig, **keys: Any) -> PretrainConfig:
    """The recipe with keys `section__name` replaced."""
    for key, value in keys.items():
        section, name = key.split("__")
        cfg = dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **{name: value})})
    return cfg


def checkpoint_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Weights and optimizer state of a checkpoint, by file and name, read without our code."""
    return {f"{f.name}:{k}": v for f in checkpoint.glob("*.safetensors") for k, v in load_file(f).items()}


def metrics_without_timings(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "tokens_per_s"} for record in read_metrics(run_dir)]


def assert_same_run(run_dir: Path, expected: Path, step: int = STEPS) -> None:
    """The checkpoint of the last step and every metric are equal, bit for bit."""
    name = f"checkpoints/step-{step:08d}"
    found, wanted = checkpoint_tensors(run_dir / name), checkpoint_tensors(expected / name)
    assert found.keys() == wanted.keys()
    different = [key for key in wanted if not torch.equal(found[key], wanted[key])]
    assert different == []
    state, wanted_state = (json.loads((d / name / "trainer.json").read_text()) for d in (run_dir, expected))
    assert state == wanted_state
    assert metrics_without_timings(run_dir) == metrics_without_timings(expected)
