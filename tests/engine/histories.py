"""Random histories of a scheduler: requests come, end and are aborted at any time, and laws hold after every decision.

The model of these histories stores for each position a number that depends on everything before it, and draws from all
that it reads through the page table: a stale page, a wrong bound or a wrongly shared prefix changes the tokens.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from itertools import chain
from typing import NamedTuple

import numpy as np

from dsv2.config.engine import EngineConfig
from dsv2.engine.sampling import SamplingParams
from dsv2.engine.scheduler import Scheduled, Scheduler, Step
from dsv2.engine.sequence import Request, Sequence, Status

VOCAB, EOS, MAX_LEN = 300, 0, 640
MASK = 2**64 - 1
WEIGHTS = np.random.default_rng(0).integers(2**64, size=MAX_LEN, dtype=np.uint64) | np.uint64(1)
WEIGHT_INTS = WEIGHTS.tolist()


# A model and its paged cache --------------------------------------------------------------------------------------


def mix(x: int) -> int:
    x = (x ^ x >> 31) * 0x9E3779B97F4A7C15 & MASK
    return (x ^ x >> 29) * 0xBF58476D1CE4E5B9 & MASK


def forward(ids: list[int], start: int, past: int, adapter: int) -> tuple[list[int], list[int]]:
    """What to cache of `ids` at positions from `start` on, and the digest of the cache up to each of them.

    `past` is the digest of the positions before `start`: all of them, by weights of their own.
    """
    slots, digests = [], []
    for p, token_id in enumerate(ids, start):
        slots.append(mix(past + adapter + token_id * 0xD1B54A32D192ED03 & MASK))
        past = past + slots[-1] * WEIGHT_INTS[p] & MASK
        digests.append(past)
    return slots, digests


def draw(digest: int, index: int) -> int:
    return mix(digest + index) % VOCAB


def alone(sequence: Sequence, adapter: int, max_model_len: int) -> tuple[list[int], int]:
    """The output of one sequence without cache, pages or company, and its length up to the first stop."""
    params, ids, start, digest = sequence.params, list(sequence.token_ids), 0, 0
    num_output = min(params.max_tokens or max_model_len, max_model_len - len(ids))
    for _ in range(num_output):
        digest = forward(ids[start:], start, digest, adapter)[1][-1]
        start = len(ids)
        ids.append(draw(digest, sequence.index))
    output = ids[-num_output:]
    stops = {*params.stop_token_ids, *([] if params.ignore_eos else [EOS])}
    ends = (n for n, token_id in enumerate(output, 1) if token_id in stops and n >= params.min_tokens)
    return output, next(ends, num_output)


class Launched(NamedTuple):
    """What a runner copies when it launches a step; the scheduler goes on meanwhile."""

    step: Step
    known_ids: list[list[int]]
    pages: list[list[int]]


class Device:
    """Runs launched steps in order, as late as it likes. Keeps the last token of every sequence, as a GPU would."""

    def __init__(self, num_pages: int, page_size: int, adapters: dict[str, int]) -> None:
        self.cache = np.random.default_rng(1).integers(2**64, size=(num_pages, page_size), dtype=np.uint64)
        self.page_size, self.adapters = page_size, adapters
        self.last: dict[int, int] = {}
        self.queue: deque[Launched] = deque()
        self.results: dict[int, list[list[int]]] = {}

    def launch(self, step: Step) -> None:
        entries = step.entries
        self.queue.append(Launched(step, [e.known_ids() for e in entries], [list(e.sequence.pages) for e in entries]))

    def run(self, until: int) -> None:
        """Everything up to step `until`. A step reads what earlier ones wrote, and nothing that it writes itself."""
        while self.queue and self.queue[0].step.number <= until:
            launched = self.queue.popleft()
            entries = launched.step.entries
            past = [self.digest(e.start, pages) for e, pages in zip(entries, launched.pages, strict=True)]
            work = zip(entries, launched.known_ids, launched.pages, past, strict=True)
            self.results[launched.step.number] = [self.compute(*each) for each in work]

    def digest(self, start: int, pages: list[int]) -> int:
        return int((self.cache[pages].reshape(-1)[:start] * WEIGHTS[:start]).sum(dtype=np.uint64))

    def compute(self, entry: Scheduled, known_ids: list[int], pages: list[int], past: int) -> list[int]:
        sequence = entry.sequence
        ids = known_ids or [self.last[sequence.arrival]]
        assert len(ids) == entry.num_tokens
        slots, digests = forward(ids, entry.start, past, self.adapters[sequence.request_id])
        positions = np.arange(entry.start, entry.start + len(ids))
        self.cache[np.array(pages)[positions // self.page_size], positions % self.page_size] = slots
        if not entry.samples:
            return []
        drawn = [draw(digest, sequence.index) for digest in digests[len(ids) - 1 - len(entry.draft_ids) :]]
        num_accepted = 0
        while num_accepted < len(entry.draft_ids) and entry.draft_ids[num_accepted] == drawn[num_accepted]:
            num_accepted += 1
        self.last[sequence.arrival] = drawn[num_accepted]
        return drawn[: num_accepted + 1]


# Laws that hold after every decision ------------------------------------------------------------------------------


class Laws:
    """What the scheduler promises, checked from outside."""

    def __init__(self, scheduler: Scheduler, page_size: int) -> None:
        self.scheduler, self.page_size = scheduler, page_size
        self.sequences: list[Sequence] = []
        self.next_start: dict[tuple[int, int], int] = {}

    def check_pages(self) -> None:
        """Users are counted, only running sequences hold pages, and none holds one twice."""
        pool, running = self.scheduler.pool, self.scheduler.running
        held = Counter(chain.from_iterable(sequence.pages for sequence in running))
        assert sum(map(len, (sequence.pages for sequence in self.sequences))) == held.total()
        assert all(len(set(sequence.pages)) == len(sequence.pages) for sequence in running)
        assert [pool.num_users(page) for page in range(pool.num_pages)] == [held[p] for p in range(pool.num_pages)]
        assert pool.num_available == pool.num_pages - len(held)
        assert all(s.num_computed_tokens == 0 for s in self.sequences if s.status is Status.PREEMPTED)
        for sequence in running:
            num_spare = len(sequence.pages) * self.page_size - sequence.num_tokens - sequence.num_pending_tokens
            assert num_spare < self.page_size or sequence.num_uncomputed_tokens < 1, "pages of rejected drafts"

    def check_step(self, step: Step, running_before: list[Sequence]) -> None:
        config, running = self.scheduler.config, self.scheduler.running
        assert 0 < step.num_tokens <= config.max_num_batched_tokens
        assert len({entry.sequence for entry in step.entries}) == len(step.entries)
        assert len(running) <= config.max_num_seqs
        assert [s.arrival for s in running] == sorted(s.arrival for s in running)
        preempted = [s.arrival for s in running_before if s.status is Status.PREEMPTED]
        assert all(s.arrival < min(preempted) for s in running if preempted), "the latest arrivals go first"
        scheduled = {entry.sequence for entry in step.entries}
        ready = [s for s in running if s.num_uncomputed_tokens == 1 and s.num_computed_tokens + 1 < self.max_length(s)]
        stalled = [s for s in ready if s not in scheduled]
        assert stalled in ([], running[-1:]), "decoding goes first, and only the latest arrival waits for a page"
        for entry in step.entries:
            self.check_entry(entry)

    def max_length(self, sequence: Sequence) -> int:
        limit = self.scheduler.config.max_model_len
        return min(limit, sequence.num_prompt_tokens + (sequence.params.max_tokens or limit))

    def check_entry(self, entry: Scheduled) -> None:
        """Positions follow on one another, and every page that is written has one user and is not published."""
        sequence, pool, stop = entry.sequence, self.scheduler.pool, entry.start + entry.num_tokens
        assert sequence.status is Status.RUNNING and entry.num_tokens > 0
        run = sequence.arrival, sequence.num_preemptions
        if run in self.next_start:
            assert entry.start == self.next_start[run]
        else:
            assert entry.start % self.page_size == 0 and entry.start < sequence.num_tokens
        self.next_start[run] = stop
        assert stop < self.max_length(sequence), "the last token is never computed"
        assert stop <= len(sequence.pages) * self.page_size
        written = {sequence.pages[p // self.page_size] for p in range(entry.start, stop)}
        published = {pool.find(key) for key in self.keys(sequence, stop)}
        assert all(pool.num_users(page) == 1 for page in written) and not written & published

    def keys(self, sequence: Sequence, stop: int = MAX_LEN) -> list[bytes]:
        return [sequence.page_key(i) for i in range(min(stop, sequence.num_tokens) // self.page_size)]

    def note_results(self, step: Step, results: list[list[int]]) -> None:
        for entry, ids in zip(step.entries, results, strict=True):
            if entry.samples:
                run = entry.sequence.arrival, entry.epoch
                self.next_start[run] -= 1 + len(entry.draft_ids) - len(ids)

    def check_the_end(self) -> None:
        pool = self.scheduler.pool
        assert not (self.scheduler.running or self.scheduler.num_waiting or self.scheduler.has_unfinished)
        assert pool.num_available == pool.num_pages
        assert not any(pool.is_promised(key) for sequence in self.sequences for key in self.keys(sequence))
        assert all(s.is_finished and s.finish_reason for s in self.sequences)


# Random histories -------------------------------------------------------------------------------------------------


class History:
    """Requests that arrive, end and are aborted at random times, under random limits."""

    def __init__(self, seed: int, page_size: int) -> None:
        self.rng = rng = random.Random(seed)
        self.page_size = page_size
        num_seqs = rng.randint(1, 8)
        self.config = EngineConfig(
            max_model_len=rng.choice([2, 5, 9]) * page_size + rng.randint(0, 3),
            max_num_seqs=num_seqs,
            max_num_batched_tokens=max(num_seqs, int(rng.choice([0, 0.2, 0.7, 1, 2, 9]) * page_size)),
            enable_prefix_caching=rng.random() < 0.85,
        )
        self.scheduler = Scheduler(self.config, num_pages=rng.randint(2, 16), eos_token_ids=[EOS])
        self.max_in_flight = rng.choice([1, 1, 2, 3])
        self.max_drafts = rng.choice([0, 0, 3, 7])
        self.beginnings = [self.ids(int(rng.choice([0.7, 1, 2, 2.3]) * page_size)) for _ in range(2)]
        self.adapters: dict[str, int] = {}
        self.requests = [self.request(f"r{i}") for i in range(rng.randint(1, 8))]
        sequences = chain.from_iterable(request.sequences for request in self.requests)
        self.expected = {
            (s.request_id, s.index): alone(s, self.adapters[s.request_id], self.config.max_model_len) for s in sequences
        }
        self.device = Device(self.scheduler.pool.num_pages, page_size, self.adapters)
        self.laws = Laws(self.scheduler, page_size)
        self.in_flight: deque[Step] = deque()
        self.cut_short: set[Sequence] = set()
        self.num_preemptions = self.num_cached_tokens = 0

    def ids(self, count: int) -> list[int]:
        return [self.rng.randrange(VOCAB) for _ in range(count)]

    def request(self, request_id: str) -> Request:
        rng, unit = self.rng, self.page_size
        prompt = rng.choice([[], [], *self.beginnings]) + self.ids(rng.choice([1, 3, unit, unit + 2]))
        if rng.random() < 0.3:
            prompt[rng.randrange(len(prompt))] = 1
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 3]),
            max_tokens=rng.choice([None, 9, 2 * unit + 8, 5 * unit + 8]),
            min_tokens=rng.choice([0, 0, 9]),
            stop_token_ids=rng.choice([[], [5]]),
            ignore_eos=rng.random() < 0.5,
            prompt_logprobs=rng.choice([None, None, None, 0]),
        )
        salt = rng.choice(["", "", "adapter"])
        self.adapters[request_id] = len(salt)
        return Request(request_id, prompt[: self.config.max_model_len - 1], params, cache_salt=salt)

    def run(self) -> None:
        arriving = list(self.requests)
        for turn in range(20_000):
            if arriving and (self.rng.random() < 0.3 or turn == 0):
                self.arrive(arriving.pop())
            self.interfere()
            if not self.launch():
                if not self.in_flight and not arriving:
                    break
                self.complete()
            self.laws.check_pages()
        assert not self.in_flight and not arriving, "no end in sight"
        self.laws.check_the_end()
        self.check_outputs()

    def arrive(self, request: Request) -> None:
        try:
            self.scheduler.add(request)
        except ValueError as error:
            assert "would fit" in str(error)
            return
        self.laws.sequences += request.sequences

    def interfere(self) -> None:
        """Clients leave, stop strings turn up, and the device catches up, at any time."""
        chance = self.rng.random()
        if chance < 0.003:
            request = self.rng.choice(self.requests)
            self.cut_short.update(s for s in request.sequences if not s.is_finished)
            self.scheduler.abort(request.id)
        elif chance < 0.006 and self.scheduler.running:
            sequence = self.rng.choice(self.scheduler.running)
            self.cut_short.add(sequence)
            self.scheduler.finish(sequence, "stop")
        elif chance < 0.2 and self.in_flight:
            self.device.run(self.rng.choice(self.in_flight).number)

    def launch(self) -> bool:
        if len(self.in_flight) >= self.max_in_flight or (self.in_flight and self.rng.random() < 0.3):
            return False
        running = list(self.scheduler.running)
        step = self.scheduler.schedule({s.arrival: self.draft(s) for s in running} if self.max_drafts else {})
        if step is None:
            assert self.in_flight or not self.scheduler.has_unfinished, "work is left, and nothing runs"
            return False
        self.laws.check_step(step, running)
        self.num_preemptions += sum(s.status is Status.PREEMPTED for s in running)
        self.device.launch(step)
        self.in_flight.append(step)
        return True

    def draft(self, sequence: Sequence) -> list[int]:
        """The sequence's own future, also beyond its end, with mistakes."""
        future = self.expected[sequence.request_id, sequence.index][0][sequence.num_output_tokens :]
        draft = (future + self.ids(self.max_drafts))[: self.rng.randint(0, self.max_drafts)]
        return [token_id if self.rng.random() < 0.9 else 1 for token_id in draft]

    def complete(self) -> None:
        if self.in_flight:
            step = self.in_flight.popleft()
            self.device.run(step.number)
            results = self.device.results.pop(step.number)
            self.laws.note_results(step, results)
            self.scheduler.complete(step, results)

    def check_outputs(self) -> None:
        for sequence in self.laws.sequences:
            self.num_cached_tokens += sequence.num_cached_tokens
            expected, length = self.expected[sequence.request_id, sequence.index]
            assert sequence.output_ids == expected[: sequence.num_output_tokens], f"{sequence.request_id}"
            assert sequence.num_output_tokens == length or sequence in self.cut_short
