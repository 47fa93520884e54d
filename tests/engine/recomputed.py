"""What greedy generation must say, by recomputing everything for every token, and what an engine did to say it."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from typing import Any

import torch

from dsv2.config.engine import PAGE_SIZE
from dsv2.engine.core import Engine
from dsv2.engine.runner import Ticket
from dsv2.engine.scheduler import Step
from dsv2.model import Transformer
from tests.numerics import SMALL_MODELS, random_model

KINDS = ["v2", "v2-lite", "llama", "mixtral"]
NUM_TOKENS = 70

get_model = cache(lambda kind: random_model(SMALL_MODELS[kind](), seed=3))


@torch.inference_mode()
def recompute(model: Transformer, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy ids and their log-probabilities, the whole sequence through the model for every token."""
    ids, log_probs = list(prompt), []
    for _ in range(num_tokens):
        log_probs_W = model(torch.tensor(ids))[-1].log_softmax(-1)
        ids.append(int(log_probs_W.argmax()))
        log_probs.append(float(log_probs_W.max()))
    return ids[len(prompt) :], log_probs


@cache
def prompts_of(kind: str) -> list[list[int]]:
    """Short ones, and some that begin alike, near the bounds of pages."""
    rng, vocab_size = random.Random(0), get_model(kind).cfg.vocab_size

    def ids(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    common = ids(PAGE_SIZE)
    return [[7], ids(50), ids(62), common, common + ids(1), common + ids(59)]


@cache
def expected_of(kind: str) -> list[tuple[list[int], list[float]]]:
    return [recompute(get_model(kind), prompt, NUM_TOKENS) for prompt in prompts_of(kind)]


class Recorder:
    """Counts what the steps of an engine were like."""

    def __init__(self, engine: Engine, seen: Counter[str]) -> None:
        self._launch, self._seen = engine.runner.launch, seen
        self._is_padded = engine.config.cudagraph_capture_sizes is not None
        engine.runner.launch = self.launch

    def launch(self, step: Step, *args: Any, **kwargs: Any) -> Ticket:
        seen, counts = self._seen, {entry.num_tokens for entry in step.entries}
        seen["decodes of several sequences"] += counts == {1} and len(step.entries) > 1
        seen["prefill beside decode"] += 1 in counts and max(counts) > 8
        seen["padded steps"] += self._is_padded and max(counts) <= 8
        for entry in step.entries:
            seen["chunks"] += not entry.samples
            seen["steps of resumed sequences"] += entry.epoch > 0
            seen["prefix hits"] += not entry.epoch and entry.start == entry.sequence.num_cached_tokens > 0
            seen["tokens on the device"] += not entry.known_ids()
            seen["drafts"] += len(entry.draft_ids)
        return self._launch(step, *args, **kwargs)
