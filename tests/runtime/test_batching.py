"""Requests side by side: each gets what it would get alone, whatever the others do."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from halfweave.errors import CapacityError, HalfweaveError, RequestError, UsageError
from halfweave.kernels.paging import PAGE_POSITIONS
from halfweave.runtime.decoder import Decoder
from halfweave.runtime.engine import Engine
from halfweave.runtime.engine_settings import EngineSettings
from halfweave.runtime.model import Model, load_model
from halfweave.runtime.paged import Part
from halfweave.runtime.params import SamplingParams
from halfweave.runtime.request import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    PromptScored,
    TextDelta,
)
from support.tiny import Tiny, dense_model, pack_directory, save_tiny

GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A packed model, on the kernels that promise the same bits in any company."""
    path = tmp_path_factory.mktemp("batching")
    dense = save_tiny(path / "dense", Tiny(positions=1024))
    return load_model(pack_directory(dense, path / "packed", "sparse24_int4"))


@pytest.fixture
def small(model: Model) -> Iterator[Engine]:
    """An engine whose pages hold far less than its requests would like."""
    settings = EngineSettings(max_model_len=160, kv_bytes=14 * model.decoder.page_bytes)
    with Engine(model, settings) as engine:
        yield engine
        assert_idle(engine)


def assert_idle(engine: Engine) -> None:
    deadline = time.monotonic() + 30
    while (stats := engine.stats()).running or stats.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    engine._scheduler.pool.check_integrity()
    assert engine.stats().pages_used == 0


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[tuple[int, ...]]:
    dice = random.Random(seed)
    return [
        tuple(dice.randint(3, 300) for _ in range(dice.randint(1, longest))) for _ in range(count)
    ]


def answers(
    engine: Engine,
    asked: Sequence[tuple[int, ...]],
    params: SamplingParams | Sequence[SamplingParams] = GREEDY,
    **more: Any,
) -> list[list[Event]]:
    """All at once; the events of each."""
    chosen = [params] * len(asked) if isinstance(params, SamplingParams) else params
    streams = [
        engine.stream(GenerationRequest(f"{number}", prompt, each, **more))
        for number, (prompt, each) in enumerate(zip(asked, chosen, strict=True))
    ]
    return [list(stream) for stream in streams]


def token_ids(events: Sequence[Event]) -> list[int]:
    assert isinstance(events[-1], Finished), events[-1]
    return [t for event in events if isinstance(event, TextDelta) for t in event.token_ids]


def finished(events: Sequence[Event]) -> Finished:
    assert isinstance(events[-1], Finished), events[-1]
    return events[-1]


# ---- the same text in any company


@pytest.mark.parametrize("share", [True, False])
def test_a_request_writes_in_a_batch_of_16_what_it_writes_alone(model: Model, share: bool) -> None:
    asked = prompts(16)
    with Engine(model, EngineSettings(share_prefixes=share)) as engine:
        together = [token_ids(events) for events in answers(engine, asked)]
        alone = [token_ids(answers(engine, [prompt])[0]) for prompt in asked]
    assert together == alone


def test_random_draws_do_not_depend_on_neighbours(model: Model) -> None:
    asked = prompts(8, seed=1)
    params = [
        SamplingParams(max_tokens=20, seed=number, ignore_eos=True, top_p=0.9)
        for number in range(8)
    ]
    with Engine(model) as engine:
        together = [token_ids(events) for events in answers(engine, asked, params)]
        for prompt, each, tokens in zip(asked, params, together, strict=True):
            assert token_ids(answers(engine, [prompt], each)[0]) == tokens


def test_greedy_batches_are_those_of_transformers(tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / "model", Tiny(positions=1024)), dtype="float32")
    oracle, asked = dense_model(model.checkpoint.path), prompts(12, seed=2)
    with Engine(model, EngineSettings(tokens_per_step=32)) as engine:
        found = [token_ids(events) for events in answers(engine, asked)]
    for prompt, tokens in zip(asked, found, strict=True):
        wanted = oracle.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None
        )
        assert wanted[0, len(prompt) :].tolist() == tokens


@pytest.mark.parametrize("tokens_per_step", [1, 7, 64])
def test_text_does_not_depend_on_how_prompts_are_cut(model: Model, tokens_per_step: int) -> None:
    asked = prompts(6, seed=3, longest=200)
    with Engine(model) as engine:
        wanted = [token_ids(events) for events in answers(engine, asked)]
    with Engine(model, EngineSettings(tokens_per_step=tokens_per_step)) as engine:
        assert [token_ids(events) for events in answers(engine, asked)] == wanted


def test_answers_go_on_while_a_long_prompt_is_read(model: Model) -> None:
    """Not one step passes in which the answer does not grow."""
    with Engine(model, EngineSettings(tokens_per_step=16)) as engine:
        writing = engine.stream(
            GenerationRequest("writing", (5, 6), replace(GREEDY, max_tokens=200))
        )
        next(writing)
        steps = sum(engine.stats().steps_by_tokens.values())
        list(engine.stream(GenerationRequest("long", (9,) * 900, replace(GREEDY, max_tokens=1))))
        grown = sum(engine.stats().steps_by_tokens.values()) - steps
        assert grown >= 900 // 15
        taken = sum(1 for _ in range(grown) if isinstance(next(writing), TextDelta))
        assert taken == grown
        writing.close()


# ---- pages


def test_when_pages_run_out_the_youngest_starts_over_with_the_same_text(
    model: Model, small: Engine
) -> None:
    """Row 49."""
    asked = prompts(8, seed=4, longest=100)
    params = replace(GREEDY, max_tokens=50)
    with Engine(model) as roomy:
        wanted = [token_ids(events) for events in answers(roomy, asked, params)]
    found = [token_ids(events) for events in answers(small, asked, params)]
    assert small.stats().preemptions > 0
    assert found == wanted


def test_random_answers_and_stops_survive_starting_over(model: Model, small: Engine) -> None:
    """Row 49."""
    asked = prompts(8, seed=5, longest=100)
    params = [
        SamplingParams(max_tokens=50, seed=n, ignore_eos=True, repetition_penalty=1.3, logprobs=2)
        for n in range(8)
    ]
    with Engine(model) as roomy:
        wanted = answers(roomy, asked, params)
    found = answers(small, asked, params)
    assert small.stats().preemptions > 0
    for each, other in zip(wanted, found, strict=True):
        assert each[:-1] == other[:-1]  # text, tokens and log-probabilities, event by event


def test_one_giant_request_gets_all_pages_and_ends(small: Engine) -> None:
    """Row 49."""
    giant = answers(small, [(7,) * 100, (8,) * 30, (9,) * 30], replace(GREEDY, max_tokens=500))
    assert [finished(events).reason for events in giant] == ["length"] * 3
    assert len(token_ids(giant[0])) == 60  # the context's 160


def test_a_prompt_that_can_never_fit_is_refused_with_both_numbers(small: Engine) -> None:
    with pytest.raises(RequestError, match=r"160.*160") as caught:
        small.submit(GenerationRequest("long", (5,) * 160), print)
    assert caught.value.code == "context_length_exceeded"


def test_too_little_memory_for_one_context_is_refused_at_once(model: Model) -> None:
    with pytest.raises(UsageError, match="bytes"):
        Engine(model, EngineSettings(kv_bytes=model.decoder.page_bytes))
    with pytest.raises(UsageError, match="2000"):
        Engine(model, EngineSettings(max_model_len=2000))


def test_random_requests_aborts_and_scarcity_leave_no_page_behind(small: Engine) -> None:
    """Rows 46, 49 and 54."""
    dice, streams = random.Random(6), []
    for number, prompt in enumerate(prompts(60, seed=6, longest=120)):
        params = replace(GREEDY, max_tokens=dice.randint(0, 60))
        streams.append(small.stream(GenerationRequest(f"{number}", prompt, params)))
        if dice.random() < 0.4:
            small.abort(f"{dice.randint(0, number)}")
    ends = [finished(list(stream)).reason for stream in streams]
    assert set(ends) <= {"length", "abort"}
    assert small.stats().requests_finished == 60


# ---- shared beginnings


def cached(events: Sequence[Event]) -> int:
    return finished(events).usage.cached_tokens


def test_a_known_beginning_is_not_computed_again(model: Model) -> None:
    prompt = prompts(1, seed=7)[0][:1] * 70
    with Engine(model) as engine:
        first = answers(engine, [prompt])[0]
        again = answers(engine, [prompt])[0]
        longer = answers(engine, [(*prompt[:40], 9, 9, 9)])[0]
    assert token_ids(again) == token_ids(first)
    assert [cached(events) for events in (first, again, longer)] == [0, 64, 32]


def test_a_prompt_of_whole_pages_leaves_something_to_compute(model: Model) -> None:
    prompt = (5,) * (2 * PAGE_POSITIONS)
    with Engine(model) as engine:
        first, again = (answers(engine, [prompt])[0] for _ in range(2))
    assert (cached(again), token_ids(again)) == (PAGE_POSITIONS, token_ids(first))


def test_an_answer_is_known_when_it_comes_back_as_a_prompt(model: Model) -> None:
    prompt = (5,) * 30
    with Engine(model) as engine:
        written = token_ids(answers(engine, [prompt])[0])
        assert cached(answers(engine, [(*prompt, *written)])[0]) >= 48


def test_other_salts_share_nothing(model: Model) -> None:
    prompt = (5,) * 60
    with Engine(model) as engine:
        answers(engine, [prompt], salt=b"one")
        assert cached(answers(engine, [prompt], salt=b"other")[0]) == 0
        assert cached(answers(engine, [prompt], salt=b"one")[0]) == 48


def test_sharing_can_be_turned_off(model: Model) -> None:
    with Engine(model, EngineSettings(share_prefixes=False)) as engine:
        events = [answers(engine, [(5,) * 60])[0] for _ in range(2)]
        assert cached(events[1]) == 0


def test_two_that_begin_alike_at_the_same_time_do_not_disturb_each_other(model: Model) -> None:
    asked = [(*(5,) * 50, last) for last in range(10, 18)]
    with Engine(model) as engine:
        together = [token_ids(events) for events in answers(engine, asked)]
    with Engine(model, EngineSettings(share_prefixes=False)) as engine:
        assert [token_ids(answers(engine, [prompt])[0]) for prompt in asked] == together


# ---- queue


def test_urgent_requests_are_begun_first(model: Model) -> None:
    order: list[str] = []
    with Engine(model, EngineSettings(max_running=1)) as engine:
        first = engine.stream(GenerationRequest("first", (5,), replace(GREEDY, max_tokens=300)))
        next(first)
        streams = []
        for name, priority in (("late", 5), ("middle", 0), ("urgent", -1), ("middle 2", 0)):
            request = GenerationRequest(name, (6,), GREEDY, priority=priority)

            def emit(event: Event, name: str = name) -> None:
                if isinstance(event, Finished):
                    order.append(name)

            engine.submit(request, emit)
            streams.append(name)
        first.close()
        assert_idle(engine)
    assert order == ["urgent", "middle", "middle 2", "late"]


def test_who_waits_too_long_is_told_so(model: Model) -> None:
    settings = EngineSettings(max_running=1, queue_timeout_s=0.05)
    with Engine(model, settings) as engine:
        first = engine.stream(GenerationRequest("first", (5,), replace(GREEDY, max_tokens=1000)))
        next(first)
        waited = list(engine.stream(GenerationRequest("second", (5,), GREEDY)))
        assert isinstance(waited[-1], Failed)
        assert isinstance(waited[-1].error, CapacityError)
        first.close()


def test_who_waits_for_pages_waits_in_the_queue(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = model.decoder.run

    def slow(*arguments: Any) -> Any:
        time.sleep(0.005)
        return real(*arguments)

    monkeypatch.setattr(model.decoder, "run", slow)
    room = EngineSettings(max_model_len=160, kv_bytes=10 * model.decoder.page_bytes)
    prompt = tuple(range(5, 101))
    first = GenerationRequest("first", prompt, replace(GREEDY, max_tokens=60))
    second = GenerationRequest("second", (*prompt, *range(7, 47)), GREEDY)
    with Engine(model, replace(room, queue_timeout_s=0.15)) as engine:
        running, waiting = engine.stream(first), engine.stream(second)
        last = list(waiting)[-1]
        assert isinstance(last, Failed) and isinstance(last.error, CapacityError)
        running.close()
    with Engine(model, room) as engine:
        running, waiting = engine.stream(first), engine.stream(second)
        ends = [list(each)[-1] for each in (running, waiting)]
        assert all(isinstance(each, Finished) for each in ends)
        usage, timings = ends[1].usage, ends[1].timings  # type: ignore[union-attr]
        assert usage.cached_tokens == 96 // PAGE_POSITIONS * PAGE_POSITIONS
        assert timings.queue_ms > 250
        assert timings.prefill_ms < timings.queue_ms
        assert engine.stats().prefix_hits == usage.cached_tokens


def test_of_several_requests_all_are_admitted_or_none(model: Model) -> None:
    with Engine(model, EngineSettings(max_running=1, max_waiting=2)) as engine:
        some = [(GenerationRequest(f"{n}", (5,), GREEDY), lambda event: None) for n in range(4)]
        with pytest.raises(RequestError, match="room for 3"):  # there will never be more
            engine.submit_all(some)
        assert engine.stats().waiting == engine.stats().running == 0
        with pytest.raises(RequestError):
            engine.submit_all([some[0], some[0]])
        engine.submit_all(some[:3])
        assert_idle(engine)


# ---- scores


def test_prompts_are_scored_as_transformers_scores_them(tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / "model", Tiny(positions=1024)), dtype="float32")
    oracle = dense_model(model.checkpoint.path)
    asked = prompts(5, seed=8, longest=300)
    params = SamplingParams(max_tokens=0, prompt_logprobs=3)
    with Engine(model, EngineSettings(tokens_per_step=50)) as engine:
        found = answers(engine, asked, params)
        again = answers(engine, asked, params)  # a known beginning must not take scores away
    for prompt, events, more in zip(asked, found, again, strict=True):
        assert finished(events).reason == "length"
        assert finished(events).usage.completion_tokens == 0
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt])).logits[0].log_softmax(-1)
        scored = [event for event in events if isinstance(event, PromptScored)]
        if len(prompt) == 1:
            assert scored[0].logprobs == ()
            continue
        wanted = logits[:-1].gather(1, torch.tensor(prompt)[1:, None])[:, 0]
        given = scored[0].logprobs
        assert [each.token_id for each in given] == list(prompt[1:])
        torch.testing.assert_close(
            torch.tensor([each.logprob for each in given]), wanted, atol=1e-4, rtol=1e-4
        )
        tops = logits[:-1].topk(3)
        assert [[t for t, _ in each.top] for each in given] == tops.indices.tolist()
        assert more[0] == events[0]


def test_a_prompt_whose_last_token_is_read_by_itself_is_scored_once(model: Model) -> None:
    params = SamplingParams(max_tokens=2, prompt_logprobs=0, ignore_eos=True)
    asked = [tuple(range(5, 5 + length)) for length in (49, 50, 51, 52, 101)]
    with Engine(model, EngineSettings(tokens_per_step=50)) as engine:
        for prompt in asked:
            (events,) = answers(engine, [prompt], params)
            (scored,) = [event for event in events if isinstance(event, PromptScored)]
            assert [each.token_id for each in scored.logprobs] == list(prompt[1:])
            assert events[0] is scored


def test_written_tokens_are_scored_by_the_models_own_scores(model: Model) -> None:
    """Whatever bias, penalty or temperature chose them."""
    params = SamplingParams(
        max_tokens=10, seed=3, logprobs=2, ignore_eos=True, logit_bias=((77, 100.0),)
    )
    with Engine(model) as engine:
        events = answers(engine, [(5, 6, 7)], params)[0]
        plain = answers(
            engine, [(5, 6, 7, *(77,) * 9)], SamplingParams(max_tokens=0, prompt_logprobs=0)
        )
    assert token_ids(events) == [77] * 10
    scores = [s for event in events if isinstance(event, TextDelta) for s in event.logprobs]
    assert isinstance(plain[0][0], PromptScored)
    wanted = [each.logprob for each in plain[0][0].logprobs[2:]]
    assert [each.logprob for each in scores[:9]] == pytest.approx(wanted)
    assert all(len(each.top) == 2 and each.top[0][1] >= each.top[1][1] for each in scores)


# ---- faults


class FailingDecoder(Decoder):
    """A decoder that raises for whole batches in which there is a token 13."""

    def run(self, parts: Sequence[Part], memory: Any) -> torch.Tensor:
        if any(13 in part.tokens for part in parts):
            raise ValueError("thirteen")
        return super().run(parts, memory)


def test_one_requests_exception_leaves_its_neighbours_alone(model: Model) -> None:
    """Row 50."""
    failing = FailingDecoder(model.checkpoint, model.spec, torch.float32, torch.device("cpu"))
    asked = [(5, 6), (13, 4), (7, 8)]
    forbid = replace(GREEDY, logit_bias=((13, -100.0),))
    with Engine(replace(model, decoder=failing)) as engine:
        found = answers(engine, asked, forbid)
        assert isinstance(found[1][-1], Failed)
        assert str(found[1][-1].error) == "thirteen"
        assert len(token_ids(found[0])) == len(token_ids(found[2])) == 40
        assert engine.stats().finished == {"length": 2, "error": 1}
        assert_idle(engine)


class NotANumber(Decoder):
    """A decoder that computes NaN where the token is 13."""

    def run(self, parts: Sequence[Part], memory: Any) -> torch.Tensor:
        hidden = super().run(parts, memory).clone()
        tokens = [token for part in parts for token in part.tokens]
        hidden[[token == 13 for token in tokens]] = float("nan")
        return hidden


def test_one_row_of_nan_fails_one_request_and_is_counted(model: Model) -> None:
    """Row 50."""
    broken = NotANumber(model.checkpoint, model.spec, torch.float32, torch.device("cpu"))
    forbid = replace(GREEDY, logit_bias=((13, -100.0),))
    with Engine(replace(model, decoder=broken)) as engine:
        found = answers(engine, [(5, 6), (4, 13), (7, 8)], forbid)
        assert isinstance(found[1][-1], Failed)
        assert isinstance(found[1][-1].error, HalfweaveError)
        assert len(token_ids(found[0])) == len(token_ids(found[2])) == 40
        assert engine.stats().not_numbers == 1


def test_nan_in_the_scores_of_a_prompt_is_a_failure_too(model: Model) -> None:
    """Row 50."""
    broken = NotANumber(model.checkpoint, model.spec, torch.float32, torch.device("cpu"))
    scores = SamplingParams(max_tokens=0, prompt_logprobs=0)
    with Engine(replace(model, decoder=broken), EngineSettings(tokens_per_step=2)) as engine:
        found = answers(engine, [(5, 6, 7), (4, 13, 7)], scores)
        assert finished(found[0]).reason == "length"
        assert isinstance(found[1][-1], Failed)
        assert engine.stats().not_numbers == 1


def test_pages_that_got_lost_are_replaced_once_nobody_runs(model: Model) -> None:
    """Invariant 6: and the next requests find all of them."""
    with Engine(model) as engine:
        answers(engine, [(5, 6)])
        engine._scheduler.pool.take(3)
        answers(engine, [(5, 6)])
        assert_idle(engine)
