"""One small model and one server over it, shared by all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from dsv2.config.serve import ServeConfig
from tests.serve.live import Live, new_engine, serving

MAX_BODY_BYTES = 2 << 20


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """A server that tests must leave as they find it. Bodies of up to 2 MiB."""
    with serving(new_engine(), ServeConfig(max_body_bytes=MAX_BODY_BYTES)) as live:
        yield live


@pytest.fixture
def client(live: Live) -> Iterator[httpx.Client]:
    with live.client() as client:
        yield client
