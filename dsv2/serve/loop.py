"""The thread that owns the engine, and how asyncio handlers talk to it.

Handlers post what the engine is to do; between two steps the thread does it. What a step says comes back to the event
loop in one wake-up, as one list for every call that it says something to. Knows no HTTP and no text.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from dsv2.engine.sampling import SamplingParams
from dsv2.engine.sequence import Request
from dsv2.serve.metrics import Stats

if TYPE_CHECKING:
    from dsv2.engine.core import Engine
    from dsv2.engine.outputs import Delta

logger = logging.getLogger(__name__)


class EngineFailed(Exception):
    """The engine raised while it worked on a request."""


class EngineStopped(Exception):
    """The server is going away."""


class QueueFull(Exception):
    """As many sequences as the server takes on are unfinished."""


class Call:
    """What one HTTP call asks of the engine: some prompts, `params.n` sequences of each. Lives in the event loop.

    Leaving its context aborts what is unfinished. `request_ids` are the engine's, in the order of the prompts.
    """

    def __init__(
        self, loop: EngineLoop, call_id: str, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> None:
        self.id = call_id
        self.prompts, self.params = prompts, params
        self.request_ids = [f"{call_id}-{i}" for i in range(len(prompts))]
        self.num_seqs = len(prompts) * params.n
        self.arrived_s = time.perf_counter()
        self.last_token_s: dict[tuple[str, int], float] = {}
        """When the last tokens of a sequence came, by request id and index."""
        self.queue: asyncio.Queue[list[Delta] | Exception] = asyncio.Queue()
        self._loop = loop
        self._num_unfinished = self.num_seqs

    async def next(self) -> list[Delta]:
        """What the engine said next: nothing the first time, when it accepts. Raises what ended the call."""
        item = await self.queue.get()
        if isinstance(item, Exception):
            self._num_unfinished = 0  # nothing is left to abort
            raise item
        self._num_unfinished -= sum(delta.finish_reason is not None for delta in item)
        return item

    async def batches(self) -> AsyncIterator[list[Delta]]:
        """Everything the engine says, until all sequences are finished; at once what has come since the last time."""
        while self._num_unfinished:
            deltas = await self.next()
            while not self.queue.empty():
                deltas += await self.next()
            yield deltas

    def __enter__(self) -> Call:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.close_call(self, is_finished=not self._num_unfinished)


@dataclass(slots=True)
class _Active:
    """A request in the engine's thread."""

    call: Call
    request: Request
    num_unfinished: int


class EngineLoop:
    """Runs an engine in a thread of its own, from `start` to `stop`, both called in one event loop.

    Args:
        engine: nobody else may call it meanwhile.
        stats: counts what goes through, in the event loop.
        max_queued_seqs: sequences that may be unfinished at once.
    """

    def __init__(self, engine: Engine, stats: Stats, max_queued_seqs: int) -> None:
        self.engine = engine
        self.is_draining = False
        """Set: nothing more is accepted."""
        self._stats, self._max_queued_seqs = stats, max_queued_seqs
        self._calls: set[Call] = set()
        self._num_queued_seqs = 0
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []  # guarded by _wake, as is the next
        self._is_stopped = False
        self._is_lost = False
        self._active: dict[str, _Active] = {}  # the thread's own
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # In the event loop --------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._events = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread, after the step that it is in. Calls that are open fail with EngineStopped."""
        self.shut_down()
        with self._wake:
            self._is_stopped = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    @property
    def is_accepting(self) -> bool:
        return not (self.is_draining or self._is_lost)

    @property
    def is_idle(self) -> bool:
        """Whether no call is open."""
        return not self._calls

    async def submit(self, call_id: str, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Call:
        """Give the engine prompts of token ids. Returns once it has accepted all of them.

        Raises ValueError, with none of them left in the engine, where it refuses one; QueueFull; EngineStopped.
        """
        call = Call(self, call_id, prompts, params)
        self.check_room(call.num_seqs)
        self._calls.add(call)
        self._num_queued_seqs += call.num_seqs
        try:
            self._post(partial(self._add, call))
            await call.next()
        except BaseException:
            call.__exit__(None, None, None)
            raise
        return call

    def check_room(self, num_seqs: int) -> None:
        """ValueError where there is never room for so many sequences, QueueFull or EngineStopped where none is now."""
        if not self.is_accepting:
            raise EngineStopped("the server is shutting down" if self.is_draining else "the engine has stopped")
        if num_seqs > self._max_queued_seqs:
            raise ValueError(f"{num_seqs} sequences (prompts times n) exceed {self._max_queued_seqs}, the most")
        if self._num_queued_seqs + num_seqs > self._max_queued_seqs:
            raise QueueFull(f"{self._num_queued_seqs} sequences are unfinished, of {self._max_queued_seqs}: try again")

    def close_call(self, call: Call, *, is_finished: bool) -> None:
        """Forget a call, whose requests are aborted unless it is finished. Without effect the second time."""
        if call not in self._calls:
            return
        self._calls.remove(call)
        self._num_queued_seqs -= call.num_seqs
        if not is_finished:
            self._post(partial(self._abort, call))

    def shut_down(self) -> None:
        """Accept nothing more, and fail what is open with EngineStopped."""
        self.is_draining = True
        self._fail_open(EngineStopped("the server shut down before the answer was complete"))

    def _fail_open(self, error: Exception) -> None:
        for call in self._calls:
            call.queue.put_nowait(error)
            self._post(partial(self._abort, call))

    def _lose(self) -> None:
        self._is_lost = True
        self._fail_open(EngineFailed("the engine has stopped"))

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _deliver(self, now_s: float, said: Iterable[tuple[Call, list[Delta] | Exception]]) -> None:
        for call, item in said:
            call.queue.put_nowait(item)
            if isinstance(item, list):
                self._stats.count(call, item, now_s)

    # In the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (commands := self._wait()) is not None:
                for command in commands:
                    command()
                if self.engine.has_unfinished:
                    self._step()
        finally:  # also where something raised that nobody foresaw: no client may wait for ever
            self._events.call_soon_threadsafe(self._lose)

    def _wait(self) -> list[Callable[[], None]] | None:
        """What has been posted, as soon as that or the engine gives something to do; None: time to end."""
        with self._wake:
            while not (self._inbox or self._is_stopped or self.engine.has_unfinished):
                self._wake.wait()
            commands, self._inbox = self._inbox, []
            return None if self._is_stopped and not commands else commands

    def _add(self, call: Call) -> None:
        answer: list[Delta] | Exception = []
        try:
            for request_id, prompt in zip(call.request_ids, call.prompts, strict=True):
                request = self.engine.add(prompt, call.params, request_id)
                self._active[request_id] = _Active(call, request, call.params.n)
        except Exception as error:
            answer = error if isinstance(error, (ValueError, RecursionError)) else self._failure(error)
            self._abort(call)
        self._tell([(call, answer)])

    def _abort(self, call: Call) -> None:
        for request_id in call.request_ids:
            if active := self._active.pop(request_id, None):
                self.engine.abort(request_id)
                self._count_preemptions(active)

    def _step(self) -> None:
        try:
            deltas = self.engine.step()
        except Exception as error:  # whatever it is, other requests go on
            self._fail(self._failure(error))
            return
        said: dict[Call, list[Delta]] = defaultdict(list)
        for delta in deltas:
            if active := self._active.get(delta.request_id):
                said[active.call].append(delta)
                if delta.finish_reason:
                    self._finish(active)
        self._tell(list(said.items()))

    def _finish(self, active: _Active) -> None:
        """One of the request's sequences has ended."""
        active.num_unfinished -= 1
        if not active.num_unfinished:
            del self._active[active.request.id]
            self._count_preemptions(active)

    def _fail(self, failure: EngineFailed) -> None:
        """Fail the calls that the engine gave up on; all of them where it names none, as then it may raise for ever."""
        given_up = [a for a in self._active.values() if any(s.finish_reason == "abort" for s in a.request.sequences)]
        calls = {active.call for active in given_up or self._active.values()}
        for call in calls:
            self._abort(call)
        self._tell([(call, failure) for call in calls])

    def _failure(self, error: Exception) -> EngineFailed:
        logger.error("the engine failed", exc_info=error)
        return EngineFailed(f"the engine failed: {type(error).__name__}")

    def _count_preemptions(self, active: _Active) -> None:
        self._stats.num_preemptions += sum(sequence.num_preemptions for sequence in active.request.sequences)

    def _tell(self, said: Sequence[tuple[Call, list[Delta] | Exception]]) -> None:
        if said:
            self._events.call_soon_threadsafe(self._deliver, time.perf_counter(), said)
