"""`serve` puts a server around a checkpoint, within what the system allows."""

from __future__ import annotations

import asyncio
import json
import resource
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI
from typer.testing import CliRunner

from dsv2 import cli
from dsv2.adapters import merge_adapter
from dsv2.config.serve import ServeConfig
from dsv2.engine.core import DraftCounts
from dsv2.engine.sampling import SamplingParams
from dsv2.serve.app import Api
from dsv2.serve.command import _allowed_connections, serve
from dsv2.serve.server import Server
from dsv2.weights import load, save
from tests.adapted import same, state, write_adapter
from tests.serve.live import get_model, get_tokenizer


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[Server]:
    """Those that would have run."""
    servers: list[Server] = []
    monkeypatch.setattr(Server, "run", lambda server: servers.append(server))
    return servers


def api_of(server: Server) -> Api:
    return cast(FastAPI, server.config.app).state.api


def test_a_checkpoint_is_served_under_its_path_or_a_name(tmp_path: Path, servers: list[Server]) -> None:
    save(get_model(), tmp_path / "model", tokenizer=get_tokenizer())
    path, urls = str(tmp_path / "model"), []
    for name in (None, "mine"):
        serve(
            path,
            "127.0.0.1",
            8123,
            ServeConfig(),
            version="1",
            served_model_name=name,
            on_start=urls.append,
            device="cpu",
            max_model_len=128,
            num_pages=8,
        )
    assert urls == ["http://127.0.0.1:8123"] * 2
    assert [api_of(server).model_name for server in servers] == [path, "mine"]
    assert [api_of(server).max_model_len for server in servers] == [128, 128]


@pytest.mark.parametrize("name", [None, "mine"])
def test_an_adapted_model_is_served_as_the_child_of_its_base(
    tmp_path: Path, servers: list[Server], name: str | None
) -> None:
    save(get_model(), tmp_path / "model", tokenizer=get_tokenizer())
    path, adapter = str(tmp_path / "model"), str(write_adapter(tmp_path / "adapter", get_model()))
    options: dict[str, Any] = {"device": "cpu", "max_model_len": 128, "num_pages": 8, "served_model_name": name}
    serve(path, "127.0.0.1", 8123, ServeConfig(), version="1", adapter=adapter, **options)
    api = api_of(servers[0])
    (listed,) = json.loads(bytes(asyncio.run(api.models()).body))["data"]
    assert (listed["id"], listed["parent"]) == (name or adapter, path)
    expected = load(path)
    merge_adapter(adapter, expected)
    assert same(state(api.loop.engine.model), state(expected))


def test_a_draft_model_is_read_beside_it(tmp_path: Path, servers: list[Server]) -> None:
    save(get_model(), tmp_path, tokenizer=get_tokenizer())
    options = ["--draft-model", str(tmp_path), "--num-draft-tokens", "3", "--device", "cpu", "--max-model-len", "64"]
    done = CliRunner().invoke(cli.app, ["serve", str(tmp_path), *options], catch_exceptions=False)
    assert done.exit_code == 0
    engine = api_of(servers[0]).loop.engine
    engine.add([5, 6, 7], SamplingParams(max_tokens=9, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
    assert engine.draft_counts == DraftCounts(num_drafts=2, num_tokens=6, num_accepted_tokens=6)


def test_connections_stay_within_what_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1000, 2000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    assert _allowed_connections(5000) == 2000 - 256
    assert limits[-1] == (2000, 2000)
    assert _allowed_connections(100) == 100
