"""`LLM`: a model that answers many prompts at once. Prompts in, texts and token ids out, under vLLM's names.

Reads checkpoints, drives an `Engine` until every prompt is answered, and adds up what its steps say. One caller at a
time; who wants answers as they come, or requests that come and go, uses the engine itself.
"""

from __future__ import annotations

import time
from collections import abc
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from dsv2.adapters import load_adapter, restore
from dsv2.config.engine import EngineConfig
from dsv2.config.schema import require
from dsv2.device import pick_device
from dsv2.engine.core import Engine
from dsv2.engine.outputs import CompletionOutput, Delta, LogprobsOfToken, RequestOutput
from dsv2.engine.sampling import SamplingParams
from dsv2.engine.sequence import Request
from dsv2.model import Transformer
from dsv2.text import Tokenizer, encode_chat
from dsv2.weights import load, parse_dtype, resolve

Prompt = str | abc.Sequence[int]
Conversation = abc.Sequence[abc.Mapping[str, str]]


class LLM:
    """Continuous batching over a paged cache, by `engine`.

    Args:
        model: a model, whose own parameters are used where they are and as they are at every step; or a checkpoint's
            directory or hub id, whose tokenizer is read too.
        tokenizer: or where to read it; needed for prompts, answers and stop strings that are text.
        device, dtype: of a checkpoint to read; None: a GPU where there is one, and the files' own.
        max_model_len: tokens of a sequence, prompt and output; None: the model's `max_position_embeddings`.
        num_pages: of 64 tokens; None: as many as the sequences can need, within 1 GB on the CPU, or within what
            `gpu_memory_utilization` leaves on a GPU.
        num_draft_tokens: tokens a step that are guessed, and kept where the model draws the same; 0: none. Outputs are
            the same, and come sooner where few sequences run and guesses are good.
        draft_model: a smaller model of the same vocabulary, which guesses them, or where to read it, in the same dtype;
            None: guessed is what a sequence repeats.
        adapter: LoRA weights to begin with, see `set_adapter`.

    The other arguments are `EngineConfig`'s. Raises ValueError for limits outside their ranges, for a device or dtype
    that the given model does not have, for a draft model of another vocabulary or device or without tokens to draft,
    and for what `load`, `Tokenizer.load` and `set_adapter` refuse.
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
        num_draft_tokens: int = 0,
        adapter: str | Path | None = None,
        draft_model: Transformer | str | Path | None = None,
    ) -> None:
        dtype = parse_dtype(dtype) if isinstance(dtype, str) else dtype
        model, tokenizer = _load(model, tokenizer, device, dtype)
        config = EngineConfig(
            max_model_len=model.cfg.max_position_embeddings if max_model_len is None else max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_pages=num_pages,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=enable_prefix_caching,
            num_draft_tokens=num_draft_tokens,
        )
        if isinstance(draft_model, (str, Path)):
            draft_model = load(resolve(draft_model), device=model.device, dtype=dtype)
        self.engine = Engine(model, tokenizer, config, draft_model)
        self._originals: dict[str, Tensor] = {}  # of the weights that an adapter has changed
        if adapter is not None:
            self.set_adapter(adapter)

    def generate(
        self,
        prompts: Prompt | abc.Sequence[Prompt],
        sampling_params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Continue every prompt. Returns one output a prompt, in the order given.

        Args:
            prompts: text, which is encoded after a BOS, or token ids, taken as they are; one or a list.
            sampling_params: for all, or one for each prompt; None: the defaults.
            progress: show on stderr how many answers are complete, and tokens generated a second.

        A sequence of a given `seed` draws the same whatever else is in the batch (sample i of n has seed + i). Without
        one, seeds follow from the order of arrival: the same calls to a new engine give the same answers.

        Raises ValueError, with nothing left in the engine, for a prompt that is empty, too long, or not of the
        vocabulary, for text without a tokenizer, for token ids in `sampling_params` that the model does not have, and
        while requests that were added to `engine` are unfinished.
        """
        require(not self.engine.scheduler.has_unfinished, "the engine has requests of others: let them finish first")
        prompts = _as_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        require(
            len(sampling_params) == len(prompts),
            f"{len(sampling_params)} sampling params for {len(prompts)} prompts, expected one or as many",
        )
        num_answers = sum(params.n for params in sampling_params)
        requests: list[Request] = []
        with _progress_bar(num_answers, progress) as show:
            try:
                for prompt, params in zip(prompts, sampling_params, strict=True):
                    requests.append(self.engine.add(prompt, params))
                return self._answers(requests, show)
            finally:
                for request in requests:
                    self.engine.abort(request.id)

    def chat(
        self,
        messages: Conversation | abc.Sequence[Conversation],
        sampling_params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        *,
        template: str | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """The assistant's answer to one conversation or each of a list, laid out by `encode_chat`.

        Raises ValueError as `generate` and `encode_chat` do.
        """
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise ValueError("chat needs a tokenizer: give one to LLM")
        is_one = bool(messages) and isinstance(messages[0], abc.Mapping)
        conversations = cast("abc.Sequence[Conversation]", [messages] if is_one else messages)
        prompts = [encode_chat(tokenizer, each, template=template) for each in conversations]
        return self.generate(prompts, sampling_params, progress=progress)

    def refresh(self) -> None:
        """To be called when the model's parameters have changed: what is cached belongs to the old ones."""
        self.engine.refresh()

    def set_adapter(self, adapter: str | Path | None) -> None:
        """Serve the model with these LoRA weights, in place of those set before; None: as it was, bit for bit.

        They are merged into the model's own parameters, which a trainer must leave alone until they are taken out. The
        values that were there are kept on the CPU. `adapter` is a directory or hub id, in PEFT's layout.

        Raises ValueError, with nothing changed, while requests are unfinished and as `load_adapter` does.
        """
        require(not self.engine.scheduler.has_unfinished, "the engine has requests: let them finish before an adapter")
        model = self.engine.model
        loaded = None if adapter is None else load_adapter(adapter, model)
        self.engine.refresh()
        self._take_adapter_out()
        if loaded is not None:
            self._originals = loaded.originals(model)
            try:
                loaded.merge(model)
            except BaseException:
                self._take_adapter_out()
                raise

    def _take_adapter_out(self) -> None:
        restore(self.engine.model, self._originals)
        self._originals = {}

    def _answers(
        self, requests: abc.Sequence[Request], show: abc.Callable[[abc.Sequence[Delta]], None]
    ) -> list[RequestOutput]:
        completions = {request.id: [_Completion() for _ in request.sequences] for request in requests}
        while self.engine.has_unfinished:
            deltas = self.engine.step()
            for delta in deltas:
                if delta.request_id in completions:  # else it is the end of what an earlier step of others lost
                    completions[delta.request_id][delta.index].add(delta)
            show(deltas)
        return [_output(request, completions[request.id]) for request in requests]


class _Completion:
    """One of the answers to a prompt, as its deltas add up."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[LogprobsOfToken] = []
        self.prompt_logprobs: list[LogprobsOfToken | None] | None = None
        self.last: Delta | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.last = delta

    def output(self) -> CompletionOutput:
        last = self.last
        assert last is not None and last.finish_reason is not None
        return CompletionOutput(
            index=last.index,
            text="".join(self.texts),
            token_ids=self.token_ids,
            cumulative_logprob=last.cumulative_logprob,
            logprobs=None if last.logprobs is None else self.logprobs,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
        )


def _output(request: Request, completions: abc.Sequence[_Completion]) -> RequestOutput:
    first = request.sequences[0]
    return RequestOutput(
        request_id=request.id,
        prompt_token_ids=first.token_ids[: first.num_prompt_tokens],
        prompt_logprobs=completions[0].prompt_logprobs,
        outputs=[completion.output() for completion in completions],
        num_cached_tokens=first.num_cached_tokens,
    )


@contextmanager
def _progress_bar(num_answers: int, is_shown: bool) -> abc.Iterator[abc.Callable[[abc.Sequence[Delta]], None]]:
    """Gives what is to be called with the deltas of every step."""
    if not is_shown:
        yield lambda deltas: None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    columns = *Progress.get_default_columns(), TextColumn("{task.fields[speed]}")
    start, num_tokens = time.perf_counter(), 0
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("answers", total=num_answers, speed="")

        def show(deltas: abc.Sequence[Delta]) -> None:
            nonlocal num_tokens
            num_tokens += sum(len(delta.token_ids) for delta in deltas)
            speed = num_tokens / (time.perf_counter() - start)
            num_finished = sum(delta.finish_reason is not None for delta in deltas)
            bar.update(task, advance=num_finished, speed=f"{speed:.0f} tokens/s")

        yield show


def _as_list(prompts: Prompt | abc.Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], Integral)):
        return [cast("Prompt", prompts)]
    return list(cast("abc.Sequence[Prompt]", prompts))


def _load(
    model: Transformer | str | Path,
    tokenizer: Tokenizer | str | Path | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> tuple[Transformer, Tokenizer | None]:
    device = None if device is None else pick_device(str(device))
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
