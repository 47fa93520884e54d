"""The run directory: stopped, killed or out of disk, a run that goes on ends where an uninterrupted one does."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import dsv2
from dsv2.config.run import PretrainConfig, pretrain_from_dict, to_toml
from dsv2.data import TokenShards
from dsv2.text import Tokenizer
from dsv2.train import pretrain as room
from dsv2.train.checkpoint import list_checkpoints
from dsv2.train.metrics import read_metrics
from dsv2.train.pretrain import Pretraining
from tests.train.tiny import (
    CHECKPOINT_EVERY,
    EVAL_EVERY,
    LOG_EVERY,
    QUIET,
    RAMP_STEPS,
    STEPS,
    assert_same_run,
    changed,
    recipe,
)


def run(cfg: PretrainConfig, run_dir: Path, stop_at: int | None = None) -> Pretraining:
    """Train to the end, or stop as a signal would before step `stop_at`."""
    pretraining = Pretraining(cfg, run_dir, QUIET)
    complete = pretraining.run(lambda: pretraining.step == stop_at)
    assert complete == (stop_at is None)
    return pretraining


def copied(run_dir: Path, target: Path) -> Path:
    shutil.copytree(run_dir, target)
    return target


# What a run leaves ------------------------------------------------------------------------------------------------


def test_the_model_learns(finished: Path) -> None:
    scores = [r["held_out_bits_per_byte"] for r in read_metrics(finished) if "held_out_bits_per_byte" in r]
    assert all(scores[-1][source] < 0.9 * scores[0][source] for source in ("prose", "verse"))


def test_records_fall_on_their_steps(finished: Path) -> None:
    records = read_metrics(finished)
    assert [r["step"] for r in records if "loss" in r] == [LOG_EVERY, 2 * LOG_EVERY, STEPS]
    assert [r["step"] for r in records if "held_out_bits_per_byte" in r] == list(range(0, STEPS + 1, EVAL_EVERY))


def test_a_record_averages_every_step_since_the_last(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run(recipe(corpus, log_every=1), tmp_path / "run")
    every = {r["step"]: r for r in read_metrics(tmp_path / "run") if "loss" in r}
    last = 0
    for record in (r for r in read_metrics(finished) if "loss" in r):
        steps = [every[step] for step in range(last + 1, record["step"] + 1)]
        for key in ("loss", "grad_norm", "drop_rate", "devices_per_token"):
            assert record[key] == pytest.approx(sum(s[key] for s in steps) / len(steps), rel=1e-6)
        for key, loss in record["balance_loss"].items():
            assert loss == pytest.approx(sum(s["balance_loss"][key] for s in steps) / len(steps), rel=1e-6)
        last = record["step"]


def test_a_record_says_rate_tokens_and_load(finished: Path) -> None:
    record = next(r for r in read_metrics(finished) if "loss" in r)
    assert record["tokens"] == (RAMP_STEPS * 2 + (LOG_EVERY - RAMP_STEPS) * 4) * 32
    assert record["batch_sequences"] == 4
    assert record["lr"] == 1e-2
    assert record["tokens_per_s"] > 0
    assert 0 < record["drop_rate"] < 1
    assert 1 < record["devices_per_token"] <= 2
    load = torch.tensor(record["expert_load"])
    assert load.shape == (2, 8)
    assert torch.allclose(load.sum(1), torch.ones(2), atol=1e-4)
    busiest = {f"moe_layer_{i}": pytest.approx(8 * max(row), abs=1e-3) for i, row in enumerate(load.tolist(), 1)}
    assert record["load_max_over_mean"] == busiest


def test_the_last_evaluation_takes_all_of_the_held_out_text(corpus: Path, finished: Path) -> None:
    model = dsv2.load(list_checkpoints(finished / "checkpoints")[-1])
    scores = room.bits_per_byte(model, TokenShards.open(corpus / "held_out"), window=32)
    last = read_metrics(finished)[-1]["held_out_bits_per_byte"]
    assert last == {name: pytest.approx(s.bits_per_byte, rel=1e-6) for name, s in scores.items()}


def test_the_resolved_recipe_is_saved(corpus: Path, finished: Path) -> None:
    saved = tomllib.loads((finished / "config.toml").read_text(encoding="utf-8"))
    assert pretrain_from_dict(saved) == recipe(corpus)


def test_only_the_newest_checkpoints_are_kept(finished: Path) -> None:
    names = sorted(p.name for p in (finished / "checkpoints").iterdir())
    assert names == [f"step-{STEPS - CHECKPOINT_EVERY:08d}", f"step-{STEPS:08d}"]


def test_without_held_out_text_nothing_is_evaluated(corpus: Path, tmp_path: Path) -> None:
    run(changed(recipe(corpus, steps=2), data__held_out=None), tmp_path / "run")
    assert all("held_out_bits_per_byte" not in r for r in read_metrics(tmp_path / "run"))


def test_documents_begin_and_end_with_the_tokenizers_ids_whatever_the_preset_says(corpus: Path, tmp_path: Path) -> None:
    cfg = recipe(corpus, steps=1)
    cfg = dataclasses.replace(cfg, model=cfg.model.replace(bos_token_id=0, eos_token_id=1))
    run(cfg, tmp_path / "run")
    checkpoint = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    model, tokenizer = dsv2.ModelConfig.from_hf(checkpoint), Tokenizer.load(checkpoint)
    assert (model.bos_token_id, model.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_without_dropping_micro_batches_do_not_change_what_is_learnt(corpus: Path, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"capacity_factor": math.inf, "batch_ramp_from": None, "batch_ramp_tokens": None}
    for name, micro in (("whole", None), ("cut", 2)):
        run(recipe(corpus, **plain, micro_batch_sequences=micro), tmp_path / name)
    losses = [[r["loss"] for r in read_metrics(tmp_path / d) if "loss" in r] for d in ("whole", "cut")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# Again and on -----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run(recipe(corpus), tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_another_seed_gives_another_run(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run(recipe(corpus, seed=1), tmp_path / "run")
    first, second = (next(r["loss"] for r in read_metrics(d) if "loss" in r) for d in (tmp_path / "run", finished))
    assert first != second


# 0: before the first step; 7: between two records; 8: where a checkpoint is due anyway; 10: where a record is.
@pytest.mark.parametrize("stop_at", [0, 7, 8, 10])
def test_stopped_and_resumed_equals_uninterrupted(corpus: Path, finished: Path, tmp_path: Path, stop_at: int) -> None:
    assert run(recipe(corpus), tmp_path / "run", stop_at).step == stop_at
    run(recipe(corpus), tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_a_dense_model_stopped_between_two_records_goes_on(corpus: Path, tmp_path: Path) -> None:
    cfg = recipe(corpus, steps=4, log_every=4)
    cfg = dataclasses.replace(cfg, model=cfg.model.replace(moe=None))
    for name, stops in (("whole", ()), ("cut", (2,))):
        for stop_at in (*stops, None):
            run(cfg, tmp_path / name, stop_at)
    assert_same_run(tmp_path / "cut", tmp_path / "whole", step=4)
    assert not {"balance_loss", "expert_load"} & read_metrics(tmp_path / "cut")[-2].keys()


def test_stopped_after_every_step_equals_uninterrupted(corpus: Path, finished: Path, tmp_path: Path) -> None:
    for step in range(1, STEPS):
        run(recipe(corpus), tmp_path / "run", stop_at=step)
    run(recipe(corpus), tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_a_stop_writes_a_checkpoint_of_the_step_it_stopped_at(corpus: Path, tmp_path: Path) -> None:
    run(recipe(corpus), tmp_path / "run", stop_at=7)
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000007"


def test_resuming_says_where(corpus: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Pretraining(recipe(corpus), finished, Console(soft_wrap=True))
    assert f"resuming {finished} at step {STEPS}" in capsys.readouterr().out


def test_a_finished_run_is_left_as_it_is(corpus: Path, finished: Path, tmp_path: Path) -> None:
    again = copied(finished, tmp_path / "run")
    assert run(recipe(corpus), again).step == STEPS
    assert_same_run(again, finished)


def test_records_after_the_checkpoint_are_made_again_not_twice(corpus: Path, finished: Path, tmp_path: Path) -> None:
    again = copied(finished, tmp_path / "run")
    shutil.rmtree(again / "checkpoints" / f"step-{STEPS:08d}")
    with (again / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "loss": 1.')
    run(recipe(corpus), again)
    assert_same_run(again, finished)


def test_keys_that_change_no_weight_may_change(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run(recipe(corpus), tmp_path / "run", stop_at=7)
    free = {"log_every": 1, "eval_every": 2, "eval_tokens": 50, "checkpoint_every": 3, "keep_checkpoints": 1}
    run(recipe(corpus, **free), tmp_path / "run")
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [c.name for c in checkpoints] == [f"step-{STEPS:08d}"]
    for file in ("model.safetensors", "optimizer.safetensors"):
        expected = finished / "checkpoints" / f"step-{STEPS:08d}" / file
        assert (checkpoints[0] / file).read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train__lr_peak", 2e-2, r"train\.lr_peak=0\.01, the recipe now says 0\.02"),
        ("train__decay_at", (0.5,), r"train\.decay_at=\[0\.6, 0\.9\], the recipe now says \[0\.5\]"),
        ("train__micro_batch_sequences", 1, r"train\.micro_batch_sequences=2, the recipe now says 1"),
        ("data__sequence_length", 16, r"data\.sequence_length=32, the recipe now says 16"),
        ("model__norm_eps", 1e-5, r"model\.norm_eps=1e-06, the recipe now says 1e-05"),
    ],
)
def test_a_changed_recipe_is_refused_with_the_key(
    corpus: Path, finished: Path, key: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Pretraining(changed(recipe(corpus), **{key: value}), finished, QUIET)


def test_a_saved_recipe_that_is_damaged_is_named(corpus: Path, finished: Path, tmp_path: Path) -> None:
    again = copied(finished, tmp_path / "run")
    (again / "config.toml").write_text("[model\n")
    with pytest.raises(ValueError, match=r"config\.toml"):
        Pretraining(recipe(corpus), again, QUIET)


# Killed -----------------------------------------------------------------------------------------------------------


def recipe_file(cfg: PretrainConfig, folder: Path) -> Path:
    file = folder / "recipe.toml"
    file.write_text(to_toml(cfg.to_dict()), encoding="utf-8")
    return file


def test_killed_at_any_moment_and_resumed_equals_uninterrupted(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "dsv2", "pretrain", str(recipe_file(recipe(corpus), tmp_path)), "--out"]
    with subprocess.Popen([*command, str(run_dir)], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(r["step"] >= EVAL_EVERY for r in read_metrics(run_dir)):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    run(recipe(corpus), run_dir)
    assert_same_run(run_dir, finished)
    assert leftovers(run_dir) == []


# Writes half of the optimizer's file of the second checkpoint, and is killed.
_KILLED_WHILE_SAVING = """
import os, signal, sys
from dsv2 import cli
from dsv2.train import checkpoint

def half(tensors, file, *args):
    whole(tensors, file, *args)
    if file.parent.name.startswith(".step-00000008"):
        os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

whole = checkpoint.write_tensors
checkpoint.write_tensors = half
cli.main()
"""


def test_killed_while_saving_and_resumed_equals_uninterrupted(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["pretrain", str(recipe_file(recipe(corpus), tmp_path)), "--out", str(run_dir)]
    process = subprocess.run([sys.executable, "-c", _KILLED_WHILE_SAVING, *arguments], stdout=subprocess.DEVNULL)
    assert process.returncode == -signal.SIGKILL
    assert [c.name for c in list_checkpoints(run_dir / "checkpoints")] == ["step-00000004"]
    assert len(leftovers(run_dir)) == 1
    run(recipe(corpus), run_dir)
    assert_same_run(run_dir, finished)
    assert leftovers(run_dir) == []


def leftovers(run_dir: Path) -> list[Path]:
    return list(run_dir.rglob(".*"))


# Full disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["dsv2.weights.save_file", "dsv2.train.checkpoint.write_json"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    corpus: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    run(recipe(corpus), tmp_path / "run", stop_at=7)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
        patch.setattr(failing, full)
        run(recipe(corpus), tmp_path / "run")
    dsv2.load(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    run(recipe(corpus), tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)
    assert leftovers(tmp_path / "run") == []


def test_what_a_killed_process_left_is_removed_at_the_next_start(corpus: Path, finished: Path, tmp_path: Path) -> None:
    again = copied(finished, tmp_path / "run")
    (again / "checkpoints" / ".step-00000016.abc.tmp" / "nested").mkdir(parents=True)
    (again / ".metrics.jsonl.123.tmp").write_text("{")
    run(recipe(corpus), again)
    assert leftovers(again) == []


# No longer a number -----------------------------------------------------------------------------------------------


def poisoned(monkeypatch: pytest.MonkeyPatch, at_step: int, key: str) -> None:
    """From step `at_step` on, one statistic is no number, and nor are the weights."""
    honest, calls = room.train_step, iter(range(1, STEPS + 1))

    def step(model: Any, *args: Any) -> Any:
        stats = honest(model, *args)
        if next(calls) >= at_step:
            setattr(stats, key, torch.tensor(float("nan")))
            next(model.parameters()).data.fill_(float("nan"))
        return stats

    monkeypatch.setattr(room, "train_step", step)


def test_an_absurd_learning_rate_ends_with_the_step(corpus: Path, tmp_path: Path) -> None:
    cfg = recipe(corpus, lr_peak=1e30, warmup_steps=0, log_every=1)
    with pytest.raises(ValueError, match=r"is (nan|inf) at step 2: lower train\.lr_peak"):
        run(changed(cfg, data__held_out=None), tmp_path / "run")


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_a_run_whose_numbers_end_is_never_saved(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    # Steps 6 to 8 are poisoned; the checkpoint is due at step 8, the next record only at step 10.
    poisoned(monkeypatch, 6, key)
    with pytest.raises(ValueError, match="at step 8"):
        run(recipe(corpus), tmp_path / "run")
    assert [c.name for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000004"]


def test_a_run_whose_numbers_end_is_not_saved_when_stopped_either(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 6, "loss")
    with pytest.raises(ValueError, match="at step 7"):
        run(recipe(corpus), tmp_path / "run", stop_at=7)
    assert [c.name for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000004"]


# One token is too few to predict any: no figure on the way then, rather than NaN.
@pytest.mark.parametrize("eval_tokens", [1, 100])
def test_metrics_are_json_that_other_programs_read(corpus: Path, tmp_path: Path, eval_tokens: int) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    run(recipe(corpus, steps=3, eval_tokens=eval_tokens), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert set(records[-1]["held_out_bits_per_byte"]) == {"prose", "verse"}
