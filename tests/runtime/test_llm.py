"""The offline interface on a tiny model, against transformers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from halfweave import LLM, SamplingParams
from halfweave.errors import RequestError
from support.tiny import dense_model

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(packed_model: Path) -> Iterator[LLM]:
    with LLM(packed_model, dtype="float32") as llm:  # comparable with an oracle
        yield llm


def test_generate_answers_in_the_order_of_the_prompts(llm: LLM, packed_model: Path) -> None:
    prompts = ["The quick", "Two weights", "A small model"]
    oracle = dense_model(packed_model.with_name("packed-dense"))
    for prompt, completion in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
        ids = llm.model.tokenizer.encode(prompt)
        wanted = oracle.generate(
            torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        assert completion.token_ids == tuple(wanted[0, len(ids) :].tolist())
        assert completion.text == llm.model.tokenizer.decode(completion.token_ids)
        assert completion.finish_reason == "length"
        assert completion.usage.total_tokens == len(ids) + 8


def test_one_prompt_gives_one_completion(llm: LLM) -> None:
    assert len(llm.generate("The quick", GREEDY)) == 1
    assert llm.generate([], GREEDY) == []


def test_chat_continues_the_rendered_conversation(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    ids = llm.model.tokenizer.apply_chat_template(messages)
    assert llm.chat(messages, GREEDY).usage.prompt_tokens == len(ids)


def test_score_is_the_log_probability_of_each_token(llm: LLM, packed_model: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog."
    score = llm.score(text)
    ids = torch.tensor([score.token_ids])
    with torch.inference_mode():
        logits = dense_model(packed_model.with_name("packed-dense"))(ids).logits[0, :-1]
    wanted = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).flatten()
    assert torch.tensor(score.logprobs).sub(wanted).abs().max() < 1e-4
    assert score.total == pytest.approx(float(wanted.sum()), abs=1e-3)


@pytest.mark.parametrize("text", ["", "a" * 3000])
def test_a_text_that_cannot_be_scored_is_refused(llm: LLM, text: str) -> None:
    with pytest.raises(RequestError):
        llm.score(text)


def test_an_empty_prompt_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.generate("")


def test_threads_may_share_a_model(llm: LLM) -> None:
    alone = llm.generate("The quick", GREEDY)[0].token_ids
    score = llm.score("The quick brown fox")
    wrong: list[object] = []

    def work() -> None:
        for _ in range(5):
            found = llm.generate("The quick", GREEDY)[0].token_ids, llm.score("The quick brown fox")
            wrong.extend([found] if found != (alone, score) else [])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
