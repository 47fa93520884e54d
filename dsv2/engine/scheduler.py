"""Continuous batching: which tokens of which sequences the next step computes, and what follows from its results.

Every step first decodes (a token of every sequence that has one left), then continues prompts in chunks, then admits
waiting sequences, all in order of arrival and within a budget of tokens. A sequence gets pages for all it is known to
hold when it is admitted, and one page more whenever it grows into it; where none is left, the latest arrival gives up
its pages and is computed again later, as far as the prefix cache does not still have it.

Steps may be scheduled while earlier ones run, so the host can prepare the next step meanwhile: a token that is not
known yet is *pending*. Freed pages may be given away at once, since steps run in the order they were scheduled in.

Policy only: this room computes no token, holds no tensor and needs no torch.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections import abc, deque
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from dsv2.config.engine import PAGE_SIZE, EngineConfig
from dsv2.config.schema import require
from dsv2.engine.blocks import PagePool
from dsv2.engine.sequence import FinishReason, Request, Sequence, Status

OPEN_DRAFT = -1
"""Stands for a draft that is not known yet: a draft model draws it when the step runs."""

_NO_DRAFTS: abc.Mapping[int, abc.Sequence[int]] = MappingProxyType({})


class Scheduled(NamedTuple):
    """A sequence's part of a step: its positions start to start + num_tokens - 1, through `sequence.pages`.

    The pages before start // 64 are those of its step before, unless `epoch` changed. Where `samples`, tokens are drawn
    after each of the last 1 + len(draft_ids) positions, and the one after position p is output number
    p + 1 - num_prompt_tokens; otherwise none is.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    draft_ids: tuple[int, ...]
    samples: bool
    epoch: int
    """How often the sequence had been preempted: with every time its pages are new ones."""

    def known_ids(self) -> list[int]:
        """The ids of the positions, up to those that only the device knows: a pending token, or open drafts.

        To be called before the scheduler is told anything else.
        """
        stop = self.start + self.num_tokens - len(self.draft_ids)
        return [*self.sequence.token_ids[self.start : stop], *(i for i in self.draft_ids if i != OPEN_DRAFT)]


@dataclass(frozen=True, slots=True)
class Step:
    """What the runner computes at once; no sequence is in it twice."""

    number: int
    entries: tuple[Scheduled, ...]

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.entries)


class Scheduler:
    """Arrivals in, steps out, results in. `pool` and `running` (by arrival) are for reading."""

    def __init__(self, config: EngineConfig, *, num_pages: int, eos_token_ids: abc.Iterable[int] = ()) -> None:
        self.config = config
        self.pool = PagePool(num_pages)
        self.running: list[Sequence] = []
        self._waiting: list[Sequence] = []  # by arrival
        self._requests: dict[str, Request] = {}
        self._in_flight: deque[Step] = deque()
        self._eos_token_ids = frozenset(eos_token_ids)
        self._arrivals, self._numbers = itertools.count(), itertools.count()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Steps that were scheduled and are not complete."""
        return len(self._in_flight)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    # Arrivals and departures --------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request's sequences. Raises ValueError, with nothing queued, where they could never run."""
        require(request.id not in self._requests, f"request id {request.id!r} is in use, expected another")
        require(
            all(s.arrival < 0 for s in request.sequences),
            f"request {request.id!r} was added before, expected a new one",
        )
        self._check_length(request.sequences[0])
        for sequence in request.sequences:
            sequence.arrival = next(self._arrivals)
        self._requests[request.id] = request
        self._waiting += request.sequences

    def abort(self, request_id: str) -> None:
        """End what is unfinished of a request, whatever it is doing. Without effect where nothing is."""
        request = self._requests.get(request_id)
        for sequence in request.sequences if request else ():
            self.finish(sequence, "abort")

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence before the scheduler would, as a stop string does. Without effect on a finished one."""
        if sequence.is_finished:
            return
        queue = self.running if sequence.status is Status.RUNNING else self._waiting
        del queue[bisect_left(queue, sequence.arrival, key=_arrival)]
        self._release_pages(sequence)
        sequence.status, sequence.finish_reason = Status.FINISHED, reason
        if self._requests[sequence.request_id].is_finished:
            del self._requests[sequence.request_id]

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, as new weights require. Raises ValueError while sequences hold pages."""
        self.pool.forget()

    # Before a step ------------------------------------------------------------------------------------------------

    def schedule(self, drafts: abc.Mapping[int, abc.Sequence[int]] = _NO_DRAFTS) -> Step | None:
        """The next step, or None where nothing can run before a step in flight is complete, or nothing is left.

        `drafts`: by arrival, ids that may follow a sequence's known tokens; all are known, or none. As many of them are
        taken as budget, free pages and the sequence's length allow: none where it is not about to compute its last
        token, and known.
        """
        budget = self.config.max_num_batched_tokens
        decoding = self._grow()
        budget -= len(decoding)
        entries = []
        for sequence in decoding:
            draft_ids = self._fit_draft(sequence, drafts.get(sequence.arrival, ()), budget)
            budget -= len(draft_ids)
            entries.append(self._take(sequence, 1, draft_ids))
        for sequence in self.running:
            if budget and sequence.num_uncomputed_tokens > 1:
                entries.append(self._take(sequence, min(budget, sequence.num_uncomputed_tokens)))
                budget -= entries[-1].num_tokens
        entries += self._admit(budget)
        if not entries:
            return None
        step = Step(next(self._numbers), tuple(entries))
        self._in_flight.append(step)
        return step

    def _grow(self) -> list[Sequence]:
        """The sequences with one token left to compute, each with a page for it; preempts where pages run out."""
        ready = []
        i = 0
        while i < len(self.running):  # which loses its last ones meanwhile
            sequence = self.running[i]
            has_room = sequence.num_tokens + sequence.num_pending_tokens < self._max_length(sequence)
            if sequence.num_uncomputed_tokens == 1 and has_room and self._grow_pages(sequence):
                ready.append(sequence)
            i += 1
        return ready

    def _grow_pages(self, sequence: Sequence) -> bool:
        """Whether the sequence has, or gets, a page for its next token. The latest arrival keeps its own and waits."""
        if sequence.num_computed_tokens < len(sequence.pages) * PAGE_SIZE:
            return True
        while not self.pool.num_available:
            if self.running[-1] is sequence:
                return False
            self._preempt_latest()
        sequence.pages.append(self.pool.allocate())
        return True

    def _preempt_latest(self) -> None:
        sequence = self.running.pop()
        self._release_pages(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.status = Status.PREEMPTED
        insort(self._waiting, sequence, key=_arrival)

    def _fit_draft(self, sequence: Sequence, draft_ids: abc.Sequence[int], budget: int) -> tuple[int, ...]:
        """As much of a draft as fits. It takes spare pages only: nobody is preempted for a guess."""
        if not draft_ids or sequence.num_pending_tokens:
            return ()
        # Of k drafts k + 1 tokens may follow.
        num_drafts = min(len(draft_ids), budget, self._max_length(sequence) - sequence.num_tokens - 1)
        num_pages = _num_pages(sequence.num_tokens + num_drafts)
        while len(sequence.pages) < num_pages and self.pool.num_available > len(self.running):
            sequence.pages.append(self.pool.allocate())
        num_drafts = min(num_drafts, len(sequence.pages) * PAGE_SIZE - sequence.num_tokens)
        return tuple(draft_ids[:num_drafts])

    def _take(self, sequence: Sequence, num_tokens: int, draft_ids: tuple[int, ...] = ()) -> Scheduled:
        start = sequence.num_computed_tokens
        samples = num_tokens == sequence.num_uncomputed_tokens
        num_tokens += len(draft_ids)
        sequence.num_computed_tokens += num_tokens
        sequence.num_pending_tokens += samples
        return Scheduled(sequence, start, num_tokens, draft_ids, samples, sequence.num_preemptions)

    # Admission ----------------------------------------------------------------------------------------------------

    def _admit(self, budget: int) -> list[Scheduled]:
        """First chunks of waiting sequences, in order of arrival until one does not fit.

        A sequence whose next page another one is just computing is passed over: it will find that page.
        """
        entries = []
        for sequence in self._waiting[: self.config.max_num_seqs]:
            is_full = not budget or len(self.running) == self.config.max_num_seqs
            if is_full or sequence.num_pending_tokens:
                break
            cached = self._cached_pages(sequence)
            if self._is_being_computed(sequence, len(cached)):
                continue
            if not self._fits(sequence, cached):
                break
            self._start(sequence, cached)
            entries.append(self._take(sequence, min(budget, sequence.num_uncomputed_tokens)))
            budget -= entries[-1].num_tokens
        return entries

    def _cached_pages(self, sequence: Sequence) -> list[int]:
        """Published pages of the sequence's beginning, without the one of its last token, which is always computed."""
        pages: list[int] = []
        for i in range(self._num_readable_pages(sequence)):
            page = self.pool.find(sequence.page_key(i))
            if page is None:
                break
            pages.append(page)
        return pages

    def _is_being_computed(self, sequence: Sequence, page_idx: int) -> bool:
        return page_idx < self._num_readable_pages(sequence) and self.pool.is_promised(sequence.page_key(page_idx))

    def _num_readable_pages(self, sequence: Sequence) -> int:
        # Log-probabilities of the prompt need all of it computed, by one of the request's sequences.
        computes_all = sequence.params.prompt_logprobs is not None and sequence.index == 0
        if computes_all or not self.config.enable_prefix_caching:
            return 0
        return (sequence.num_tokens - 1) // PAGE_SIZE

    def _fits(self, sequence: Sequence, cached: list[int]) -> bool:
        """Whether there are pages for all its tokens, and one for each running sequence to grow into."""
        num_idle = sum(map(self.pool.is_idle, cached))
        num_new = _num_pages(sequence.num_tokens) - len(cached)
        return num_new + len(self.running) <= self.pool.num_available - num_idle

    def _start(self, sequence: Sequence, cached: list[int]) -> None:
        del self._waiting[bisect_left(self._waiting, sequence.arrival, key=_arrival)]
        insort(self.running, sequence, key=_arrival)
        for page in cached:
            self.pool.share(page)
        num_new = _num_pages(sequence.num_tokens) - len(cached)
        sequence.pages = cached + [self.pool.allocate() for _ in range(num_new)]
        if self.config.enable_prefix_caching:
            for i in range(len(cached), sequence.num_tokens // PAGE_SIZE):
                self.pool.promise(sequence.pages[i], sequence.page_key(i))
        sequence.num_computed_tokens = len(cached) * PAGE_SIZE
        if sequence.status is Status.WAITING:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        sequence.status = Status.RUNNING

    # After a step -------------------------------------------------------------------------------------------------

    def complete(self, step: Step, token_ids: abc.Sequence[abc.Sequence[int]]) -> list[int]:
        """Take in a step's results: append tokens, finish sequences, publish full pages, free pages.

        Args:
            step: the oldest one in flight.
            token_ids: for every entry the tokens drawn: none unless it samples; otherwise the accepted drafts and the
                one token after them.

        Returns how many of each entry's tokens were kept: all, or those up to the sequence's end, whose `finish_reason`
        is then set; none of a sequence that finished before.

        Raises ValueError, with nothing changed, for another step or another number of tokens.
        """
        self._check_results(step, token_ids)
        self._in_flight.popleft()
        return [self._complete(entry, ids) for entry, ids in zip(step.entries, token_ids, strict=True)]

    def _complete(self, entry: Scheduled, token_ids: abc.Sequence[int]) -> int:
        sequence = entry.sequence
        if sequence.is_finished:
            return 0
        sequence.num_pending_tokens -= entry.samples
        num_before = sequence.num_tokens
        reason = self._append(sequence, token_ids)
        if entry.epoch == sequence.num_preemptions:
            num_rejected = 1 + len(entry.draft_ids) - len(token_ids) if entry.samples else 0
            sequence.num_computed_tokens -= num_rejected
            self._publish(sequence, entry.start, entry.start + entry.num_tokens - num_rejected)
            if entry.draft_ids:
                self._release_pages(sequence, keep=_num_pages(sequence.num_computed_tokens))
        if reason:
            self.finish(sequence, reason)
        return sequence.num_tokens - num_before

    def _append(self, sequence: Sequence, token_ids: abc.Sequence[int]) -> FinishReason | None:
        for token_id in token_ids:
            sequence.token_ids.append(token_id)
            if self._is_stop(sequence, token_id):
                return "stop"
            if sequence.num_tokens >= self._max_length(sequence):
                return "length"
        return None

    def _is_stop(self, sequence: Sequence, token_id: int) -> bool:
        params = sequence.params
        if sequence.num_output_tokens < params.min_tokens:
            return False
        return token_id in params.stop_token_ids or (token_id in self._eos_token_ids and not params.ignore_eos)

    def _publish(self, sequence: Sequence, start: int, stop: int) -> None:
        """Publish the pages that became full when the positions start to stop - 1 were computed."""
        if self.config.enable_prefix_caching:
            # Accepted drafts after a token that ended the sequence are in the cache, but not in the sequence.
            for i in range(start // PAGE_SIZE, min(stop, sequence.num_tokens) // PAGE_SIZE):
                self.pool.publish(sequence.pages[i], sequence.page_key(i))

    def _release_pages(self, sequence: Sequence, keep: int = 0) -> None:
        # The last first, so that a beginning is forgotten after what follows it.
        while len(sequence.pages) > keep:
            self.pool.release(sequence.pages.pop())

    # Limits -------------------------------------------------------------------------------------------------------

    def _max_length(self, sequence: Sequence) -> int:
        """Tokens that the sequence may come to have."""
        max_tokens = sequence.params.max_tokens
        limit = self.config.max_model_len
        return limit if max_tokens is None else min(limit, sequence.num_prompt_tokens + max_tokens)

    def _check_length(self, sequence: Sequence) -> None:
        num_prompt, max_length = sequence.num_prompt_tokens, self._max_length(sequence)
        require(
            num_prompt < self.config.max_model_len,
            f"request {sequence.request_id!r}: a prompt of {num_prompt} tokens leaves no room for output, expected at "
            f"most {self.config.max_model_len - 1} (max_model_len={self.config.max_model_len})",
        )
        # The last token is never computed.
        num_pages, capacity = _num_pages(max_length - 1), self.pool.num_pages * PAGE_SIZE + 1
        require(
            num_pages <= self.pool.num_pages,
            f"request {sequence.request_id!r}: a prompt of {num_prompt} tokens with max_tokens="
            f"{sequence.params.max_tokens} may need {num_pages} pages of {PAGE_SIZE} tokens, the cache has "
            f"{self.pool.num_pages}: {_what_fits(num_prompt, capacity)}",
        )

    def _check_results(self, step: Step, token_ids: abc.Sequence[abc.Sequence[int]]) -> None:
        oldest = self._in_flight[0].number if self._in_flight else None
        require(oldest == step.number, f"step {step.number} is not the oldest in flight, which is {oldest}")
        num_entries = len(step.entries)
        require(len(token_ids) == num_entries, f"{len(token_ids)} lists of tokens for a step of {num_entries} entries")
        for i, (entry, ids) in enumerate(zip(step.entries, token_ids, strict=True)):
            low, high = (1, 1 + len(entry.draft_ids)) if entry.samples else (0, 0)
            require(low <= len(ids) <= high, f"entry {i} has {len(ids)} tokens, expected {low} to {high}")


def _what_fits(num_prompt: int, capacity: int) -> str:
    if num_prompt < capacity:
        return f"max_tokens={capacity - num_prompt} would fit"
    return f"a prompt of {capacity - 1} tokens would fit"


def _num_pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
