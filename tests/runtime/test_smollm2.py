"""A real model, where one is at hand: HALFWEAVE_SMOLLM2 names the directory of
SmolLM2-135M-Instruct."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from halfweave import LLM, SamplingParams
from support.tiny import dense_model

PLACE = os.environ.get("HALFWEAVE_SMOLLM2", "")
pytestmark = pytest.mark.skipif(
    not (PLACE and Path(PLACE).is_dir()),
    reason="HALFWEAVE_SMOLLM2 does not name a directory with SmolLM2-135M-Instruct",
)
TEXT = (
    "The Moon is Earth's only natural satellite. It orbits at an average distance of about "
    "384,400 kilometres, and its gravity raises the tides. " * 3
)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(PLACE) as llm:
        yield llm


def test_logits_equal_transformers(llm: LLM) -> None:
    ids = torch.tensor(llm.model.tokenizer.encode(TEXT))
    with torch.inference_mode():
        wanted = dense_model(Path(PLACE))(ids[None]).logits[0]
    decoder = llm.model.decoder
    cache = decoder.new_cache()
    pieces = ids.split([len(ids) - 8, *[1] * 8])
    found = torch.cat([decoder.logits(decoder.forward(piece, cache)) for piece in pieces])
    assert (found - wanted).abs().max() < 1e-4


def test_it_answers_a_question(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    answer = llm.chat(question, SamplingParams(max_tokens=40, temperature=0))
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
