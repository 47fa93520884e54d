"""`Engine`: requests in, what each step adds to them out. The loop around scheduler and runner.

It checks requests, keeps the device busy while the host works (step n + 1 is launched before the results of step n are
taken), turns tokens into text and ends sequences at their stop strings. It computes nothing and decides no schedule.
One thread calls it at a time; who waits for whom is up to callers: `llm` for a list of prompts, a server for clients.
"""

from __future__ import annotations

import itertools
from collections import abc, deque
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np

from dsv2.config.engine import EngineConfig
from dsv2.config.schema import require
from dsv2.engine.draft import check_draft_model
from dsv2.engine.draw import is_penalised
from dsv2.engine.ngram import NgramDrafts
from dsv2.engine.outputs import Delta, Logprob, LogprobsOfToken
from dsv2.engine.paged import default_num_pages
from dsv2.engine.runner import Drawn, Runner, Ticket
from dsv2.engine.sampling import SamplingParams
from dsv2.engine.scheduler import OPEN_DRAFT, Scheduler, Step
from dsv2.engine.sequence import FinishReason, Request, Sequence
from dsv2.engine.stops import StopStrings
from dsv2.engine.structured import Grammars, Matcher
from dsv2.model import Transformer
from dsv2.text import StreamDecoder, Tokenizer


@dataclass(slots=True)
class DraftCounts:
    """Of all steps so far: drafts, which are of one sequence in one step, their tokens, and those that were right."""

    num_drafts: int = 0
    num_tokens: int = 0
    num_accepted_tokens: int = 0

    def add(self, num_tokens: int, num_accepted_tokens: int) -> None:
        """Without effect where nothing was drafted."""
        if num_tokens:
            self.num_drafts += 1
            self.num_tokens += num_tokens
            self.num_accepted_tokens += num_accepted_tokens


class Engine:
    """Continuous batching over a paged cache. All attributes are for reading.

    `model` is used where it is, with its parameters as they are at every step; so is `draft_model`, which guesses
    tokens instead of looking for what repeats. Raises ValueError where that has another vocabulary or device, and where
    there is no memory for a page of the cache.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        draft_model: Transformer | None = None,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.draft_counts = DraftCounts()
        self._has_draft_model = draft_model is not None
        if draft_model is not None:
            check_draft_model(draft_model, model, config)
        models = [model] if draft_model is None else [model, draft_model]
        num_pages = default_num_pages(config, *models) if config.num_pages is None else config.num_pages
        self.scheduler = Scheduler(config, num_pages=num_pages, eos_token_ids=model.cfg.eos_token_ids)
        self.runner = Runner(model, num_pages, config, draft_model)
        self._text_of = cache(lambda i: tokenizer.decode([i], skip_special_tokens=False) if tokenizer else "")
        self._requests: dict[str, Request] = {}  # unfinished ones
        self._answers: dict[Sequence, _Answer] = {}  # of unfinished sequences
        self._in_flight: deque[tuple[Step, Ticket]] = deque()
        self._lost: list[Delta] = []
        self._request_ids = map(str, itertools.count())
        self._grammars = (
            None if tokenizer is None else Grammars(tokenizer, model.cfg.vocab_size, model.cfg.eos_token_ids)
        )

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self._in_flight or self._lost or self._requests)

    def add(self, prompt: str | abc.Sequence[int], params: SamplingParams, request_id: str | None = None) -> Request:
        """Queue a request; `step` will tell of it under its id.

        Args:
            prompt: text, which is encoded after a BOS, or token ids, taken as they are.
            request_id: not that of an unfinished request; None: one that is free.

        Raises ValueError, with nothing queued, for a prompt that is empty, too long, or not of the vocabulary, for text
        without a tokenizer, and for token ids in `params` that the model does not have.
        """
        if request_id is None:
            request_id = next(i for i in self._request_ids if i not in self._requests)
        request = self._checked(request_id, prompt, params)
        answers = {s: _Answer(s, self.tokenizer, self._text_of, self._matcher(params)) for s in request.sequences}
        self.scheduler.add(request)
        self._requests[request_id] = request
        self._answers |= answers
        return request

    def abort(self, request_id: str) -> None:
        """End a request; no delta of it comes any more. Without effect on finished and unknown ones."""
        self._lost = [delta for delta in self._lost if delta.request_id != request_id]
        self._end(request_id)

    def step(self) -> list[Delta]:
        """Keep the device busy, and take the results of the oldest step: a delta of each sequence that got tokens.

        An exception out of the device ends the requests that it was working for. Nothing that it did is read later, and
        the next call returns a last delta of each of their sequences, of finish_reason "abort". Others go on.
        """
        # Drafts and masks follow known tokens only: where there may be any, every result is taken before scheduling.
        max_in_flight = 1 if self.config.num_draft_tokens or self._has_masks else 2
        while len(self._in_flight) < max_in_flight and self._launch():
            pass
        assert self._in_flight or not self._requests, "unfinished sequences, none of which can run"
        deltas = self._take() if self._in_flight else []
        lost, self._lost = self._lost, []
        return lost + deltas

    def refresh(self) -> None:
        """To be called when the model's parameters have changed: what is cached belongs to the old ones.

        Raises ValueError while sequences hold pages.
        """
        self.scheduler.forget_prefixes()

    # Requests -----------------------------------------------------------------------------------------------------

    def _checked(self, request_id: str, prompt: str | abc.Sequence[int], params: SamplingParams) -> Request:
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

    def _end(self, request_id: str) -> list[_Answer]:
        """Abort what is unfinished of a request. Returns what was answered of that."""
        self.scheduler.abort(request_id)
        request = self._requests.pop(request_id, None)
        sequences = request.sequences if request else []
        return [self._answers.pop(sequence) for sequence in sequences if sequence in self._answers]

    # Steps --------------------------------------------------------------------------------------------------------

    def _launch(self) -> bool:
        """Whether there was a step to launch."""
        step = self.scheduler.schedule(self._drafts())
        if step is None:
            return False
        try:
            self._in_flight.append((step, self.runner.launch(step, self._masks(step))))
        except BaseException:
            self._abandon(*(step for step, _ in self._in_flight), step)
            raise
        return True

    @property
    def _has_masks(self) -> bool:
        return any(answer.mask is not None for answer in self._answers.values())

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        if params.structured_outputs is None:
            return None
        require(params.min_tokens == 0, f"min_tokens={params.min_tokens} with structured_outputs: expected 0")
        if self._grammars is None:
            raise ValueError("structured_outputs needs a tokenizer: give one")
        return self._grammars.matcher(params.structured_outputs)

    def _masks(self, step: Step) -> dict[int, np.ndarray]:
        """By arrival, the tokens that sequences of a given structure may draw."""
        answers = ((entry.sequence, self._answers.get(entry.sequence)) for entry in step.entries if entry.samples)
        return {s.arrival: answer.mask for s, answer in answers if answer is not None and answer.mask is not None}

    def _drafts(self) -> dict[int, list[int]]:
        """By arrival, for the sequences that are about to decode and may have any."""
        num_tokens = self.config.num_draft_tokens
        if not num_tokens:
            return {}
        ready = (s for s in self.scheduler.running if s.num_uncomputed_tokens == 1 and _takes_drafts(s))
        if self._has_draft_model:
            return {s.arrival: [OPEN_DRAFT] * num_tokens for s in ready}
        return {s.arrival: self._answers[s].ngrams.propose(s.token_ids, num_tokens) for s in ready}

    def _take(self) -> list[Delta]:
        """The results of the oldest step in flight, waiting for them."""
        step, ticket = self._in_flight[0]
        try:
            results = ticket.results()
        except BaseException:
            self._abandon(*(step for step, _ in self._in_flight))
            raise
        self._in_flight.popleft()
        ids = [[each.token_id for each in drawn] for drawn in results.drawn]
        num_kept = self.scheduler.complete(step, ids)
        deltas = []
        for entry, drawn, prompt, count in zip(step.entries, results.drawn, results.prompt, num_kept, strict=True):
            self.draft_counts.add(len(entry.draft_ids), len(drawn) - 1)
            answer = self._answers.get(entry.sequence)
            if answer is None:  # it ended while the step ran
                continue
            answer.take_prompt(prompt or [], entry.start + 1)
            if count:
                deltas.append(answer.take(drawn[:count]))
            if answer.finish_reason is not None:
                self._close(entry.sequence, answer.finish_reason)
        return deltas

    def _close(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.finish(sequence, reason)  # a stop string ends it here only
        del self._answers[sequence]
        request = self._requests[sequence.request_id]
        if not any(each in self._answers for each in request.sequences):
            del self._requests[request.id]

    def _abandon(self, *steps: Step) -> None:
        """Give up these steps, all that are in flight. Nothing that they should have written may be read."""
        sequences = [entry.sequence for step in steps for entry in step.entries]
        # Another request may have the id of one that was aborted meanwhile.
        for request_id in dict.fromkeys(s.request_id for s in sequences if s in self._answers):
            self._lost += [answer.abandon() for answer in self._end(request_id)]
        for step in steps:
            self.scheduler.complete(step, [[0] * entry.samples for entry in step.entries])
        self._in_flight.clear()


def _takes_drafts(sequence: Sequence) -> bool:
    """Whether the model's scores decide alone, not what was drawn before or how much."""
    params = sequence.params
    return (
        not is_penalised(params)
        and params.structured_outputs is None
        and sequence.num_output_tokens >= params.min_tokens
    )


class _Answer:
    """What an unfinished sequence's tokens come with: text, up to a stop string, and log-probabilities."""

    def __init__(
        self,
        sequence: Sequence,
        tokenizer: Tokenizer | None,
        text_of: abc.Callable[[int], str],
        matcher: Matcher | None,
    ) -> None:
        self.sequence, self.ngrams = sequence, NgramDrafts()
        self._matcher = matcher
        self.mask = None if matcher is None else matcher.mask()
        """Of the tokens that may come next, where a form is given."""
        self.finish_reason: FinishReason | None = None
        self._params, self._text_of = sequence.params, text_of
        self._stops = StopStrings(self._params.stop, is_included=self._params.include_stop_str_in_output)
        self._decoder = None
        if tokenizer is not None:
            self._decoder = StreamDecoder(tokenizer, skip_special_tokens=self._params.skip_special_tokens)
        self._num_tokens, self._cumulative_logprob = 0, 0.0
        wants_prompt = sequence.index == 0 and self._params.prompt_logprobs is not None
        self._prompt_logprobs: list[LogprobsOfToken | None] | None = [None] if wants_prompt else None

    def take_prompt(self, described: abc.Sequence[Drawn], start: int) -> None:
        """What the model says about the prompt's tokens from position `start` on; a preempted prompt comes again."""
        if self._prompt_logprobs is not None:
            num_known = len(self._prompt_logprobs) - start
            self._prompt_logprobs += [self._logprobs(each) for each in described[num_known:]]

    def take(self, drawn: abc.Sequence[Drawn]) -> Delta:
        """The sequence's new last tokens, already in it. Those after a stop string are dropped."""
        text, taken = "", []
        for each in drawn:
            taken.append(each)
            text += self._push(each, is_last=len(taken) == len(drawn))
            if self._stops.found is not None:
                break
        self.finish_reason = "stop" if self._stops.found is not None else self.sequence.finish_reason
        if self._matcher is not None and self.finish_reason is None:
            self._follow(self._matcher, taken)
        return self._delta(text + self._rest(), taken, self._stop_reason(taken[-1].token_id))

    def _follow(self, matcher: Matcher, taken: abc.Sequence[Drawn]) -> None:
        """Where the form goes on. One that takes more time than is allowed ends its own sequence, and no other."""
        try:
            for each in taken:
                matcher.accept(each.token_id)
            self.mask = matcher.mask()
        except ValueError:
            self.finish_reason = "abort"

    def abandon(self) -> Delta:
        """The last delta of a sequence whose next tokens were lost."""
        self.finish_reason, self._prompt_logprobs = "abort", None
        return self._delta(self._rest(), [], None)

    def _push(self, drawn: Drawn, is_last: bool) -> str:
        self._num_tokens += 1
        self._cumulative_logprob += drawn.log_prob
        is_stop_token = is_last and self.sequence.finish_reason == "stop"
        if self._decoder is None or (is_stop_token and not self._params.include_stop_str_in_output):
            return ""
        return self._stops.push(self._decoder.push(drawn.token_id), may_stop=self._num_tokens > self._params.min_tokens)

    def _rest(self) -> str:
        """What was held back, at the sequence's end."""
        if self.finish_reason is None or self._decoder is None or self._stops.found is not None:
            return ""
        return self._stops.flush() + self._decoder.flush()

    def _stop_reason(self, last_id: int) -> str | int | None:
        if self._stops.found is not None:
            return self._stops.found
        is_own = self.finish_reason == "stop" and last_id in self._params.stop_token_ids
        return last_id if is_own else None

    def _delta(self, text: str, taken: abc.Sequence[Drawn], stop_reason: str | int | None) -> Delta:
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return Delta(
            request_id=self.sequence.request_id,
            index=self.sequence.index,
            text=text,
            token_ids=[each.token_id for each in taken],
            logprobs=None if self._params.logprobs is None else [self._logprobs(each) for each in taken],
            finish_reason=self.finish_reason,
            stop_reason=stop_reason,
            num_cached_tokens=self.sequence.num_cached_tokens,
            prompt_logprobs=prompt_logprobs,
            cumulative_logprob=self._cumulative_logprob,
        )

    def _logprobs(self, drawn: Drawn) -> LogprobsOfToken:
        described = {drawn.token_id: Logprob(drawn.log_prob, drawn.rank, self._text_of(drawn.token_id))}
        for rank, (token_id, log_prob) in enumerate(drawn.top, 1):
            described.setdefault(token_id, Logprob(log_prob, rank, self._text_of(token_id)))
        return described
