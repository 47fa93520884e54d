"""Answers on their way to a client that may leave: JSON as a whole, or server-sent events as they come.

What is in an answer is up to a writer, of `completions` or `chat`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dsv2.engine.outputs import Delta
from dsv2.serve.loop import Call, EngineFailed, EngineStopped
from dsv2.serve.protocol import ApiError, Streaming, Usage, joined, sse, to_json

T = TypeVar("T")


class Writer(Protocol):
    """Choices of one kind of answer; a choice's deltas come in order."""

    kind: str
    chunk_kind: str
    id_prefix: str

    def whole(self, choice_idx: int, delta: Delta) -> dict[str, Any]: ...
    def first(self, choice_idx: int, delta: Delta) -> dict[str, Any]: ...
    def more(self, choice_idx: int, delta: Delta) -> dict[str, Any] | None: ...


class ClientGone(Exception):
    """Nobody is left to answer."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves: ClientGone. The body must have been read."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_leaving(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def error_of(error: Exception) -> ApiError:
    """What a client is told where the engine did not answer."""
    status = 503 if isinstance(error, EngineStopped) else 500
    return ApiError(status, str(error), code="shutting_down" if status == 503 else "engine_failed")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")


class Answer:
    """A call on its way to a client. The call is closed by whoever sends it."""

    def __init__(self, call: Call, model_name: str, writer: Writer, usage: Usage) -> None:
        self.call, self._writer, self._usage = call, writer, usage
        self._head = {"id": call.id, "created": int(time.time()), "model": model_name}
        self._places = {request_id: i * call.params.n for i, request_id in enumerate(call.request_ids)}
        self._begun: set[int] = set()

    async def whole(self) -> dict[str, Any]:
        """All of it, once it is complete. Raises EngineFailed and EngineStopped."""
        said: dict[int, list[Delta]] = {}
        async for deltas in self.call.batches():
            for delta in deltas:
                self._usage.add(delta)
                said.setdefault(self._choice_idx(delta), []).append(delta)
        choices = [self._writer.whole(i, joined(said[i])) for i in sorted(said)]
        return self._head | {"object": self._writer.kind, "choices": choices, "usage": self._usage.body()}

    async def events(self, streaming: Streaming) -> AsyncIterator[bytes]:
        """Its server-sent events, as many at once as there are, to the end. Failures are events too."""
        head = self._head | {"object": self._writer.chunk_kind}
        no_usage = {"usage": None} if streaming.includes_usage else {}
        try:
            async for deltas in self.call.batches():
                if events := b"".join(sse(head | {"choices": [c]} | no_usage) for c in self._choices(deltas)):
                    yield events
            if streaming.includes_usage:
                yield sse(head | {"choices": [], "usage": self._usage.body()})
        except (EngineFailed, EngineStopped) as error:
            yield sse(error_of(error).body)
        yield b"data: [DONE]\n\n"

    def _choices(self, deltas: Iterable[Delta]) -> Iterable[dict[str, Any]]:
        for delta in deltas:
            self._usage.add(delta)
            choice_idx = self._choice_idx(delta)
            if choice_idx not in self._begun:
                self._begun.add(choice_idx)
                yield self._writer.first(choice_idx, delta)
            elif (choice := self._writer.more(choice_idx, delta)) is not None:
                yield choice

    def _choice_idx(self, delta: Delta) -> int:
        return self._places[delta.request_id] + delta.index


class EventStream(Response):
    """Sends an answer's events, and aborts its call where the client leaves before the end."""

    def __init__(self, answer: Answer, streaming: Streaming) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"}, media_type="text/event-stream"
        )
        del self.headers["content-length"]
        self._answer, self._streaming = answer, streaming

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._answer.call, suppress(ClientGone):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async for events in self._answer.events(self._streaming):
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
