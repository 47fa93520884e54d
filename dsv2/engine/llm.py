"""`LLM`: a model that answers many prompts at once. Prompts in, texts and token ids out, under vLLM's names.

Joins scheduler, runner and tokenizer, and finds stop strings in what was generated. One caller at a time; no server, no
log-probabilities of candidates, no speculation.
"""

from __future__ import annotations

import itertools
from collections import abc
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import cast

import torch

from dsv2.config.engine import EngineConfig
from dsv2.config.schema import require
from dsv2.device import pick_device
from dsv2.engine.runner import Drawn, Runner, default_num_pages
from dsv2.engine.sampling import SamplingParams
from dsv2.engine.scheduler import Scheduler
from dsv2.engine.sequence import FinishReason, Request, Sequence
from dsv2.model import Transformer
from dsv2.text import StreamDecoder, Tokenizer, encode_chat
from dsv2.weights import load, parse_dtype, resolve

Prompt = str | abc.Sequence[int]
Conversation = abc.Sequence[abc.Mapping[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One of the n answers to a prompt."""

    index: int
    text: str
    """Without the stop string or stop token, unless asked for. Empty without a tokenizer."""
    token_ids: list[int]
    """All that was generated, the tokens of a stop string and the stop token included."""
    cumulative_logprob: float
    """Sum of the tokens' log-probabilities under the model itself."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    """By index."""


class LLM:
    """Continuous batching over a paged cache. `config`, `scheduler` and `runner` are for reading.

    Args:
        model: a model, whose own parameters are used where they are and as they are at every step; or a checkpoint's
            directory or hub id, whose tokenizer is read too.
        tokenizer: or where to read it; needed for prompts, answers and stop strings that are text.
        device, dtype: of a checkpoint to read; None: a GPU where there is one, and the files' own.
        max_model_len: tokens of a sequence, prompt and output; None: the model's `max_position_embeddings`.
        num_pages: of 64 tokens; None: as many as the sequences can need, within 1 GB on the CPU, or within what
            `gpu_memory_utilization` leaves on a GPU.

    The other arguments are `EngineConfig`'s. Raises ValueError for limits outside their ranges, for a device or dtype
    that the given model does not have, and for what `load` and `Tokenizer.load` refuse.
    """

    def __init__(
        self,
        model: Transformer | str | Path,
        tokenizer: Tokenizer | str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        num_pages: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.model, self.tokenizer = _load(model, tokenizer, device, dtype)
        cfg = self.model.cfg
        self.config = EngineConfig(
            max_model_len=cfg.max_position_embeddings if max_model_len is None else max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_pages=num_pages,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=enable_prefix_caching,
        )
        if num_pages is None:
            num_pages = default_num_pages(self.model, self.config)
        self.scheduler = Scheduler(self.config, num_pages=num_pages, eos_token_ids=cfg.eos_token_ids)
        self.runner = Runner(self.model, num_pages)
        self._request_ids = map(str, itertools.count())

    def generate(
        self,
        prompts: Prompt | abc.Sequence[Prompt],
        sampling_params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt. Returns one output a prompt, in the order given.

        Args:
            prompts: text, which is encoded after a BOS, or token ids, taken as they are; one or a list.
            sampling_params: for all, or one for each prompt; None: the defaults.

        A sequence of a given `seed` draws the same whatever else is in the batch (sample i of n has seed + i). Without
        one, seeds follow from the order of arrival: the same calls to a new engine give the same answers.

        Raises ValueError, with nothing left in the engine, for a prompt that is empty, too long, or not of the
        vocabulary, for text without a tokenizer, and for parameters that the engine does not know.
        """
        prompts = _as_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        require(
            len(sampling_params) == len(prompts),
            f"{len(sampling_params)} sampling params for {len(prompts)} prompts, expected one or as many",
        )
        requests = [self._request(*each) for each in zip(prompts, sampling_params, strict=True)]
        answers = {sequence: _Answer(sequence, self.tokenizer) for r in requests for sequence in r.sequences}
        try:
            for request in requests:
                self.scheduler.add(request)
            while self.scheduler.has_unfinished:
                self._step(answers)
        finally:
            for request in requests:
                self.scheduler.abort(request.id)
        return [_output(request, answers) for request in requests]

    def chat(
        self,
        messages: Conversation | abc.Sequence[Conversation],
        sampling_params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        *,
        template: str | None = None,
    ) -> list[RequestOutput]:
        """The assistant's answer to one conversation or each of a list, laid out by `encode_chat`.

        Raises ValueError as `generate` and `encode_chat` do.
        """
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer: give one to LLM")
        is_one = bool(messages) and isinstance(messages[0], abc.Mapping)
        conversations = cast("abc.Sequence[Conversation]", [messages] if is_one else messages)
        prompts = [encode_chat(self.tokenizer, each, template=template) for each in conversations]
        return self.generate(prompts, sampling_params)

    def refresh(self) -> None:
        """To be called when the model's parameters have changed: what is cached belongs to the old ones."""
        self.scheduler.forget_prefixes()

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        request_id = next(self._request_ids)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            require(value is None, f"request {request_id!r}: {name}={value} is not supported yet, expected None")
        vocab_size = self.model.cfg.vocab_size
        params.check_vocabulary(vocab_size)
        if self.tokenizer is None:
            is_text = "prompt" if isinstance(prompt, str) else "stop" if params.stop else None
            require(is_text is None, f"request {request_id!r}: {is_text} is text, which needs a tokenizer: give one")
        elif isinstance(prompt, str):
            require(prompt != "", f"request {request_id!r}: prompt is empty, expected some text")
            prompt = self.tokenizer.encode(prompt, add_bos=True)
        request = Request(request_id, cast("abc.Sequence[int]", prompt), params)
        highest = max(request.sequences[0].token_ids)
        require(
            highest < vocab_size,
            f"request {request_id!r}: token id {highest} is outside the vocabulary of {vocab_size}",
        )
        return request

    def _step(self, answers: abc.Mapping[Sequence, _Answer]) -> None:
        step = self.scheduler.schedule()
        assert step is not None, "unfinished sequences, none of which can run"
        try:
            drawn = self.runner.run(step)
        except BaseException:
            # Nothing that this step should have written may be read.
            for entry in step.entries:
                self.scheduler.abort(entry.sequence.request_id)
            self.scheduler.complete(step, [[0] * entry.samples for entry in step.entries])
            raise
        self.scheduler.complete(step, [[each.token_id] if each else [] for each in drawn])
        for entry, each in zip(step.entries, drawn, strict=True):
            if each:
                answer = answers[entry.sequence]
                answer.take(each)
                if answer.is_stopped:
                    self.scheduler.finish(entry.sequence, "stop")


class _Answer:
    """What comes with a sequence's tokens: their text, cut at a stop string, and their log-probability."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None) -> None:
        self.sequence, self.params = sequence, sequence.params
        self.text, self.cumulative_logprob = "", 0.0
        self.is_stopped = False
        self._decoder = None
        if tokenizer is not None:
            self._decoder = StreamDecoder(tokenizer, skip_special_tokens=self.params.skip_special_tokens)

    def take(self, drawn: Drawn) -> None:
        """The sequence's new last token."""
        self.cumulative_logprob += drawn.log_prob
        if self._decoder is None:
            return
        is_stop_token = self.sequence.finish_reason == "stop"
        if not is_stop_token or self.params.include_stop_str_in_output:
            self._append(self._decoder.push(drawn.token_id))
        if self.sequence.is_finished and not self.is_stopped:
            self.text += self._decoder.flush()

    def _append(self, text: str) -> None:
        num_before = len(self.text)
        self.text += text
        if self.sequence.num_output_tokens <= self.params.min_tokens:
            return
        if found := find_stop(self.text, num_before, self.params.stop):
            start, stop = found
            self.text = self.text[: stop if self.params.include_stop_str_in_output else start]
            self.is_stopped = True


def find_stop(text: str, num_before: int, stops: abc.Iterable[str]) -> tuple[int, int] | None:
    """Bounds of the first stop string to be complete, the longest of several, that ends after `num_before` characters.

    So the answer does not depend on how the text was cut into tokens.
    """
    starts = ((text.find(stop, max(0, num_before - len(stop) + 1)), len(stop)) for stop in stops)
    found = [(start + length, start) for start, length in starts if start >= 0]
    if not found:
        return None
    stop, start = min(found)
    return start, stop


def _output(request: Request, answers: abc.Mapping[Sequence, _Answer]) -> RequestOutput:
    first = request.sequences[0]
    return RequestOutput(
        request_id=request.id,
        prompt_token_ids=first.token_ids[: first.num_prompt_tokens],
        outputs=[_completion(answers[sequence]) for sequence in request.sequences],
    )


def _completion(answer: _Answer) -> CompletionOutput:
    sequence = answer.sequence
    assert sequence.finish_reason is not None
    return CompletionOutput(
        index=sequence.index,
        text=answer.text,
        token_ids=sequence.output_ids,
        cumulative_logprob=answer.cumulative_logprob,
        # A stop string may end with the last token that there was room for.
        finish_reason="stop" if answer.is_stopped else sequence.finish_reason,
    )


def _as_list(prompts: Prompt | abc.Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], Integral)):
        return [cast("Prompt", prompts)]
    return list(cast("abc.Sequence[Prompt]", prompts))


def _load(
    model: Transformer | str | Path,
    tokenizer: Tokenizer | str | Path | None,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
) -> tuple[Transformer, Tokenizer | None]:
    device = None if device is None else pick_device(str(device))
    dtype = parse_dtype(dtype) if isinstance(dtype, str) else dtype
    if isinstance(model, Transformer):
        own = model.device
        is_there = device is None or (device.type == own.type and device.index in (None, own.index))
        require(is_there, f"device={device} is not the model's, which is {own}: move the model, or give None")
        has_dtype = dtype in (None, model.dtype)
        require(has_dtype, f"dtype={dtype} is not the model's, which is {model.dtype}: convert the model, or give None")
    else:
        directory = resolve(model)
        if tokenizer is None and (directory / "tokenizer.json").is_file():
            tokenizer = directory
        model = load(directory, device=device or pick_device(), dtype=dtype)
    return model, Tokenizer.load(tokenizer) if isinstance(tokenizer, (str, Path)) else tokenizer
