"""Exported models, read by transformers and by the compressed-tensors package themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from halfweave.errors import CheckpointError, RefusedError, UsageError
from halfweave.pruner.export import export
from halfweave.pruner.pack_quantized import pack
from halfweave.runtime.model import load_model
from safetensors.torch import load_file
from support.command import Command, assert_error
from support.pruning import set_weight
from support.tiny import (
    FAMILIES,
    Tiny,
    dense_model,
    edit_json,
    pack_directory,
    save_tiny,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

# Widths that whole groups of 32 fill.
WHOLE = Tiny(hidden=64, intermediate=96, heads=4, kv_heads=2)
IDS = torch.tensor([[5, 17, 3, 99, 42, 8, 61, 7]])


def packed(directory: Path, kind: str, tiny: Tiny = WHOLE) -> Path:
    return pack_directory(save_tiny(directory / "tiny", tiny), directory / "packed", kind)


def loaded(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("kind", ["sparse24", "sparse24_int4", "int4", "int8"])
@pytest.mark.parametrize("tiny", [WHOLE, Tiny()], ids=["whole groups", "a short last group"])
def test_a_dense_export_is_the_model_that_was_unpacked(
    kind: str, tiny: Tiny, tmp_path: Path
) -> None:
    model = packed(tmp_path, kind, tiny)
    result = export(model, tmp_path / "out", dtype="float32")
    assert torch.equal(
        logits(loaded(tmp_path / "out")), logits(dense_model(tmp_path / "packed-dense"))
    )
    assert (result.packed, result.dtype) == (0, "float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization_config", "sparsity_config", "compression_config"} & config.keys()
    # Also a model of our own again, and whoever wants can prune it once more.
    assert load_model(tmp_path / "out", "float32").checkpoint.linears == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_export_of_any_family_is_one_that_transformers_reads(
    family: str, tmp_path: Path
) -> None:
    """GPT-2's linears lie the other way round there."""
    export(packed(tmp_path, "sparse24_int4", FAMILIES[family]), tmp_path / "out", dtype="float32")
    wanted = logits(dense_model(tmp_path / "packed-dense"))
    assert torch.equal(logits(loaded(tmp_path / "out")), wanted)


@pytest.mark.parametrize("kind", ["sparse24_int4", "int4", "int8"])
def test_the_compressed_tensors_package_reads_our_codes(kind: str, tmp_path: Path) -> None:
    model = packed(tmp_path, kind)
    result = export(model, tmp_path / "out", "compressed-tensors", "float32")
    assert (result.packed, result.dense) == (14, 0)
    theirs, ours = loaded(tmp_path / "out"), dense_model(tmp_path / "packed-dense")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)
    kwargs = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(theirs.generate(IDS, **kwargs), ours.generate(IDS, **kwargs))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size > 0


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_models_that_the_package_does_not_know_are_refused(family: str, tmp_path: Path) -> None:
    model = packed(tmp_path, "sparse24_int4", FAMILIES[family])
    with pytest.raises(RefusedError, match="other modules than compressed-tensors knows"):
        export(model, tmp_path / "out", "compressed-tensors", "float32")


def test_pruned_places_are_codes_of_0(tmp_path: Path) -> None:
    export(packed(tmp_path, "sparse24_int4"), tmp_path / "out", "compressed-tensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    words = tensors["model.layers.0.mlp.up_proj.weight_packed"]
    assert (words.dtype, words.shape) == (torch.int32, (96, 64 // 8))
    codes = (words[..., None] >> 4 * torch.arange(8) & 15).view(96, 16, 4) - 8
    assert ((codes != 0).sum(-1) <= 2).all()
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float32


def test_what_has_no_whole_groups_stays_dense_and_is_named(tmp_path: Path) -> None:
    """72 columns in groups of 32; a tied head is never packed."""
    model = packed(tmp_path, "sparse24_int4", Tiny(hidden=72, intermediate=128))
    result = export(model, tmp_path / "out", "compressed-tensors", "float32")
    assert (result.packed, result.dense) == (2, 12)
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.q_proj" in block["ignore"] and "lm_head" in block["ignore"]
    theirs, ours = loaded(tmp_path / "out"), dense_model(tmp_path / "packed-dense")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)


def test_floats_have_no_codes_to_export(tmp_path: Path) -> None:
    model = packed(tmp_path, "sparse24")
    with pytest.raises(RefusedError, match="no linear of this model has codes"):
        export(model, tmp_path / "out", "compressed-tensors")
    assert {entry.name for entry in tmp_path.iterdir()} == {"tiny", "packed", "packed-dense"}


def test_floats_are_those_of_the_files_where_the_config_does_not_tell(tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "tiny", WHOLE)
    edit_json(dense / "config.json", lambda config: config.pop("dtype"))
    model = pack_directory(dense, tmp_path / "packed", "int8")
    stored = load_file(model / "model.safetensors")["model.norm.weight"]
    assert stored.dtype == torch.float32
    assert export(model, tmp_path / "out").dtype == "float32"
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["model.norm.weight"], stored)


def test_numbers_that_a_dtype_cannot_hold_are_no_infinities(tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "tiny", WHOLE)
    set_weight(dense, "model.norm.weight", lambda w: w.fill_(1e5))
    model = pack_directory(dense, tmp_path / "packed", "sparse24")
    with pytest.raises(UsageError, match=r"model.norm.weight .* float16 cannot hold"):
        export(model, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    export(model, tmp_path / "out", dtype="bfloat16")


def test_wrong_calls_and_damaged_models_leave_nothing(tmp_path: Path) -> None:
    model = packed(tmp_path, "int4")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(RefusedError, match="exists already"):
        export(model, tmp_path / "taken")
    with pytest.raises(UsageError, match="none of dense, compressed-tensors"):
        export(model, tmp_path / "out", "gguf")
    with pytest.raises(UsageError, match="none of bfloat16"):
        export(model, tmp_path / "out", dtype="int8")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.parametrize(("bits", "columns"), [(4, 64), (4, 70), (8, 64), (8, 6)])
def test_words_are_those_of_the_package(bits: int, columns: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (5, columns), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(codes.to(torch.int8), bits), pack_to_int32(codes.to(torch.int8), bits))


def test_the_verb_says_what_it_wrote(halfweave: Command, pruned: Path, tmp_path: Path) -> None:
    ran = halfweave("export", pruned, tmp_path / "dense")
    assert ran.code == 0
    assert "dense in " in ran.out and "AutoModelForCausalLM loads" in ran.out
    assert_error(halfweave("export", pruned, tmp_path / "dense"), 3, "exists already")
