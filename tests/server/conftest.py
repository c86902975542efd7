"""Real servers for these tests: one for everything, one whose requests last."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from halfweave.runtime.engine_settings import EngineSettings
from halfweave.runtime.model import Model, load_model
from halfweave.server.settings import ServerSettings
from support.http_server import Live, idle, live_server, wait_until
from support.tiny import Tiny, save_tiny

LONG_CONTEXT = 8192


@pytest.fixture(scope="session")
def served_model(tiny_model: Path) -> Model:
    """The tiny model, loaded once."""
    return load_model(tiny_model)


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model whose context is so long that a request outlives any test."""
    tiny = Tiny(positions=LONG_CONTEXT)
    return load_model(save_tiny(tmp_path_factory.mktemp("long") / "long", tiny))


@pytest.fixture(scope="session")
def shared_live(served_model: Model) -> Iterator[Live]:
    with live_server(served_model, ServerSettings(max_body_bytes=200_000)) as running:
        yield running


@pytest.fixture
def live(shared_live: Live) -> Iterator[Live]:
    """A server, shared by the tests; each must leave it idle and well."""
    yield shared_live
    wait_until(lambda: idle(shared_live))
    assert shared_live.get("/health").status == 200


@pytest.fixture(scope="session")
def shared_slow(long_model: Model) -> Iterator[Live]:
    one_at_a_time = EngineSettings(max_running=1, max_waiting=2)
    with live_server(long_model, ServerSettings(ping_s=0.05), one_at_a_time) as running:
        yield running


@pytest.fixture
def slow(shared_slow: Live) -> Iterator[Live]:
    """A server where requests can be made to last: one runs, and two may wait."""
    yield shared_slow
    wait_until(lambda: idle(shared_slow))
