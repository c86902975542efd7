"""Every family over the wire, pruned and packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from halfweave.runtime.model import load_model
from support.http_server import live_server
from support.tiny import FAMILIES, dense_model, pack_directory, save_tiny

PROMPT = "The quick brown fox jumps over the lazy dog. A small model speaks"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_model_gives_the_log_probabilities_of_transformers(
    name: str, tmp_path: Path
) -> None:
    """2:4 with 4 bits, inputs rounded to 8: near what its unpacked weights say, token by token."""
    source = save_tiny(tmp_path / "model", FAMILIES[name])
    packed = pack_directory(source, tmp_path / "packed", "sparse24_int4")
    model = load_model(packed)
    ids = torch.tensor(model.tokenizer.encode(PROMPT))
    with torch.inference_mode():
        scores = dense_model(tmp_path / "packed-dense")(ids[None]).logits[0].log_softmax(-1)
    wanted = scores[:-1].gather(-1, ids[1:, None])[:, 0]
    with live_server(model) as live:
        asked = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        told = live.complete(**asked, echo=True, logprobs=1).json["choices"][0]
        written = live.complete(**asked).json["choices"][0]["text"]
    assert told["text"] == PROMPT + written
    found = torch.tensor(told["logprobs"]["token_logprobs"][1 : len(ids)])
    assert (found - wanted).abs().mean() < 0.05 * (wanted - wanted.mean()).abs().mean()
