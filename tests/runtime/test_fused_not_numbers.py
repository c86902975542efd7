"""The fused decoder with what is no finite number: it spoils what may see it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.families import decoder_spec
from halfweave.runtime.fused import FusedBits, FusedDecoder
from support.cpu_levels import LEVELS_HERE, at_level
from support.tiny import FAMILIES, Tiny, pack_directory, save_tiny
from torch import Tensor

SPOILT, PLAIN = 5, 6  # two tokens
WINDOW = 13  # of FAMILIES["mistral"]
ATTENTIONS = {  # one query a head, several, and more than are mixed together; windows
    "no sharing of heads": Tiny(kv_heads=6),
    "heads share": Tiny(kv_heads=2),
    "many heads share": Tiny(hidden=80, heads=10, kv_heads=1),
    "mistral": FAMILIES["mistral"],
    "bloom": FAMILIES["bloom"],
}
Tensors = dict[str, Tensor]


def changed(directory: Path, change: Callable[[Tensors], None]) -> Path:
    path = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return directory


def opened(path: Path, level: str, kv_bits: int = 16) -> FusedDecoder:
    checkpoint = Checkpoint.open(path)
    spec = decoder_spec(checkpoint.config)
    return FusedDecoder(checkpoint, spec, at_level(level), FusedBits(kv=kv_bits))


def states(decoder: FusedDecoder, ids: Tensor) -> Tensor:
    return decoder.forward(ids, decoder.new_cache())


def plain_tokens(count: int) -> Tensor:
    ids = torch.randint(10, 300, (count,), generator=torch.Generator().manual_seed(count))
    assert SPOILT not in ids
    return ids


def without_a_number(tensors: Tensors) -> None:
    """The token's hidden state, and so its keys and values in every block."""
    name = next(name for name in tensors if "embed" in name and name.endswith("weight"))
    tensors[name][SPOILT] = torch.nan


def with_values_beyond_halves(tensors: Tensors) -> None:
    """The token's values, and no other's, are infinite once stored; its keys are numbers."""
    tensors["model.embed_tokens.weight"][:, 0] = 0
    tensors["model.embed_tokens.weight"][SPOILT] = 0
    tensors["model.embed_tokens.weight"][SPOILT, 0] = 1
    tensors["model.layers.0.self_attn.v_proj.weight"][:, 0] = 1e5


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.parametrize(
    ("name", "spoil"),
    [(name, without_a_number) for name in ATTENTIONS]
    + [(name, with_values_beyond_halves) for name in ATTENTIONS if name != "bloom"],
)
def test_a_token_gets_its_bits_whatever_comes_behind_it(
    name: str, spoil: Callable[[Tensors], None], kv_bits: int, level: str, tmp_path: Path
) -> None:
    """In the same call, so that neighbours are looked at together."""
    decoder = opened(changed(save_tiny(tmp_path / "m", ATTENTIONS[name]), spoil), level, kv_bits)
    ids = plain_tokens(40)
    wanted = states(decoder, ids)
    assert wanted.isfinite().all()
    for at in (1, 6, 17, 31, 39):
        found = states(decoder, torch.cat((ids[:at], torch.tensor([SPOILT]), ids[at + 1 :])))
        assert torch.equal(found[:at], wanted[:at]), at
        if kv_bits == 16 or spoil is without_a_number:
            assert not found[at].isfinite().any(), at


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("kv_bits", [16, 8])
def test_what_left_the_window_is_forgotten_to_the_bit(
    kv_bits: int, level: str, tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "m", FAMILIES["mistral"])
    decoder = opened(changed(source, without_a_number), level, kv_bits)
    ids = plain_tokens(60)
    seen_by_layers = FAMILIES["mistral"].layers * (WINDOW - 1)
    for at in (0, 3, 15, 20):
        spoilt, plain = ids.clone(), ids.clone()
        spoilt[at], plain[at] = SPOILT, PLAIN
        found, behind = states(decoder, spoilt), at + seen_by_layers + 1
        assert not found[at:behind].isfinite().any()
        assert torch.equal(found[behind:], states(decoder, plain)[behind:]), at


@pytest.mark.parametrize("level", LEVELS_HERE)
def test_a_hidden_state_without_a_number_has_no_likeliest_token(level: str, tmp_path: Path) -> None:
    """A head of codes must not make a zero of it, which would be sampled from."""
    source = save_tiny(tmp_path / "m", Tiny(tied=False))
    decoder = opened(pack_directory(source, tmp_path / "packed", "sparse24_int4"), level)
    hidden = torch.randn(3, 72)
    wanted = decoder.logits(hidden)
    hidden[1, 40] = torch.nan
    found = decoder.logits(hidden)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize("level", LEVELS_HERE)
def test_relu_does_not_hide_what_is_no_number(level: str, tmp_path: Path) -> None:
    """The only thing that a block adds to the residual is what its MLP's activation gives."""

    def spoil(tensors: Tensors) -> None:
        tensors["model.decoder.layers.0.fc1.bias"][7] = torch.nan

    source = save_tiny(tmp_path / "m", FAMILIES["opt"])
    assert not states(opened(changed(source, spoil), level), plain_tokens(3)).isfinite().any()


@pytest.mark.parametrize("level", LEVELS_HERE)
def test_keys_and_values_next_to_zero_are_zero_in_8_bits(level: str, tmp_path: Path) -> None:
    """127 / 1e-38 is no number any more, and what it is cast to is the compiler's choice."""

    def shrink(tensors: Tensors) -> None:
        for name in tensors:
            if "v_proj" in name:
                tensors[name] *= 1e-38

    tiny = save_tiny(tmp_path / "tiny", Tiny())
    small = changed(save_tiny(tmp_path / "small", Tiny()), shrink)
    none = changed(tiny, lambda tensors: [t.zero_() for n, t in tensors.items() if "v_proj" in n])
    ids = plain_tokens(20)
    assert torch.equal(*(states(opened(path, level, 8), ids) for path in (small, none)))
