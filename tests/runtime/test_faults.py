"""What happens around an engine (rows 46 to 53): clients, crowds, memory and clocks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from halfweave.errors import CapacityError
from halfweave.runtime.decoder import Decoder
from halfweave.runtime.engine import Engine, EngineSettings, EventStream
from halfweave.runtime.model import Model, load_model
from halfweave.runtime.paged import Part
from halfweave.runtime.params import SamplingParams
from halfweave.runtime.request import Event, Failed, Finished, GenerationRequest, TextDelta
from halfweave.runtime.stats import EngineStats
from support.http_server import wait_until
from support.tiny import Tiny, save_tiny

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
FOREVER = replace(GREEDY, max_tokens=4000)
PROMPT = (40, 41, 42, 50, 60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save_tiny(tmp_path_factory.mktemp("faults") / "model", Tiny(positions=4096)))


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    """Four run at once, four wait, and a long prompt lasts."""
    with Engine(model, EngineSettings(max_running=4, max_waiting=4, tokens_per_step=16)) as running:
        yield running
        wait_until(lambda: idle(running))
        running._scheduler.pool.check_integrity()


def idle(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.waiting == stats.running == stats.pages_used == 0


def begin(
    engine: Engine, name: str, params: SamplingParams = GREEDY, prompt: Sequence[int] = PROMPT
) -> EventStream:
    return engine.stream(GenerationRequest(name, tuple(prompt), params))


def four(engine: Engine, name: str, prompt: Sequence[int] = PROMPT) -> list[str]:
    """The ids of four answers to one prompt, submitted together, that nobody listens to."""
    ids = [f"{name} {number}" for number in range(4)]
    engine.submit_all([(GenerationRequest(each, tuple(prompt), FOREVER), ignore) for each in ids])
    return ids


def ignore(_: Event) -> None:
    """Nobody reads it."""


def tokens(events: Sequence[Event]) -> list[int]:
    assert isinstance(events[-1], Finished), events[-1]
    return [t for event in events if isinstance(event, TextDelta) for t in event.token_ids]


# ---- clients

REACHED: dict[str, Callable[[EngineStats, EngineStats], bool]] = {
    "queued": lambda _, now: now.waiting == 4,
    "in prefill": lambda _, now: now.running > 0,
    "in decode": lambda before, now: now.completion_tokens > before.completion_tokens,
}


@pytest.mark.parametrize("state", REACHED)
def test_four_answers_of_one_request_end_together_and_free_their_pages(
    engine: Engine, state: str
) -> None:
    """Row 46: with n=4."""
    neighbours = four(engine, "neighbour") if state == "queued" else []
    wait_until(lambda: engine.stats().running == len(neighbours))
    before = engine.stats()
    prompt = (9,) * 4000 if state == "in prefill" else PROMPT
    leaving = four(engine, "leaving", prompt)
    wait_until(lambda: REACHED[state](before, engine.stats()))
    for each in leaving:
        engine.abort(each)
    wait_until(lambda: engine.stats().finished.get("abort") == 4, seconds=5)
    now = engine.stats()
    assert (now.running, now.waiting) == (len(neighbours), 0)
    if state == "in prefill":
        assert now.completion_tokens == before.completion_tokens
    for each in neighbours:
        engine.abort(each)


def test_who_reads_nothing_holds_up_nobody(engine: Engine) -> None:
    """Row 47."""
    unread = begin(engine, "unread", FOREVER)
    wait_until(lambda: engine.stats().completion_tokens > 0)
    assert len(tokens(list(begin(engine, "read")))) == 12
    unread.close()


def test_a_full_queue_refuses_while_the_engine_works(engine: Engine) -> None:
    """Row 48."""
    running, waiting = four(engine, "running"), four(engine, "waiting")
    wait_until(lambda: engine.stats().running == 4)
    times = []
    for _ in range(100):
        started = time.perf_counter()
        with pytest.raises(CapacityError):
            begin(engine, "too many")
        times.append(1000 * (time.perf_counter() - started))
    print(f"\nrefused after {statistics.median(times):.2f} ms (median), {max(times):.2f} ms (most)")
    assert statistics.median(times) < 500  # 20 on a machine that does nothing else
    assert (engine.stats().running, engine.stats().waiting) == (4, 4)
    for each in (*running, *waiting):
        engine.abort(each)


# ---- memory


class OneAtATime(Decoder):
    """A decoder that has memory for one sequence in a step, and for no prompt that has a 13."""

    def run(self, parts: Sequence[Part], memory: Any) -> torch.Tensor:
        if len(parts) > 1 or any(13 in part.tokens for part in parts):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().run(parts, memory)


def test_a_batch_that_memory_does_not_hold_is_computed_one_by_one(model: Model) -> None:
    """Row 51: who does not fit even alone fails, and the engine goes on."""
    scarce = OneAtATime(model.checkpoint, model.spec, torch.float32, torch.device("cpu"))
    params = replace(GREEDY, logit_bias=((13, -100.0),))
    prompts = [(5, 6), (7, 8, 9), (4, 13), (10,)]
    with Engine(model) as engine:
        wanted = [tokens(list(begin(engine, "alone", params, each))) for each in prompts]
    with Engine(replace(model, decoder=scarce)) as engine:
        streams = [begin(engine, str(each), params, each) for each in prompts]
        found = [list(stream) for stream in streams]
        failed = found.pop(2)
        assert isinstance(failed[-1], Failed)
        assert [tokens(events) for events in found] == [*wanted[:2], wanted[3]]
        assert engine.alive
        wait_until(lambda: idle(engine))


# ---- clocks


def test_a_clock_that_jumps_ends_no_request(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 53: by a year with every look at it; a request may wait ten seconds."""
    now, jumps = time.time, count()
    monkeypatch.setattr(time, "time", lambda: now() + 31_536_000 * (next(jumps) % 3 - 1))
    with Engine(model, EngineSettings(max_running=1, queue_timeout_s=10)) as engine:
        ends = [list(stream)[-1] for stream in [begin(engine, f"{n}") for n in range(6)]]
        for end in ends:
            assert isinstance(end, Finished)
            assert end.reason == "length"
            spent = (end.timings.queue_ms, end.timings.prefill_ms, end.timings.decode_ms)
            assert 0 <= min(spent) <= max(spent) < 60_000
        writing = begin(engine, "writing", replace(GREEDY, max_tokens=200))
        next(writing)
        engine.close(drain_s=30)
        assert len(tokens(list(writing))) == 199  # beside the one that was read
