"""Connections that send nothing, send slowly or read slowly end, and none of them keeps others out."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from dsv2.config.serve import ServeConfig
from tests.serve.live import Gate, Live, new_engine, serving

BODY = {"prompt": [5, 6, 7], "max_tokens": 4}
NUM_SILENT = 300


@contextmanager
def connections(live: Live, count: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(("127.0.0.1", live.port), timeout=60)) for _ in range(count)
        ]


def is_closed(connection: socket.socket) -> bool:
    """Whether the server ends it, which is waited for."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def request(body: bytes, length: int | None = None) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


def num_connections(live: Live) -> int:
    return len(live.server.server_state.connections)


def test_silent_connections_end_at_their_deadline_and_stop_nobody_before() -> None:
    with (
        serving(new_engine(), ServeConfig(idle_timeout_s=1.5)) as live,
        connections(live, NUM_SILENT) as silent,
    ):
        with live.client() as client:
            assert client.post("/v1/completions", json=BODY).status_code == 200
        assert all(map(is_closed, silent))
        live.wait_until(lambda: not num_connections(live))


def test_where_all_places_are_taken_the_longest_silent_makes_room() -> None:
    with (
        serving(new_engine(), ServeConfig(max_connections=50, idle_timeout_s=900)) as live,
        connections(live, NUM_SILENT) as silent,
    ):
        with live.client() as client:
            assert client.post("/v1/completions", json=BODY).status_code == 200
        assert all(map(is_closed, silent[: NUM_SILENT - 50]))
        assert num_connections(live) <= 50


def test_a_connection_that_is_answered_keeps_its_place() -> None:
    engine = new_engine()
    gate = Gate(engine)
    with (
        serving(engine, ServeConfig(max_connections=5, idle_timeout_s=900)) as live,
        connections(live, 1) as (working,),
    ):
        working.sendall(request(json.dumps(BODY).encode()))
        gate.reached.wait()
        with connections(live, 20) as silent:
            assert all(map(is_closed, silent[:15]))
            gate.open()
            assert working.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize(
    "sent",
    [b"POST /v1/completions HT", request(b'{"prompt": ', length=100)],
    ids=["half a head", "half a body"],
)
def test_half_a_request_ends_at_its_deadline(sent: bytes) -> None:
    with serving(new_engine(), ServeConfig(idle_timeout_s=0.5)) as live, connections(live, 1) as (slow,):
        slow.sendall(sent)
        assert is_closed(slow)
        live.wait_until(lambda: live.api.loop.is_idle and not num_connections(live))


def test_an_answer_may_take_longer_than_the_deadline() -> None:
    engine = new_engine()
    gate = Gate(engine)
    with (
        serving(engine, ServeConfig(idle_timeout_s=0.5)) as live,
        connections(live, 2) as (working, silent),
    ):
        working.sendall(request(json.dumps(BODY).encode()))
        gate.reached.wait()
        assert is_closed(silent)  # which came with it: its deadline is past
        gate.open()
        assert working.recv(12) == b"HTTP/1.1 200"


def test_a_client_that_does_not_read_is_dropped() -> None:
    body = json.dumps(
        {"prompt": [5, 6, 7], "max_tokens": 200, "n": 20, "logprobs": 20, "ignore_eos": True, "stream": True}
    )
    with serving(new_engine(), ServeConfig(idle_timeout_s=0.5)) as live, socket.socket() as deaf:
        # Buffers of the system that soon are full; accepted connections inherit the first.
        live.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", live.port))
        deaf.sendall(request(body.encode()))
        live.wait_until(lambda: not live.api.loop.is_idle)
        live.wait_until(lambda: not num_connections(live))
        live.wait_until(lambda: live.api.loop.is_idle and not live.engine.has_unfinished)
        assert live.api.loop._stats.num_finished["length"] < 20


def test_a_connection_serves_one_request_after_another() -> None:
    with serving(new_engine()) as live, connections(live, 1) as (connection,):
        for _ in range(3):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            said = b""
            while not said.endswith(b"{}"):
                said += connection.recv(1000)
            assert said.startswith(b"HTTP/1.1 200")


def test_requests_sent_at_once_are_answered_in_turn() -> None:
    with serving(new_engine()) as live, connections(live, 1) as (connection,):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 3)
        said = b""
        while said.count(b"{}") < 3:
            said += connection.recv(1000)
        assert said.count(b"HTTP/1.1 200") == 3
