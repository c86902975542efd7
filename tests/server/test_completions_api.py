"""POST /v1/completions, through the official client at its strictest."""

from __future__ import annotations

from typing import Any

import pytest
from halfweave.runtime.llm import LLM
from halfweave.runtime.model import Model
from halfweave.runtime.params import SamplingParams
from openai import OpenAI
from support.http_server import Live, run

PROMPT = "The quick brown"


def test_greedy_text_is_what_the_offline_interface_writes(live: Live, served_model: Model) -> None:
    with LLM(served_model.checkpoint.path) as llm:
        params = SamplingParams(max_tokens=12, temperature=0)
        offline = llm.generate(PROMPT, params)[0]
    answer = live.client().completions.create(
        model=live.model, prompt=PROMPT, max_tokens=12, temperature=0
    )
    assert answer.choices[0].text == offline.text
    assert answer.choices[0].finish_reason == offline.finish_reason
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == live.model


def test_sixteen_tokens_are_the_default_as_in_the_original(live: Live) -> None:
    answer = live.client().completions.create(
        model=live.model, prompt=PROMPT, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_usage_counts_what_was_read_and_written(live: Live, served_model: Model) -> None:
    prompt_tokens = len(served_model.tokenizer.encode(PROMPT))
    usage = live.complete(prompt=PROMPT, max_tokens=5, ignore_eos=True).json["usage"]
    assert usage == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 5,
        "total_tokens": prompt_tokens + 5,
        "prompt_tokens_details": {"cached_tokens": 0},  # it has no full page
    }


def test_every_form_of_a_prompt_means_the_same(live: Live, served_model: Model) -> None:
    ids = served_model.tokenizer.encode(PROMPT)
    answers = [
        live.complete(prompt=prompt, temperature=0).json["choices"]
        for prompt in (PROMPT, [PROMPT], ids, [ids])
    ]
    assert all(choices == answers[0] for choices in answers)


def test_several_prompts_give_choices_in_their_order(live: Live) -> None:
    prompts = ["The", "Two weights", "A small model"]
    alone = [live.complete(prompt=p, temperature=0).json for p in prompts]
    together = live.complete(prompt=prompts, temperature=0).json
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    for whole, choice in zip(alone, together["choices"], strict=True):
        assert choice["text"] == whole["choices"][0]["text"]
    total = sum(whole["usage"]["total_tokens"] for whole in alone)
    assert together["usage"]["total_tokens"] == total


def test_equal_seeds_give_equal_texts(live: Live) -> None:
    first, second, other = (
        live.complete(seed=seed, max_tokens=24, temperature=1.5).json["choices"][0]["text"]
        for seed in (7, 7, 8)
    )
    assert first == second != other


def test_text_ends_before_a_stop_string(live: Live) -> None:
    free = live.complete(temperature=0, max_tokens=24, ignore_eos=True).json["choices"][0]["text"]
    stop = free[5:7]
    choice = live.complete(temperature=0, max_tokens=24, ignore_eos=True, stop=stop).json[
        "choices"
    ][0]
    assert choice["text"] == free[: free.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_min_tokens_keeps_the_model_from_stopping_at_once(live: Live) -> None:
    free = live.complete(temperature=0, max_tokens=24, ignore_eos=True).json["choices"][0]["text"]
    answer = live.complete(temperature=0, max_tokens=24, min_tokens=24, stop=[free[:1]]).json
    assert answer["usage"]["completion_tokens"] == 24


def test_a_stream_says_what_the_whole_answer_says(live: Live) -> None:
    fields = {"temperature": 0, "max_tokens": 20, "prompt": ["The", "Two"]}
    whole = live.complete(**fields).json
    *chunks, done = live.complete(**fields, stream=True).events
    assert done == "[DONE]"
    for choice in whole["choices"]:
        pieces = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        reasons = [piece["finish_reason"] for piece in pieces]
        assert reasons == [None] * (len(pieces) - 1) + [choice["finish_reason"]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_include_usage_adds_one_chunk_and_nulls_before_it(live: Live) -> None:
    *chunks, last, done = live.complete(
        stream=True, stream_options={"include_usage": True}, max_tokens=4, ignore_eos=True
    ).events
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4


def test_the_stream_is_framed_as_server_sent_events(live: Live) -> None:
    answer = live.complete(stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    for frame in answer.body.split(b"\n\n")[:-1]:
        assert frame.startswith(b"data: ")
        assert b"\n" not in frame and b"\r" not in frame


def test_the_official_client_reads_the_stream(live: Live) -> None:
    # Not its strict mode: its own type for a completion forbids the null finish_reason that
    # OpenAI's own service sends in every chunk but the last.
    client = OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    whole = live.complete(temperature=0).json["choices"][0]["text"]
    stream = client.completions.create(model=live.model, prompt="The", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole


def test_the_asynchronous_client_gets_the_same_text(live: Live) -> None:
    async def ask() -> Any:
        async with live.async_client() as client:
            return await client.completions.create(
                model=live.model, prompt="The", temperature=0, max_tokens=8
            )

    whole = live.complete(temperature=0, max_tokens=8).json["choices"][0]["text"]
    assert run(ask()).choices[0].text == whole


def test_timings_are_told_in_the_terms_of_llama_cpp(live: Live) -> None:
    timings = live.complete(max_tokens=6, ignore_eos=True).json["timings"]
    assert timings["predicted_n"] == 6
    assert timings["prompt_ms"] > 0 and timings["predicted_ms"] > 0 and timings["queue_ms"] >= 0
    # Five tokens came after the first, which the prompt's time paid for.
    rate = 5 * 1000 / timings["predicted_ms"]
    assert timings["predicted_per_second"] == pytest.approx(rate)
    *_, last, _ = live.complete(max_tokens=6, ignore_eos=True, stream=True).events
    assert set(last["timings"]) == set(timings)


def test_a_single_token_has_no_rate(live: Live) -> None:
    timings = live.complete(max_tokens=1, ignore_eos=True).json["timings"]
    assert timings["predicted_per_second"] is None


def test_a_character_split_over_tokens_arrives_whole(live: Live, served_model: Model) -> None:
    """Row 37: what is held back is not sent as an empty piece either."""
    whole = live.complete(temperature=1.9, seed=3, max_tokens=120, ignore_eos=True).json
    *chunks, _ = live.complete(
        temperature=1.9, seed=3, max_tokens=120, ignore_eos=True, stream=True
    ).events
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == whole["choices"][0]["text"]
    assert len(pieces) < 120, "some tokens were only a part of a character"
    assert all(pieces[:-1])


def test_a_prompt_too_long_for_the_context_is_told_both_numbers(
    live: Live, served_model: Model
) -> None:
    """Row 38."""
    most = served_model.max_model_len
    answer = live.complete(prompt=[5] * (most + 10))
    assert answer.status == 400
    assert answer.error["code"] == "context_length_exceeded"
    assert answer.error["param"] == "prompt"
    assert str(most) in answer.error["message"] and str(most + 10) in answer.error["message"]


def test_more_tokens_than_the_context_holds_end_by_length(live: Live, served_model: Model) -> None:
    answer = live.complete(prompt=[5, 6], max_tokens=2**31 - 1, ignore_eos=True).json
    assert answer["usage"]["total_tokens"] == served_model.max_model_len
    assert answer["choices"][0]["finish_reason"] == "length"


def test_one_bad_prompt_among_many_leaves_nothing_behind(live: Live) -> None:
    answer = live.complete(prompt=[[5, 6], [7, 10**6]], max_tokens=200)
    assert answer.status == 400
    assert answer.error["param"] == "prompt"


def test_the_number_of_prompts_is_bounded(live: Live) -> None:
    """Row 34."""
    assert live.complete(prompt=["a"] * 32, max_tokens=1).status == 200
    for many in (33, 2000):
        answer = live.complete(prompt=["a"] * many, max_tokens=1)
        assert (answer.status, answer.error["param"]) == (400, "prompt")
