"""One corpus and one finished run, shared by all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv2.data import TokenShards
from dsv2.train.pretrain import Pretraining
from tests.train.tiny import QUIET, recipe, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer`, `train` and `held_out`. Read only."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def held_out(corpus: Path) -> TokenShards:
    return TokenShards.open(corpus / "held_out")


@pytest.fixture(scope="session")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an uninterrupted run. Read only: tests that change it copy it first."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert Pretraining(recipe(corpus), run_dir, QUIET).run()
    return run_dir
