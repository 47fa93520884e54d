"""The pretraining loop: recipe in, run directory out; stopped and resumed equals uninterrupted, bit for bit.

A run directory holds `config.toml`, `metrics.jsonl`, `tensorboard/` and `checkpoints/`. One process, one device.
"""

from __future__ import annotations

import dataclasses
import math
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dsv2.config.run import PretrainConfig, to_toml
from dsv2.data.batches import BatchLoader
from dsv2.data.shards import TokenShards
from dsv2.device import pick_device
from dsv2.files import remove_leftovers, write_text
from dsv2.model import Transformer
from dsv2.text import Tokenizer
from dsv2.train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from dsv2.train.evaluate import bits_per_byte
from dsv2.train.metrics import METRICS_FILE, MetricsLog, RunProgress
from dsv2.train.optim import adamw
from dsv2.train.schedule import Schedule
from dsv2.train.step import StepStats, max_over_mean, train_step

CONFIG_FILE = "config.toml"
BALANCE_LOSSES = ("expert", "device", "communication")

# May differ between the two halves of a resumed run: none of them changes a weight.
_FREE_KEYS = frozenset(
    f"train.{k}" for k in ("device", "log_every", "eval_every", "eval_tokens", "checkpoint_every", "keep_checkpoints")
)


class Pretraining:
    """A run that can be stopped between any two steps."""

    def __init__(self, cfg: PretrainConfig, run_dir: str | Path, console: Console | None = None) -> None:
        """Open the data, build or resume the model. Raises ValueError before anything is written if they do not fit.

        A run directory that holds checkpoints of the same recipe is resumed from the latest. Where documents begin
        and end is the tokenizer's to say: its ids replace the model's `bos_token_id` and `eos_token_id`.
        """
        self.run_dir, self.console = Path(run_dir), console or Console()
        self.checkpoints = self.run_dir / "checkpoints"
        data, train = cfg.data, cfg.train
        self.tokenizer = Tokenizer.load(data.tokenizer)
        model = cfg.model.replace(bos_token_id=self.tokenizer.bos_id, eos_token_id=self.tokenizer.eos_id)
        self.cfg = cfg = dataclasses.replace(cfg, model=model)
        shards = self._open_shards(data.train)
        self.held_out = self._open_shards(data.held_out) if data.held_out else None
        self.schedule = Schedule(train, data.sequence_length)
        self.micro = train.micro_batch_sequences or train.batch_sequences
        self.loader = BatchLoader(
            shards, sequence_length=data.sequence_length, batch_sequences=self.micro, seed=train.seed
        )
        self._check_same_recipe()
        self.model = Transformer(cfg.model)
        self.model.init_weights(torch.Generator().manual_seed(train.seed))
        self.model.to(pick_device(train.device))
        self.optimizer = adamw(self.model, train)
        self.meter = _Meter()
        self.step = 0
        self._resume()

    def _open_shards(self, path: str) -> TokenShards:
        shards = TokenShards.open(path)
        shards.check_tokenizer(self.tokenizer.fingerprint)
        if shards.vocab_size > self.cfg.model.vocab_size:
            raise ValueError(
                f"{path} holds ids up to {shards.vocab_size - 1}, model.vocab_size={self.cfg.model.vocab_size}"
            )
        return shards

    def _check_same_recipe(self) -> None:
        file = self.run_dir / CONFIG_FILE
        if not file.is_file():
            return
        try:
            saved = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        old, new = _flat(saved), _flat(self.cfg.to_dict())
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and key not in _FREE_KEYS:
                raise ValueError(
                    f"{self.run_dir} was begun with {key}={old.get(key)!r}, the recipe now says {new.get(key)!r}; "
                    "use another run directory"
                )

    def _resume(self) -> None:
        found = list_checkpoints(self.checkpoints)
        if not found:
            return
        state = load_checkpoint(found[-1], model=self.model, optimizer=self.optimizer)
        self.step = state["step"]
        self.loader.load_state(state["loader"])
        self.meter.load_state(state["meter"], self.model.device)
        self.console.print(f"resuming {self.run_dir} at step {self.step}", highlight=False)

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end, or until `should_stop()` holds between two steps; then a checkpoint is written.

        Returns whether the run is complete.
        """
        train, schedule = self.cfg.train, self.schedule
        self._prepare_directory()
        log = MetricsLog(self.run_dir, self.step)
        progress = RunProgress(self.console, label="pretrain", num_steps=schedule.num_steps, start_step=self.step)
        try:
            if self.step == 0:
                self._evaluate(log)
            self.meter.restart_clock()
            while self.step < schedule.num_steps and not should_stop():
                self._train_step()
                is_last = self.step == schedule.num_steps
                if self.step % train.log_every == 0 or is_last:
                    record = self.meter.record(self.step, schedule)
                    log.write(self.step, record)
                    progress.update(self.step, f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tok/s")
                if self.step % train.eval_every == 0 or is_last:
                    self._evaluate(log)
                    self.meter.restart_clock()
                if self.step % train.checkpoint_every == 0 or is_last:
                    self._save()
                    self.meter.restart_clock()
            if self.step < schedule.num_steps and self.step % train.checkpoint_every:
                self._save()
        finally:
            progress.close()
            log.close()
        return self.step == schedule.num_steps

    def _train_step(self) -> None:
        num_sequences = self.schedule.batch_sequences(self.step)
        batches = [self.loader.next() for _ in range(num_sequences // self.micro)]
        lr = self.schedule.learning_rate(self.step)
        stats = train_step(self.model, self.optimizer, batches, self.cfg.train, lr)
        self.meter.add(stats, num_tokens=num_sequences * self.cfg.data.sequence_length)
        self.step += 1

    def _prepare_directory(self) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.checkpoints, "step-*")
        for name in (CONFIG_FILE, METRICS_FILE):
            remove_leftovers(self.run_dir, name)
        write_text(self.run_dir / CONFIG_FILE, to_toml(self.cfg.to_dict()))

    def _evaluate(self, log: MetricsLog) -> None:
        if self.held_out is None:
            return
        last = self.step == self.schedule.num_steps
        limit = None if last else self.cfg.train.eval_tokens
        scores = bits_per_byte(self.model, self.held_out, window=self.cfg.data.sequence_length, max_tokens=limit)
        # A source of which nothing was scored has no figure: NaN is not JSON.
        figures = {name: s.bits_per_byte for name, s in scores.items() if s.num_bytes}
        log.write(self.step, {"held_out_bits_per_byte": figures})

    def _save(self) -> None:
        self.meter.check(self.step)
        save_checkpoint(
            self.checkpoints,
            step=self.step,
            model=self.model,
            optimizer=self.optimizer,
            tokenizer=self.tokenizer,
            loader=self.loader.state(),
            meter=self.meter.state(),
            keep=self.cfg.train.keep_checkpoints,
        )


class _Meter:
    """Sums over the steps since the last record. They are saved, so that a resumed run writes the same record."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.sums: dict[str, Tensor] = {}
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the speed what was not training."""
        self.num_timed_tokens, self.began = 0, time.monotonic()

    def add(self, stats: StepStats, num_tokens: int) -> None:
        for f in dataclasses.fields(stats):
            value = getattr(stats, f.name)
            self.sums[f.name] = self.sums[f.name] + value if self.num_steps else value
        self.num_steps += 1
        self.num_timed_tokens += num_tokens

    def state(self) -> dict[str, Any]:
        """For JSON, which keeps every bit of a float."""
        return {"num_steps": self.num_steps, "sums": {name: total.tolist() for name, total in self.sums.items()}}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self.num_steps = state["num_steps"]
        self.sums = {name: torch.tensor(total, device=device) for name, total in state["sums"].items()}

    def check(self, step: int) -> None:
        """Read the device. Raises ValueError where the loss or the gradient is no longer a number."""
        for name, what in (("loss", "loss"), ("grad_norm", "gradient's norm")):
            total = float(self.sums.get(name, 0.0))
            if not math.isfinite(total):
                raise ValueError(f"the {what} is {total} at step {step}: lower train.lr_peak or look at the data")

    def record(self, step: int, schedule: Schedule) -> dict[str, Any]:
        """The averages over steps, for the log, after step `step` - 1; then begin again. Errors as for `check`."""
        self.check(step)
        mean = {name: total.cpu() / self.num_steps for name, total in self.sums.items()}
        seconds = time.monotonic() - self.began
        record = {
            "tokens": schedule.tokens_before(step),
            "batch_sequences": schedule.batch_sequences(step - 1),
            "loss": float(mean["loss"]),
            "grad_norm": float(mean["grad_norm"]),
            "lr": schedule.learning_rate(step - 1),
            **_of_experts(mean),
            "tokens_per_s": self.num_timed_tokens / max(seconds, 1e-9),
        }
        self.num_steps, self.sums = 0, {}
        self.restart_clock()
        return record


def _of_experts(mean: dict[str, Tensor]) -> dict[str, Any]:
    """Averages over the MoE layers, and the load of each; nothing for a dense model."""
    load_LE = mean["expert_load_LE"]
    if not len(load_LE):
        return {}
    losses = mean["balance_losses_L3"].mean(0).tolist()
    return {
        "balance_loss": dict(zip(BALANCE_LOSSES, losses, strict=True)),
        "drop_rate": float(mean["drop_rate_L"].mean()),
        "devices_per_token": float(mean["devices_per_token_L"].mean()),
        # By name, as TensorBoard wants it.
        "load_max_over_mean": {f"moe_layer_{i}": x for i, x in enumerate(max_over_mean(load_LE).tolist(), 1)},
        "expert_load": [[round(x, 5) for x in row] for row in load_LE.tolist()],
    }


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        out |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return out
