"""More work than there is room for, and clients that leave before their answer."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import openai
import pytest
from support.http_server import Live, idle, read, run, wait_until

FOREVER: dict[str, Any] = {"max_tokens": 8000, "ignore_eos": True}


def aborted_within_a_moment(live: Live) -> None:
    before = time.monotonic()
    wait_until(lambda: idle(live), seconds=5)
    assert time.monotonic() - before < 5


def test_a_full_queue_is_a_429_that_says_when_to_come_back(slow: Live) -> None:
    """Row 48."""
    running = [slow.begin_completion(**FOREVER, stream=True) for _ in range(3)]
    wait_until(lambda: slow.engine.stats().waiting == 2)
    started = time.monotonic()
    answer = slow.complete(max_tokens=1)
    assert time.monotonic() - started < 2
    assert answer.status == 429
    assert answer.error["type"] == "rate_limit_error"
    assert answer.error["code"] == "queue_full"
    assert int(answer.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        slow.client().chat.completions.create(
            model=slow.model, messages=[{"role": "user", "content": "x"}], stream=True
        )
    for connection in running:
        connection.close()
    aborted_within_a_moment(slow)
    assert slow.complete(max_tokens=1).status == 200


def test_prompts_that_do_not_all_fit_the_queue_leave_none_in_it(slow: Live) -> None:
    running = slow.begin_completion(**FOREVER, stream=True)
    wait_until(lambda: slow.engine.stats().running == 1)
    answer = slow.complete(prompt=["a", "b", "c"], **FOREVER)
    assert answer.status == 429
    wait_until(lambda: slow.engine.stats().waiting == 0, seconds=3)
    assert slow.engine.stats().running == 1, "the neighbour goes on"
    running.close()


def test_more_answers_than_can_ever_be_taken_on_are_no_429(slow: Live) -> None:
    """Row 48: coming back later is of no use."""
    for answer in (
        slow.complete(prompt=["a", "b"], n=2, max_tokens=1),
        slow.complete(prompt="a", n=4, max_tokens=1, stream=True),
        slow.chat(n=4, max_tokens=1),
    ):
        assert answer.status == 400
        assert answer.error["type"] == "invalid_request_error"
        assert "4 answers" in answer.error["message"]
        assert "room for 3" in answer.error["message"]
        assert "retry-after" not in answer.headers
    assert slow.complete(n=3, max_tokens=1).status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_running_request(slow: Live, stream: bool) -> None:
    """Row 46."""
    written = slow.engine.stats().completion_tokens
    connection = slow.begin_completion(**FOREVER, stream=stream)
    wait_until(lambda: slow.engine.stats().running == 1)
    if stream:
        connection.getresponse().read(200)
    connection.close()
    aborted_within_a_moment(slow)
    assert slow.engine.stats().completion_tokens - written < 8000


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_gives_up_its_place_in_the_queue(slow: Live, stream: bool) -> None:
    """Row 46."""
    running = slow.begin_completion(**FOREVER, stream=True)
    wait_until(lambda: slow.engine.stats().running == 1)
    waiting = slow.begin_completion(**FOREVER, stream=stream)
    wait_until(lambda: slow.engine.stats().waiting == 1)
    waiting.close()
    wait_until(lambda: slow.engine.stats().waiting == 0)
    assert slow.engine.stats().running == 1, "the neighbour goes on"
    running.close()


@pytest.mark.parametrize("stream", [True, False])
def test_all_prompts_of_a_client_that_leaves_are_ended(slow: Live, stream: bool) -> None:
    """Row 46."""
    connection = slow.begin_completion(prompt=["a", "b"], stream=stream, **FOREVER)
    wait_until(lambda: slow.engine.stats().running + slow.engine.stats().waiting == 2)
    connection.close()
    aborted_within_a_moment(slow)


def test_closing_the_official_clients_stream_ends_the_request(slow: Live) -> None:
    stream = slow.client().chat.completions.create(
        model=slow.model,
        messages=[{"role": "user", "content": "x"}],
        stream=True,
        extra_body=FOREVER,
    )
    next(iter(stream))
    stream.close()
    aborted_within_a_moment(slow)


def test_cancelling_the_asynchronous_client_ends_the_request(slow: Live) -> None:
    async def give_up() -> None:
        async with slow.async_client() as client:
            await client.with_options(timeout=0.3).completions.create(
                model=slow.model, prompt="x", extra_body=FOREVER
            )

    with pytest.raises(openai.APITimeoutError):
        run(give_up())
    aborted_within_a_moment(slow)


def test_a_waiting_stream_is_kept_alive_with_comments(slow: Live) -> None:
    running = slow.begin_completion(**FOREVER, stream=True)
    wait_until(lambda: slow.engine.stats().running == 1)
    waiting = slow.begin_completion(max_tokens=2, ignore_eos=True, stream=True)
    response = waiting.getresponse()
    assert response.status == 200
    assert response.readline() == b": ping\n"
    assert response.readline() == b"\n"
    running.close()
    answer = read(response)
    assert answer.events[-1] == "[DONE]"
    assert answer.events[-2]["choices"][0]["finish_reason"] == "length"


def test_other_urls_are_answered_while_the_engine_works(slow: Live) -> None:
    running = slow.begin_completion(**FOREVER, stream=True)
    wait_until(lambda: slow.engine.stats().running == 1)
    assert slow.get("/health").status == 200
    assert slow.get("/v1/models").status == 200
    running.close()


def test_many_clients_at_once_each_get_their_own_answer(live: Live) -> None:
    async def ask_all() -> list[str]:
        async with live.async_client() as client:

            async def ask(prompt: str) -> str:
                stream = await client.chat.completions.create(
                    model=live.model,
                    messages=[{"role": "user", "content": prompt}],
                    temperature=0,
                    max_tokens=6,
                    stream=True,
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(*(ask(prompt) for prompt in prompts)))

    prompts = ["kept", "zero", "fox", "dog", "riddle", "weights"] * 3
    together = run(ask_all())
    for prompt, text in list(zip(prompts, together, strict=True))[:6]:
        turns = [{"role": "user", "content": prompt}]
        alone = live.chat(messages=turns, temperature=0, max_tokens=6).json
        assert alone["choices"][0]["message"]["content"] == text
    assert together[:6] == together[6:12] == together[12:]
