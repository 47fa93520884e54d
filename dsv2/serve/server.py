"""uvicorn, under the limits of a `ServeConfig`, and ended in a way that finishes what runs."""

from __future__ import annotations

import time
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI

from dsv2.config.serve import ServeConfig
from dsv2.serve.app import Api
from dsv2.serve.limits import limited_protocol

# For answers that are complete to reach their clients.
_FLUSH_S = 5


class Server(uvicorn.Server):
    """Told to stop, it answers new requests with 503 until the running ones are finished or out of time; then it ends.

    `app` is of `create_app`. A second signal ends it at once.
    """

    def __init__(self, app: FastAPI, host: str, port: int, config: ServeConfig) -> None:
        self._loop = cast(Api, app.state.api).loop
        self._shutdown_timeout_s = config.shutdown_timeout_s
        self._stops_at_s: float | None = None
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=limited_protocol(config),
                ws="none",
                log_level="warning",
                access_log=False,
                # A client that holds a connection longer than this is closed by its deadline.
                timeout_keep_alive=int(config.idle_timeout_s) + 1,
                timeout_graceful_shutdown=_FLUSH_S,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._stops_at_s is None:
            self._stops_at_s = time.monotonic() + self._shutdown_timeout_s
            self._loop.is_draining = True
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._stops_at_s is not None and (self._loop.is_idle or time.monotonic() >= self._stops_at_s):
            self._loop.shut_down()
            self.should_exit = True
        return await super().on_tick(counter)
