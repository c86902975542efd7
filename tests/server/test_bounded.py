"""Slow work: a little at a time, some that wait, and nothing done for those who have left."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from halfweave.errors import CapacityError
from halfweave.runtime.model import Model
from halfweave.server.bounded import Bounded
from support.http_server import JSON, idle, live_server, wait_until


def test_few_work_some_wait_and_the_rest_are_refused() -> None:
    async def tried() -> None:
        bounded, gate, done = Bounded(1, 2, "a turn"), threading.Event(), []

        def work(name: str) -> str:
            gate.wait(30)
            done.append(name)
            return name

        tasks = {name: asyncio.create_task(bounded.run(work, name)) for name in "abc"}
        await asyncio.sleep(0.05)  # a works, b and c wait
        with pytest.raises(CapacityError, match="2 requests wait for a turn"):
            await bounded.run(work, "d")
        tasks["b"].cancel()
        await asyncio.sleep(0.05)
        tasks["e"] = asyncio.create_task(bounded.run(work, "e"))  # in b's place
        tasks["a"].cancel()  # its thread goes on, and nobody takes its slot meanwhile
        await asyncio.sleep(0.05)
        assert not done
        gate.set()
        assert [await tasks["c"], await tasks["e"]] == ["c", "e"]
        assert done == ["a", "c", "e"]

    asyncio.run(tried())


def test_work_that_fails_fails_its_own_request_and_frees_its_slot() -> None:
    async def tried() -> None:
        bounded = Bounded(1, 2, "a turn")

        def fail() -> None:
            raise ValueError("no")

        for _ in range(3):
            with pytest.raises(ValueError, match="no"):
                await bounded.run(fail)

    asyncio.run(tried())


def test_a_client_that_leaves_while_it_is_admitted_is_not_answered(
    long_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live_server(long_model) as live:
        real, asked_for, left = live.engine.submit_all, threading.Event(), threading.Event()

        def late(*arguments: Any) -> None:
            asked_for.set()
            assert left.wait(30)
            real(*arguments)

        monkeypatch.setattr(live.engine, "submit_all", late)
        turns = [{"role": "user", "content": "Hello"}]
        asked = {"model": live.model, "messages": turns, "max_tokens": 8000, "ignore_eos": True}
        gone = live.begin("POST", "/v1/chat/completions", json.dumps(asked).encode(), JSON)
        assert asked_for.wait(30)
        gone.close()
        wait_until(lambda: live.activity.in_flight == 0)
        left.set()
        wait_until(lambda: live.engine.stats().requests_finished == 1)
        assert live.engine.stats().finished == {"abort": 1}
        wait_until(lambda: idle(live))
