"""Several answers to a prompt, echoed prompts, log-probabilities, penalties: whole and streamed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from halfweave.runtime.model import Model
from halfweave.runtime.token_text import token_bytes, token_text
from support.http_server import Live, run
from support.tiny import dense_model

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def prompt_ids(served_model: Model) -> list[int]:
    return served_model.tokenizer.encode(PROMPT)


def texts(document: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in document["choices"]]


# ---- n and best_of


def test_n_choices_of_each_prompt_come_in_order_and_differ(live: Live) -> None:
    fields: dict[str, Any] = {"seed": 3, "max_tokens": 12, "temperature": 2, "ignore_eos": True}
    document = live.complete(prompt=["The", "Two"], n=3, **fields).json
    assert [choice["index"] for choice in document["choices"]] == list(range(6))
    assert len(set(texts(document))) == 6
    alone = live.complete(prompt="Two", n=3, **fields).json
    assert texts(alone) == texts(document)[3:]


def test_n_is_repeatable_by_its_seed(live: Live) -> None:
    first, second = (live.complete(n=2, seed=9, temperature=1.5).json for _ in range(2))
    assert texts(first) == texts(second)


def test_a_prompt_counts_once_however_many_answers_it_gets(
    live: Live, prompt_ids: list[int]
) -> None:
    usage = live.complete(prompt=PROMPT, n=4, max_tokens=3, ignore_eos=True).json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt_ids), 12)


def test_the_strict_client_takes_n_answers_of_both_kinds(live: Live) -> None:
    client = live.client()
    answer = client.completions.create(model=live.model, prompt="The", n=2, max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1]
    turns: Any = [{"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(model=live.model, messages=turns, n=2, max_tokens=3)
    assert [choice.index for choice in chat.choices] == [0, 1]
    stream = client.chat.completions.create(
        model=live.model, messages=turns, n=2, max_tokens=3, stream=True
    )
    assert {choice.index for chunk in stream for choice in chunk.choices} == {0, 1}


def test_the_asynchronous_client_takes_them_too(live: Live) -> None:
    async def ask() -> set[int]:
        async with live.async_client() as client:
            stream = await client.chat.completions.create(
                model=live.model,
                messages=[{"role": "user", "content": "Hello"}],
                n=3,
                max_tokens=3,
                stream=True,
                logprobs=True,
                top_logprobs=2,
            )
            return {choice.index async for chunk in stream for choice in chunk.choices}

    assert run(ask()) == {0, 1, 2}


def test_the_best_of_several_are_the_likeliest(live: Live) -> None:
    fields: dict[str, Any] = {
        "seed": 5,
        "max_tokens": 6,
        "temperature": 2,
        "ignore_eos": True,
        "logprobs": 0,
    }
    every = live.complete(n=6, **fields).json["choices"]
    best = live.complete(n=2, best_of=6, **fields).json

    def mean(choice: dict[str, Any]) -> float:
        scores = choice["logprobs"]["token_logprobs"]
        return float(sum(scores) / len(scores))

    wanted = sorted(every, key=mean, reverse=True)[:2]
    assert texts(best) == [choice["text"] for choice in wanted]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == 36
    plain = live.complete(n=2, best_of=6, **{**fields, "logprobs": None}).json
    assert texts(plain) == texts(best)
    assert plain["choices"][0]["logprobs"] is None


# ---- echo and log-probabilities


def test_an_echoed_prompt_comes_first(live: Live, prompt_ids: list[int]) -> None:
    plain = live.complete(prompt=PROMPT, temperature=0).json
    echoed = live.complete(prompt=PROMPT, temperature=0, echo=True).json
    assert texts(echoed) == [PROMPT + texts(plain)[0]]
    of_ids = live.complete(prompt=prompt_ids, temperature=0, echo=True).json
    assert texts(of_ids)[0].endswith(texts(plain)[0])


def test_an_echo_alone_writes_nothing(live: Live) -> None:
    document = live.complete(prompt=PROMPT, echo=True, max_tokens=0).json
    assert texts(document) == [PROMPT]
    assert document["choices"][0]["finish_reason"] == "length"
    assert document["usage"]["completion_tokens"] == 0


def test_a_scored_prompt_has_the_log_probabilities_of_transformers(
    live: Live, served_model: Model, prompt_ids: list[int]
) -> None:
    """The shape that evaluation harnesses read; the first token was predicted by nothing."""
    choice = live.complete(
        prompt=prompt_ids, echo=True, logprobs=2, max_tokens=1, temperature=0
    ).json["choices"][0]
    scores = choice["logprobs"]
    oracle = dense_model(served_model.checkpoint.path)
    with torch.inference_mode():
        truth = oracle(torch.tensor([prompt_ids])).logits[0].log_softmax(-1)
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    found = scores["token_logprobs"][1 : len(prompt_ids)]
    wanted = [float(truth[at, token]) for at, token in enumerate(prompt_ids[1:])]
    # The server's arithmetic keeps keys and values in fp16.
    assert found == pytest.approx(wanted, abs=5e-3)
    tokens = [token_text(served_model.tokenizer, token) for token in prompt_ids]
    assert scores["tokens"][: len(prompt_ids)] == tokens
    assert len(scores["tokens"]) == len(prompt_ids) + 1
    for logprob, top in zip(scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True):
        assert 2 <= len(top) <= 3
        assert logprob in top.values()
        assert max(top.values()) == next(iter(top.values()))


def test_offsets_point_into_the_text(live: Live) -> None:
    choice = live.complete(
        prompt=PROMPT, echo=True, logprobs=0, max_tokens=6, add_special_tokens=False
    ).json["choices"][0]
    scores = choice["logprobs"]
    for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<")):
            # Bytes that turned out to be no character are shown with what comes after them.
            assert choice["text"][offset:].lstrip("\ufffd").startswith(token)


@pytest.mark.parametrize("echo", [True, False])
def test_streamed_log_probabilities_are_those_of_the_whole(live: Live, echo: bool) -> None:
    fields: dict[str, Any] = {
        "prompt": ["The quick", "Two"],
        "temperature": 0,
        "max_tokens": 8,
        "logprobs": 3,
        "echo": echo,
        "n": 2,
    }
    whole = live.complete(**fields).json
    *chunks, _ = live.complete(**fields, stream=True).events
    for choice in whole["choices"]:
        pieces = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [
                item for piece in pieces if piece["logprobs"] for item in piece["logprobs"][key]
            ]
            assert joined == choice["logprobs"][key]


def test_chat_log_probabilities_have_bytes_and_alternatives(
    live: Live, served_model: Model
) -> None:
    answer = live.client().chat.completions.create(
        model=live.model,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=10,
        seed=1,
        temperature=2,
        logprobs=True,
        top_logprobs=4,
        extra_body={"ignore_eos": True},
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert len(content) == 10
    for each in content:
        assert each.logprob <= 0
        assert len(each.top_logprobs) == 4
        assert bytes(each.bytes or []).decode(errors="replace") == each.token or (
            each.token.startswith("bytes:")
        )
    plain = live.chat(logprobs=True, max_tokens=3).json["choices"][0]["logprobs"]["content"]
    assert all(each["top_logprobs"] == [] for each in plain)
    assert live.chat(max_tokens=3).json["choices"][0]["logprobs"] is None


def test_streamed_chat_log_probabilities_are_those_of_the_whole(live: Live) -> None:
    fields: dict[str, Any] = {
        "temperature": 0,
        "max_tokens": 8,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = live.chat(**fields).json["choices"][0]["logprobs"]["content"]
    *chunks, _ = live.chat(**fields, stream=True).events
    pieces = [c["choices"][0]["logprobs"] for c in chunks]
    assert [each for piece in pieces if piece for each in piece["content"]] == whole


def test_bytes_of_all_tokens_make_the_text(served_model: Model) -> None:
    tokenizer = served_model.tokenizer
    text = "caf\u00e9 \U0001f98a \u2581 naive\n\t"
    ids = tokenizer.encode(text, special=False)
    assert b"".join(token_bytes(tokenizer, token) for token in ids).decode() == text


# ---- penalties, biases, stops


def written(choice: dict[str, Any]) -> list[str]:
    tokens: list[str] = choice["logprobs"]["tokens"]
    return tokens


def ids_of(model: Model, text: str) -> list[int]:
    """The tokens that stand for exactly this."""
    tokenizer = model.tokenizer
    return [t for t in range(tokenizer.vocab_size) if token_text(tokenizer, t) == text]


def test_a_bias_can_force_and_forbid(live: Live, served_model: Model) -> None:
    fields: dict[str, Any] = {"max_tokens": 5, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    token = served_model.tokenizer.encode("dog", special=False)[0]
    forced = live.complete(**fields, logit_bias={str(token): 100}).json["choices"][0]
    assert written(forced) == [token_text(served_model.tokenizer, token)] * 5
    first = written(live.complete(**fields).json["choices"][0])[0]
    (taken,) = ids_of(served_model, first)
    other = live.complete(**fields, logit_bias={str(taken): -100}).json["choices"][0]
    assert first not in written(other)


def test_penalties_keep_an_answer_from_repeating_itself(live: Live, served_model: Model) -> None:
    """A bias makes four tokens far likelier than all others; only penalties make it leave them."""
    few = served_model.tokenizer.encode("dog fox", special=False)
    fields: dict[str, Any] = {
        "temperature": 0,
        "max_tokens": 60,
        "ignore_eos": True,
        "logprobs": 0,
        "logit_bias": {str(token): 20 for token in few},
    }

    def different(**penalty: float) -> int:
        return len(set(written(live.complete(**fields, **penalty).json["choices"][0])))

    free = different()
    assert free <= len(set(few))
    assert different(frequency_penalty=2) > free
    assert different(presence_penalty=2) >= free
    assert different(repetition_penalty=2.0) > free
    assert different(frequency_penalty=-2) == 1


def test_a_stop_token_ends_the_answer(live: Live, served_model: Model) -> None:
    free = live.complete(temperature=0, max_tokens=10, ignore_eos=True, logprobs=0).json
    tokens = free["choices"][0]["logprobs"]["tokens"]
    stop = tokens[4]
    ids = ids_of(served_model, stop)
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 10, "stop_token_ids": ids}
    ended = live.complete(**fields, ignore_eos=True).json
    assert ended["usage"]["completion_tokens"] == tokens.index(stop) + 1
    assert ended["choices"][0]["finish_reason"] == "stop"
    kept = live.complete(**fields, ignore_eos=True, include_stop_str_in_output=True).json
    assert texts(kept)[0] == texts(ended)[0] + stop


def test_a_stop_string_can_be_kept(live: Live) -> None:
    free = texts(live.complete(temperature=0, max_tokens=24, ignore_eos=True).json)[0]
    stop = free[5:7]
    kept = live.complete(
        temperature=0,
        max_tokens=24,
        ignore_eos=True,
        stop=stop,
        include_stop_str_in_output=True,
    ).json
    assert texts(kept)[0] == free[: free.index(stop) + len(stop)]


def test_a_salt_sets_a_prompt_apart(live: Live) -> None:
    prompt = "a long beginning that fills several pages of keys and values " * 3

    def cached(**salt: str) -> int:
        document = live.complete(prompt=prompt, max_tokens=1, **salt).json
        return int(document["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(cache_salt="mine") == 0
    assert cached(cache_salt="mine") > 0
    assert cached(cache_salt="yours") == 0


def test_timings_leave_out_what_was_known(live: Live) -> None:
    prompt = "another long beginning that fills several pages of keys and values " * 3
    live.complete(prompt=prompt, max_tokens=2)
    document = live.complete(prompt=prompt, max_tokens=2, ignore_eos=True).json
    timings, usage = document["timings"], document["usage"]
    assert timings["cache_n"] == usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert timings["cache_n"] + timings["prompt_n"] == usage["prompt_tokens"]
    assert math.isfinite(timings["prompt_per_second"])
