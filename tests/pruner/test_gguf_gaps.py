"""What transformers' reader of GGUF passes over is carried over all the same, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from halfweave.errors import CheckpointError, RefusedError, UnsupportedModel
from halfweave.pruner.gguf_file import GgufFile
from halfweave.pruner.gguf_gaps import rope_of
from halfweave.pruner.importers import import_gguf, plan_import
from halfweave.runtime.families import decoder_spec
from halfweave.runtime.tokenizer import Tokenizer
from safetensors.torch import load_file
from support.command import Command
from support.gguf import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    gguf,
    tiny_gpt2,
    tiny_llama,
    write_gguf,
    write_gpt2,
)
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(directory: Path, name: str = "config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / name).read_text())
    return found


def imported(tmp_path: Path, **how: Any) -> Path:
    source = write_gguf(tmp_path / "source.gguf", "F32", **how)
    import_gguf(source, tmp_path / "out", dtype="float32")
    return tmp_path / "out"


def stretched(kind: str, factor: float) -> Callable[[Any], None]:
    def more(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(factor)

    return more


def with_factors(factors: torch.Tensor) -> Callable[[Any], None]:
    return lambda writer: writer.add_tensor("rope_freqs.weight", factors.float().numpy())


def llama3_factors() -> torch.Tensor:
    """By transformers: by how much each frequency is divided."""
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "head_dim": HEAD_DIM}
    config = LlamaConfig(**sizes, max_position_embeddings=131072, rope_parameters=LLAMA3)
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** -(torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    return plain / slowed


def test_positions_stretched_evenly_stay_so(tmp_path: Path) -> None:
    out = imported(tmp_path, more=stretched("linear", 4.0))
    assert config_of(out)["rope_parameters"]["rope_type"] == "linear"
    positions = decoder_spec(config_of(out)).positions
    assert (positions.kind, positions.factor) == ("linear", 4.0)  # type: ignore[union-attr]


def test_positions_stretched_as_llama_3_does_stay_so(tmp_path: Path) -> None:
    out = imported(tmp_path, more=with_factors(llama3_factors()))
    assert config_of(out)["rope_parameters"] == LLAMA3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (stretched("yarn", 4.0), "stretched by 'yarn'"),
        (with_factors(torch.linspace(1, 8, HEAD_DIM // 2)), "not as Llama 3's"),
        (
            lambda writer: writer.add_tensor("rope_factors_long.weight", np.ones(8, np.float32)),
            "longrope",
        ),
    ],
)
def test_positions_stretched_in_other_ways_are_refused_before_any_work(
    more: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "source.gguf", more=more)
    for run in (plan_import, import_gguf):
        with pytest.raises(UnsupportedModel, match=message):
            run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "factor", "older", "found"),
    [
        (None, 4.0, None, 4.0),  # linear is what llama.cpp takes it for
        ("linear", None, 4.0, 4.0),
        ("none", 4.0, None, None),
        ("linear", 0.0, None, None),
        ("linear", 1.0, None, None),
    ],
)
def test_factors_are_read_as_llama_cpp_does(
    kind: str | None, factor: float | None, older: float | None, found: float | None, tmp_path: Path
) -> None:
    def more(writer: Any) -> None:
        if kind is not None:
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        if factor is not None:
            writer.add_rope_scaling_factor(factor)
        if older is not None:
            writer.add_float32("llama.rope.scale_linear", older)

    source = GgufFile.open(write_gguf(tmp_path / "source.gguf", more=more))
    rope = rope_of(source)
    assert rope == (None if found is None else {"rope_type": "linear", "factor": found})


def test_rows_of_queries_and_keys_are_in_order_where_heads_are_told_once(tmp_path: Path) -> None:
    out = imported(tmp_path, kv_heads=HEADS, tells_kv_heads=False)
    stored = load_file(out / "model.safetensors")
    for name, (_, weight, _) in tiny_llama(HEADS).items():
        assert torch.equal(stored[name], weight), name


def test_numbers_without_a_place_are_refused(tmp_path: Path) -> None:
    def biased(writer: Any) -> None:
        writer.add_tensor("blk.0.attn_q.bias", np.ones(HIDDEN, np.float32))

    source = write_gguf(tmp_path / "source.gguf", more=biased)
    with pytest.raises(UnsupportedModel, match=f"{HIDDEN} of its numbers have no place"):
        import_gguf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_end_of_a_turn_ends_an_answer(tmp_path: Path) -> None:
    out = imported(tmp_path, more=lambda writer: writer.add_eot_token_id(0))
    assert config_of(out, "generation_config.json")["eos_token_id"] == [2, 0]
    assert Tokenizer.open(out).eos_ids == {0, 2}


@pytest.mark.parametrize(("told", "begins"), [(None, True), (False, False), (True, True)])
def test_llama_3s_tokenizer_begins_texts_and_takes_whole_words(
    told: bool | None, begins: bool, tmp_path: Path
) -> None:
    def more(writer: Any) -> None:
        if told is not None:
            writer.add_add_bos_token(told)

    out = imported(tmp_path, pre="llama-bpe", more=more)
    assert config_of(out, "tokenizer.json")["model"]["ignore_merges"] is True
    ids = Tokenizer.open(out).encode("he")
    assert (ids[0] == 1) == begins


def test_a_model_without_rotary_positions_is_imported(tmp_path: Path) -> None:
    """GPT-2's config has no such field."""
    source = write_gpt2(tmp_path / "source.gguf")
    import_gguf(source, tmp_path / "out", dtype="float32")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, (_, weight) in tiny_gpt2().items():
        assert torch.equal(stored[f"transformer.{name}"], weight), name


def test_what_is_printed_of_a_file_is_short(halfweave: Command, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "source.gguf")
    told = halfweave("import", source, tmp_path / "out", "--json").document["result"]["source"]
    assert set(told) == {
        "path",
        "sha256",
        "architecture",
        "license",
        "pre_tokenizer",
        "tensor_types",
        "parameters",
    }


def test_metadata_that_is_no_text_is_damage(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "source.gguf")
    data = source.read_bytes()
    assert data.count(b"apache-2.0") == 1
    source.write_bytes(data.replace(b"apache-2.0", b"apache-2.\xff"))
    with pytest.raises(CheckpointError, match="damaged"):
        GgufFile.open(source)


def test_a_text_split_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "source.gguf", pre="never-heard-of")
    with pytest.raises(UnsupportedModel, match="splits texts by 'never-heard-of'"):
        import_gguf(source, tmp_path / "out")


def test_a_link_to_an_empty_directory_is_filled_and_the_working_one_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_gguf(tmp_path / "source.gguf")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    import_gguf(source, tmp_path / "link")
    assert (tmp_path / "real" / "model.safetensors").exists()
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RefusedError, match="the working directory"):
        import_gguf(source, Path("."))
