"""The runtime on a real model, SmolLM2-135M-Instruct."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from halfweave import LLM, SamplingParams
from halfweave.runtime.fused import FusedDecoder
from halfweave.runtime.model import load_model
from support.tiny import dense_model

TEXT = (
    "The Moon is Earth's only natural satellite. It orbits at an average distance of about "
    "384,400 kilometres, and its gravity raises the tides. " * 3
)


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> Iterator[LLM]:
    with LLM(smollm2) as llm:
        yield llm


def test_logits_equal_transformers(llm: LLM, smollm2: Path) -> None:
    """float32 to the last bits; the kernels but for keys and values of 11 bits."""
    ids = torch.tensor(llm.model.tokenizer.encode(TEXT))
    with torch.inference_mode():
        wanted = dense_model(smollm2)(ids[None]).logits[0]
    exact = load_model(smollm2, "float32").decoder
    assert isinstance(llm.model.decoder, FusedDecoder)
    for decoder, bound in ((exact, 1e-4), (llm.model.decoder, 0.05)):
        cache = decoder.new_cache()
        pieces = ids.split([len(ids) - 8, *[1] * 8])
        found = torch.cat([decoder.logits(decoder.forward(piece, cache)) for piece in pieces])
        assert (found - wanted).abs().max() < bound


def test_it_answers_a_question(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    answer = llm.chat(question, SamplingParams(max_tokens=40, temperature=0))
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
