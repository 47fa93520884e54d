"""Connections that must not stop others: silent ones, slow ones, and more than there is room for.

uvicorn waits for ever for a request to begin, to end, and to be answered into a full buffer, and its
`limit_concurrency` counts silent connections against the others. So every connection here has a deadline while it owes
something, and where all places are taken the one that has owed a request longest makes room.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from dsv2.config.serve import ServeConfig

if TYPE_CHECKING:  # the other one has the same attributes
    from uvicorn.protocols.http.h11_impl import H11Protocol as HTTPProtocol
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol as HTTPProtocol


def limited_protocol(config: ServeConfig) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, whichever is installed, under the limits of `config`; for one server."""
    # Those that owe a request, longest first.
    waiting: dict[LimitedProtocol, None] = {}

    class LimitedProtocol(HTTPProtocol):
        _deadline: asyncio.TimerHandle | None = None
        """Runs while a request is not complete, or nobody reads its answer."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect_request()
            if len(self.connections) > config.max_connections:
                next(iter(waiting))._make_room()  # at worst this one

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self in waiting:
                self._settle_if_answering()

        def on_response_complete(self) -> None:
            self._settle()
            self._expect_request()
            super().on_response_complete()  # which may begin a request that came early
            self._settle_if_answering()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._start_deadline()

        def resume_writing(self) -> None:
            super().resume_writing()
            if self not in waiting:
                self._settle()

        def connection_lost(self, exc: Exception | None) -> None:
            self._settle()
            super().connection_lost(exc)

        def _expect_request(self) -> None:
            waiting[self] = None
            self._start_deadline()

        def _start_deadline(self) -> None:
            if self._deadline is None:
                self._deadline = self.loop.call_later(config.idle_timeout_s, self.transport.abort)

        def _make_room(self) -> None:
            self._settle()  # now, as more may come before the event loop closes it
            self.transport.abort()

        def _settle_if_answering(self) -> None:
            if self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete:
                self._settle()

        def _settle(self) -> None:
            """Nothing is owed."""
            waiting.pop(self, None)
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return LimitedProtocol
