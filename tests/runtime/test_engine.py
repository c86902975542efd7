"""The engine keeps its word to every request: right tokens, one last event, and no traces."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from halfweave.errors import CapacityError, EngineDeadError, HalfweaveError, RequestError
from halfweave.runtime.decoder import Decoder
from halfweave.runtime.engine import Engine
from halfweave.runtime.engine_settings import EngineSettings
from halfweave.runtime.model import Model, load_model
from halfweave.runtime.paged import Part
from halfweave.runtime.params import SamplingParams
from halfweave.runtime.request import Event, Failed, Finished, GenerationRequest, TextDelta
from safetensors.torch import load_file, save_file
from support.tiny import FAMILIES, Tiny, dense_model, edit_json, save_tiny

Copy = Callable[[Path], Path]
PROMPT = (40, 41, 42, 50, 60)
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
WAIT_S = 60


@dataclass
class Receiver:
    """Collects the events of one request; may hold the engine's thread until it is let go."""

    hold: bool = False
    events: list[Event] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.ended.set()
            return
        self.started.set()
        if self.hold:
            self.release.wait(WAIT_S)

    @property
    def last(self) -> Event:
        assert self.ended.wait(WAIT_S)
        return self.events[-1]

    @property
    def reason(self) -> str:
        assert isinstance(self.last, Finished), self.last
        return self.last.reason

    @property
    def token_ids(self) -> list[int]:
        return [t for e in self.events if isinstance(e, TextDelta) for t in e.token_ids]

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.events if isinstance(e, TextDelta))

    @property
    def endings(self) -> int:
        return sum(isinstance(event, Finished | Failed) for event in self.events)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save_tiny(tmp_path_factory.mktemp("engine") / "model", Tiny(positions=4096)))


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    """One request at a time, so that tests can make others wait."""
    with Engine(model, EngineSettings(max_running=1, max_waiting=4)) as engine:
        yield engine
        assert idle(engine)


def request(
    name: str = "r", params: SamplingParams = GREEDY, prompt: tuple[int, ...] = PROMPT
) -> GenerationRequest:
    return GenerationRequest(name, prompt, params)


def run(engine: Engine, params: SamplingParams = GREEDY, **more: Any) -> Receiver:
    receiver = Receiver()
    engine.submit(request(params=params, **more), receiver)
    assert receiver.ended.wait(WAIT_S)
    return receiver


def busy(engine: Engine) -> Receiver:
    """A request that runs until its receiver is released."""
    receiver = Receiver(hold=True)
    engine.submit(request("busy"), receiver)
    assert receiver.started.wait(WAIT_S)
    return receiver


def idle(engine: Engine) -> bool:
    """Nobody is in it, and nobody has left a page behind. Looks until it is so."""
    for _ in range(1000):
        stats = engine.stats()
        if stats.running == stats.waiting == 0:
            engine._scheduler.pool.check_integrity()
            return stats.pages_used == 0
        time.sleep(0.005)
    return False


# ---- the tokens


@pytest.mark.parametrize("length", [1, 5, 300, 600])
def test_greedy_tokens_are_those_of_transformers(engine: Engine, model: Model, length: int) -> None:
    prompt = tuple(torch.randint(3, 300, (length,)).tolist())
    oracle = dense_model(model.checkpoint.path)
    wanted = oracle.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert run(engine, prompt=prompt).token_ids == wanted[0, length:].tolist()


def test_the_text_is_that_of_the_tokens(engine: Engine, model: Model) -> None:
    params = SamplingParams(max_tokens=200, seed=3, ignore_eos=True, temperature=2.0)
    receiver = run(engine, params)
    assert receiver.text == model.tokenizer.decode(receiver.token_ids)
    assert len(receiver.token_ids) == 200


def test_equal_seeds_give_equal_text_whatever_ran_between(engine: Engine) -> None:
    params = SamplingParams(max_tokens=30, seed=11, ignore_eos=True)
    first = run(engine, params)
    run(engine, SamplingParams(max_tokens=5))
    assert run(engine, params).token_ids == first.token_ids
    assert run(engine, replace(params, seed=12)).token_ids != first.token_ids


# ---- how it ends


def test_max_tokens_ends_with_length(engine: Engine) -> None:
    receiver = run(engine)
    assert receiver.reason == "length"
    assert isinstance(receiver.last, Finished)
    assert (receiver.last.usage.prompt_tokens, receiver.last.usage.completion_tokens) == (5, 12)


def test_the_end_of_the_context_ends_with_length(engine: Engine) -> None:
    receiver = run(engine, SamplingParams(max_tokens=100), prompt=(7,) * 4095)
    assert receiver.reason == "length"
    assert len(receiver.token_ids) == 1


@pytest.fixture(scope="module")
def with_eos(model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, list[int]]:
    """A model whose end token is the third one that it greedily writes."""
    directory = save_tiny(tmp_path_factory.mktemp("eos") / "model", Tiny(positions=4096))
    with Engine(model) as engine:
        written = run(engine).token_ids
    assert written[2] not in written[:2]
    edit_json(
        directory / "generation_config.json", lambda config: config.update(eos_token_id=written[2])
    )
    return load_model(directory), written


def test_an_end_token_ends_with_stop(with_eos: tuple[Model, list[int]]) -> None:
    model, written = with_eos
    with Engine(model) as engine:
        receiver = run(engine, replace(GREEDY, ignore_eos=False))
        assert receiver.reason == "stop"
        assert receiver.token_ids == written[:3]
        assert receiver.text == model.tokenizer.decode(written[:2])


def test_an_end_token_can_be_ignored(with_eos: tuple[Model, list[int]]) -> None:
    with Engine(with_eos[0]) as engine:
        assert run(engine).token_ids == with_eos[1]


def test_no_end_token_comes_before_min_tokens(with_eos: tuple[Model, list[int]]) -> None:
    model, written = with_eos
    with Engine(model) as engine:
        receiver = run(engine, replace(GREEDY, ignore_eos=False, min_tokens=10))
        assert len(receiver.token_ids) >= 10
        assert written[2] not in receiver.token_ids[:10]


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    """Row 37."""
    params = SamplingParams(max_tokens=60, seed=1, ignore_eos=True)
    whole = run(engine, params).text
    stop = whole[20:23]
    receiver = run(engine, replace(params, stop=("never there", stop)))
    assert receiver.reason == "stop"
    assert receiver.text == whole[: whole.index(stop)]
    assert len(receiver.token_ids) < 60


def test_a_stop_string_of_the_prompts_tail_is_not_looked_for_in_the_prompt(
    engine: Engine, model: Model
) -> None:
    """Row 37."""
    tail = model.tokenizer.decode(PROMPT)
    assert tail not in run(engine).text
    assert run(engine, replace(GREEDY, stop=(tail,))).reason == "length"


def test_what_a_stop_string_held_back_is_shown_when_it_did_not_come(engine: Engine) -> None:
    whole = run(engine).text
    receiver = run(engine, replace(GREEDY, stop=(whole[-3:] + "never",)))
    assert receiver.text == whole
    assert receiver.reason == "length"


def test_times_are_not_negative_and_count_the_queue(engine: Engine) -> None:
    first = busy(engine)
    second = Receiver()
    engine.submit(request("second"), second)
    threading.Timer(0.1, first.release.set).start()
    assert isinstance(second.last, Finished)
    timings = second.last.timings
    assert timings.queue_ms > 50
    assert timings.prefill_ms > 0 < timings.decode_ms


# ---- abort


def test_abort_ends_the_running_request_within_one_step(engine: Engine) -> None:
    """Row 46."""
    receiver = Receiver()

    def emit(event: Event) -> None:
        receiver(event)
        if len(receiver.token_ids) == 3:
            engine.abort("long")

    engine.submit(request("long", replace(GREEDY, max_tokens=4000)), emit)
    assert receiver.reason == "abort"
    assert len(receiver.token_ids) == 3


def test_abort_ends_a_waiting_request_while_another_runs(engine: Engine) -> None:
    """Row 46."""
    running = Receiver()
    waiting = Receiver()
    tokens_at_end: list[int] = []

    def emit(event: Event) -> None:
        running(event)
        if len(running.token_ids) == 5:
            engine.abort("waiting")

    def emit_waiting(event: Event) -> None:
        waiting(event)
        tokens_at_end.append(len(running.token_ids))

    first = busy(engine)
    engine.submit(request("running", replace(GREEDY, max_tokens=500)), emit)
    engine.submit(request("waiting"), emit_waiting)
    first.release.set()
    assert waiting.reason == "abort"
    assert tokens_at_end == [5]
    assert running.reason == "length"
    assert isinstance(waiting.last, Finished)
    assert waiting.last.usage.completion_tokens == 0


def test_abort_in_prefill_writes_nothing(engine: Engine) -> None:
    """Row 46."""
    first = busy(engine)
    receiver = Receiver()
    engine.submit(request("long", prompt=(9,) * 4000), receiver)
    first.release.set()
    while engine.stats().waiting:
        pass
    engine.abort("long")
    assert receiver.reason == "abort"
    assert receiver.token_ids == []


def test_abort_twice_or_of_nobody_does_nothing(engine: Engine) -> None:
    engine.abort("nobody")
    receiver = busy(engine)
    engine.abort("busy")
    engine.abort("busy")
    receiver.release.set()
    assert receiver.reason == "abort"
    engine.abort("busy")
    assert run(engine).reason == "length"
    assert receiver.endings == 1


@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize("way", ["close", "del"])
def test_leaving_a_stream_aborts_the_request(engine: Engine, taken: int, way: str) -> None:
    stream = engine.stream(request("left", replace(GREEDY, max_tokens=4000)))
    for _ in range(taken):
        next(stream)
    if way == "close":
        stream.close()
        assert list(stream) == []
    else:
        del stream
    assert run(engine).reason == "length"
    assert engine.stats().completion_tokens < 4000


def test_a_stream_ends_with_the_last_event(engine: Engine) -> None:
    events = list(engine.stream(request()))
    assert isinstance(events[-1], Finished)
    assert all(isinstance(event, TextDelta) for event in events[:-1])


# ---- what is not admitted


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(engine: Engine) -> None:
    """Row 38."""
    with pytest.raises(RequestError, match=r"4096.*4096") as caught:
        engine.submit(request(prompt=(5,) * 4096), Receiver())
    assert caught.value.code == "context_length_exceeded"


def test_a_shorter_context_has_fewer_scores_to_hold_where_these_are_capped(tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / "tiny", FAMILIES["gemma2"]))
    states = []
    for longest in (256, 64):
        engine = Engine(model, EngineSettings(max_model_len=longest, tokens_per_step=100))
        states.append(engine.memory_plan.workspace_bytes)
        engine.close()
    assert states[0] - states[1] == 4 * 100 * 3 * model.spec.heads * (256 - 64)


def test_a_token_outside_the_vocabulary_is_refused(engine: Engine) -> None:
    """Row 38."""
    with pytest.raises(RequestError) as caught:
        engine.submit(request(prompt=(320,)), Receiver())
    assert caught.value.param == "prompt"


def test_a_full_queue_refuses_at_once_and_the_admitted_complete(engine: Engine) -> None:
    """Row 48."""
    first = busy(engine)
    waiting = [Receiver() for _ in range(4)]
    for number, receiver in enumerate(waiting):
        engine.submit(request(f"waiting {number}"), receiver)
    with pytest.raises(CapacityError):
        engine.submit(request("too many"), Receiver())
    assert (engine.stats().waiting, engine.stats().running) == (4, 1)
    first.release.set()
    assert [receiver.reason for receiver in waiting] == ["length"] * 4


def test_an_id_in_flight_is_refused(engine: Engine) -> None:
    first = busy(engine)
    with pytest.raises(RequestError):
        engine.submit(request("busy"), Receiver())
    first.release.set()
    assert first.reason == "length"


# ---- faults


def test_nan_logits_fail_one_request_and_the_engine_lives(tmp_path: Path) -> None:
    """Row 50."""
    directory = save_tiny(tmp_path / "nan", Tiny(tied=False))
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][99] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with Engine(load_model(directory)) as engine:
        failed = run(engine, prompt=(40, 99))
        assert isinstance(failed.last, Failed)
        assert isinstance(failed.last.error, HalfweaveError)
        assert run(engine, replace(GREEDY, max_tokens=1)).reason == "length"


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_receiver_that_raises_ends_its_own_request_only(
    engine: Engine, error: type[BaseException]
) -> None:
    """Row 50."""
    received: list[Event] = []

    def emit(event: Event) -> None:
        received.append(event)
        raise error("receiver")

    engine.submit(request("raises"), emit)
    assert run(engine).reason == "length"
    assert [type(event) for event in received] == [TextDelta, Finished]
    assert engine.stats().alive


class DyingDecoder(Decoder):
    """A decoder that ends its thread on token 13, as a crash in a library would."""

    def run(self, parts: Sequence[Part], memory: Any) -> torch.Tensor:
        if any(13 in part.tokens for part in parts):
            raise SystemExit("crash")
        return super().run(parts, memory)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engines_thread_dies_everybody_hears_of_it(model: Model) -> None:
    """Row 51."""
    dying = DyingDecoder(model.checkpoint, model.spec, torch.float32, torch.device("cpu"))
    with Engine(replace(model, decoder=dying), EngineSettings(max_running=1)) as engine:
        first = busy(engine)
        receivers = [Receiver() for _ in range(3)]
        for number, receiver in enumerate(receivers):
            engine.submit(request(f"{number}", prompt=(13 + number,)), receiver)
        first.release.set()
        for receiver in receivers:
            assert isinstance(receiver.last, Failed)
            assert isinstance(receiver.last.error, EngineDeadError)
            assert receiver.endings == 1
        assert first.reason == "length"
        engine._thread.join(WAIT_S)
        assert not engine.stats().alive
        with pytest.raises(EngineDeadError):
            engine.submit(request("late"), Receiver())
        engine.abort("0")


# ---- close


def test_close_aborts_who_runs_and_who_waits(model: Model) -> None:
    """Row 52."""
    engine = Engine(model)
    receivers = [Receiver() for _ in range(3)]
    for number, receiver in enumerate(receivers):
        engine.submit(request(f"{number}", replace(GREEDY, max_tokens=4000)), receiver)
    assert receivers[0].started.wait(WAIT_S)
    engine.close()
    assert [(r.reason, r.endings) for r in receivers] == [("abort", 1)] * 3
    assert not engine.stats().alive
    with pytest.raises(EngineDeadError):
        engine.submit(request("late"), Receiver())
    engine.close()


def test_close_with_time_to_drain_lets_requests_finish(model: Model) -> None:
    """Row 52."""
    engine = Engine(model)
    receivers = [Receiver() for _ in range(3)]
    for number, receiver in enumerate(receivers):
        engine.submit(request(f"{number}"), receiver)
    engine.close(drain_s=WAIT_S)
    assert [receiver.reason for receiver in receivers] == ["length"] * 3


def test_random_aborts_leave_one_ending_each_and_no_pages(model: Model) -> None:
    """Rows 46 and 54."""
    dice = random.Random(0)
    receivers = [Receiver() for _ in range(60)]
    with Engine(model) as engine:
        for number, receiver in enumerate(receivers):
            params = replace(GREEDY, max_tokens=dice.randint(1, 30))
            engine.submit(request(f"{number}", params), receiver)
            if dice.random() < 0.5:
                engine.abort(f"{dice.randint(0, number)}")
        for receiver in receivers:
            assert receiver.reason in ("abort", "length")
        stats = engine.stats()
        assert (stats.waiting, stats.running, stats.requests_finished) == (0, 0, 60)
        written = sum(len(receiver.token_ids) for receiver in receivers)
        assert stats.completion_tokens == written
        assert idle(engine)
    assert {receiver.endings for receiver in receivers} == {1}
