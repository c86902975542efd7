"""The decoder against transformers, however the sequence is cut into calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from halfweave.errors import CapacityError
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.decoder import Decoder
from halfweave.runtime.families import decoder_spec
from support.tiny import (
    FAMILIES,
    LLAMA3_ROPE,
    VOCABULARY,
    Tiny,
    dense_model,
    pack_directory,
    save_tiny,
)
from torch import Tensor

TOLERANCE = 1e-4
MODELS = {
    "tied": Tiny(),
    "untied": Tiny(tied=False),
    "one key-value head": Tiny(kv_heads=1),
    "no sharing of heads": Tiny(kv_heads=6),
    "biases": Tiny(options={"attention_bias": True, "mlp_bias": True}),
    "own head size": Tiny(options={"head_dim": 16}),
    "llama3 rope": Tiny(options={"rope_parameters": LLAMA3_ROPE}),
    "linear rope": Tiny(
        options={"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}}
    ),
    "stored in bf16": Tiny(dtype=torch.bfloat16),
    **FAMILIES,
}


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    checkpoint = Checkpoint.open(directory)
    return Decoder(checkpoint, decoder_spec(checkpoint.config), dtype, torch.device("cpu"))


def tokens(count: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(7))


def expected(directory: Path, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return dense_model(directory)(ids[None]).logits[0]


def logits_in_pieces(decoder: Decoder, ids: Tensor, sizes: list[int]) -> Tensor:
    cache = decoder.new_cache()
    return torch.cat([decoder.logits(decoder.forward(p, cache)) for p in ids.split(sizes)])


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_for_any_cut_of_the_sequence(name: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model", MODELS[name])
    ids = tokens(50)
    wanted = expected(directory, ids)
    decoder = load(directory)
    for sizes in ([50], [7, 1, 30, 12], [1] * 50):
        found = logits_in_pieces(decoder, ids, sizes)
        assert (found - wanted).abs().max() < TOLERANCE, sizes


@pytest.mark.parametrize("kind", ["dense", "sparse24", "sparse24_int4"])
@pytest.mark.parametrize("name", ["tied", "untied", *FAMILIES])
def test_a_packed_model_equals_its_unpacked_weights(kind: str, name: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", MODELS[name])
    packed = pack_directory(source, tmp_path / "packed", kind)
    ids = tokens(40)
    wanted = expected(tmp_path / "packed-dense", ids)
    found = logits_in_pieces(load(packed), ids, [25, 14, 1])
    assert (found - wanted).abs().max() < TOLERANCE


def test_the_cache_grows_past_its_first_chunk(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model", Tiny(positions=700))
    ids = tokens(600)
    found = logits_in_pieces(load(directory), ids, [200, 100, 299, 1])
    assert (found - expected(directory, ids)).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["tied", *FAMILIES])
def test_bfloat16_stays_close_to_fp32(name: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model", MODELS[name])
    ids = tokens(30)
    wanted = expected(directory, ids)
    found = logits_in_pieces(load(directory, torch.bfloat16), ids, [20, 10])
    assert (found - wanted).abs().mean() < 0.05 * wanted.abs().mean()


def test_a_sequence_longer_than_the_model_is_refused_and_the_cache_is_unchanged(
    tiny_model: Path,
) -> None:
    decoder = load(tiny_model)
    cache = decoder.new_cache()
    decoder.forward(tokens(200), cache)
    with pytest.raises(CapacityError):
        decoder.forward(tokens(57), cache)
    assert cache.length == 200
