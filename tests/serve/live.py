"""A server as its clients see it: on a port, in a thread of its own, over a small model with random weights."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import httpx
from fastapi import FastAPI

from dsv2.config import EngineConfig
from dsv2.config.serve import ServeConfig
from dsv2.engine.core import Engine
from dsv2.engine.outputs import Delta
from dsv2.model import Transformer
from dsv2.serve.app import Api, create_app
from dsv2.serve.server import Server
from dsv2.text import Tokenizer
from tests.numerics import SMALL_MODELS, random_model

MODEL = "small"
MAX_MODEL_LEN = 256


@cache
def get_tokenizer() -> Tokenizer:
    return Tokenizer.train(["The quick brown fox jumps over the lazy dog. " * 3], 300)


@cache
def get_model() -> Transformer:
    tokenizer = get_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return random_model(SMALL_MODELS["v2-lite"]().replace(vocab_size=tokenizer.vocab_size, **ids), seed=3)


def new_engine(**changes: Any) -> Engine:
    limits: dict[str, Any] = {
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 256,
        "num_pages": 256,
    }
    return Engine(get_model(), get_tokenizer(), EngineConfig(**(limits | changes)))


class Gate:
    """Holds an engine before its steps while it is shut; counts what it lets through."""

    def __init__(self, engine: Engine) -> None:
        self._step, self._is_open = engine.step, threading.Event()
        self.reached = threading.Event()
        """Set once a step was held."""
        self.is_failing = False
        engine.step = self.step

    def step(self) -> list[Delta]:
        if not self._is_open.is_set():
            self.reached.set()
            assert self._is_open.wait(timeout=60), "the gate was never opened"
        if self.is_failing:
            raise RuntimeError("the device is on fire")
        return self._step()

    def open(self) -> None:
        self._is_open.set()


class _Server(Server):
    def __init__(self, app: FastAPI, config: ServeConfig) -> None:
        super().__init__(app, "127.0.0.1", 0, config)
        self.is_up = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


@dataclass(frozen=True)
class Live:
    engine: Engine
    api: Api
    server: Server
    thread: threading.Thread
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Returns once something is so, which is looked at in the server's event loop, after whatever it does."""

        async def look() -> None:
            while not holds():
                await asyncio.sleep(0.001)

        asyncio.run_coroutine_threadsafe(look(), self.api.loop._events).result(timeout=60)


@contextmanager
def serving(engine: Engine, config: ServeConfig | None = None) -> Iterator[Live]:
    """A server until the context is left, which must leave no thread behind."""
    app = create_app(engine, config or ServeConfig(), MODEL, "1.2.3")
    server = _Server(app, config or ServeConfig())
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        assert server.is_up.wait(timeout=60)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Live(engine, cast(Api, app.state.api), server, thread, port)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
    assert not thread.is_alive()


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The objects of a stream that ends as it should."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
