"""Runs that cannot be: refused by name before anything is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dsv2.config.run import PretrainConfig
from dsv2.data import write_shards
from dsv2.text import Tokenizer
from dsv2.train.pretrain import Pretraining
from tests.train.tiny import QUIET, changed, documents, recipe


def assert_refused_before_anything_is_written(cfg: PretrainConfig, run_dir: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pretraining(cfg, run_dir, QUIET)
    assert not run_dir.exists()


@pytest.mark.parametrize("key", ["data__train", "data__tokenizer", "data__held_out"])
def test_missing_data_is_named(corpus: Path, tmp_path: Path, key: str) -> None:
    cfg = changed(recipe(corpus), **{key: str(tmp_path / "absent")})
    assert_refused_before_anything_is_written(cfg, tmp_path / "run", "absent")


@pytest.mark.parametrize("key", ["data__train", "data__held_out"])
def test_shards_of_another_tokenizer_are_refused(corpus: Path, tmp_path: Path, key: str) -> None:
    other = Tokenizer.train((d.text for d in documents(3, 10)), 300)
    write_shards(documents(3, 10), other, tmp_path / "other")
    cfg = changed(recipe(corpus), **{key: str(tmp_path / "other")})
    assert_refused_before_anything_is_written(cfg, tmp_path / "run", "other was made with tokenizer")


def test_a_vocabulary_larger_than_the_model_is_refused(corpus: Path, tmp_path: Path) -> None:
    cfg = recipe(corpus)
    cfg = dataclasses.replace(cfg, model=cfg.model.replace(vocab_size=256))
    assert_refused_before_anything_is_written(cfg, tmp_path / "run", "model.vocab_size=256")


def test_too_little_text_for_one_window_is_refused(corpus: Path, tmp_path: Path) -> None:
    cfg = changed(recipe(corpus), data__sequence_length=10**6)
    assert_refused_before_anything_is_written(cfg, tmp_path / "run", "sequence_length=1000000")


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(corpus: Path, tmp_path: Path, device: str) -> None:
    assert_refused_before_anything_is_written(recipe(corpus, device=device), tmp_path / "run", f"device '{device}'")
