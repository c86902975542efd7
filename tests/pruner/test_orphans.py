"""Checkpoints of other tools, written here by independent code from the layouts' description."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from halfweave.errors import CheckpointError, RefusedError, UnsupportedModel
from halfweave.kernels.formats import Int4, Sparse24, Sparse24Int4
from halfweave.pruner.orphans import import_orphan
from halfweave.pruner.recovery import Recovery, recover
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.model import load_model
from safetensors.torch import load_file, save_file
from support.command import Command, assert_error
from support.pruning import TEXT
from support.tiny import FAMILIES, Tiny, edit_json, pack_directory, save_tiny
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
)

# marlin-24 wants rows in 64s, and its scales columns in 128s.
SIZES = Tiny(hidden=256, intermediate=384, heads=4, kv_heads=4)
SHORT = Tiny(hidden=320, intermediate=320, heads=5, kv_heads=5)  # no multiple of 128
Pack = Callable[[torch.Tensor], dict[str, torch.Tensor]]
NAMES = tuple(
    f"model.layers.{layer}.{part}_proj"
    for layer in range(2)
    for part in (*(f"self_attn.{role}" for role in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
)


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    fours = weight.abs().view(len(weight), -1, 4)
    keep = torch.zeros_like(fours, dtype=torch.bool)
    return weight * keep.scatter_(-1, fours.topk(2).indices, True).view_as(weight)


def codes_and_scales(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes -8 to 7 of which two of every four are no zeros, and fp16 scales."""
    kept = two_of_four(weight)
    groups = kept.view(len(weight), -1, group or weight.shape[1])
    scale = (groups.abs().amax(-1) / 7).clamp_min(1e-3).half()
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7).view_as(weight)
    # A kept weight that rounds to 0 is none for the layouts.
    return codes, scale


def bitmask(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    kept = two_of_four(weight).bfloat16()
    mask = (kept != 0).numpy()
    return {
        "shape": torch.tensor(kept.shape).reshape(-1, 1),
        "compressed": kept[kept != 0].view(len(kept), -1),
        "bitmask": torch.from_numpy(np.packbits(mask, axis=-1, bitorder="little")),
    }


def marlin(weight: torch.Tensor, group: int = 128) -> dict[str, torch.Tensor]:
    """By the steps of its writers: CUTLASS's values, metadata, tiles, words, scales."""
    codes, scale = codes_and_scales(weight, group)
    values, meta = sparse_semi_structured_from_dense_cutlass(codes.half())
    meta = reordered(plain_metadata(values, codes))
    unsigned = (values.T + 8).to(torch.int64).numpy()
    half, rows = unsigned.shape
    tiles = unsigned.reshape(half // 16, 16, rows // 16, 16).transpose(0, 2, 1, 3)
    order = []
    for i in range(32):
        column = i // 4
        first = [
            16 * row + (column // 2) * 256 + 8 * (column % 2) + 4 * block
            for block in (0, 1)
            for row in (2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4 + 4), 2 * (i % 4 + 4) + 1)
        ]
        for j in range(4):
            order.append([first[k] + j for k in (0, 2, 4, 6, 1, 3, 5, 7)])
    flat = tiles.reshape(-1, 1024)[:, np.array(order).ravel()].reshape(half // 16, rows * 16)
    words = sum(flat[:, k::8] << 4 * k for k in range(8)).astype(np.uint32)
    scales = scale.T.contiguous()
    if len(scales) > 1 and group < half:
        turned = [8 * block + at for block in range(8) for at in (0, 4, 1, 5, 2, 6, 3, 7)]
        scales = scales.reshape(-1, 64)[:, turned].reshape(scales.shape).contiguous()
    return {
        "weight_packed": torch.from_numpy(words.view(np.int32)),
        "meta": meta.reshape(meta.shape[1] // 2, meta.shape[0] * 2),
        "scale_packed": scales,
    }


def plain_metadata(values: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Words of four groups of four columns, in rows: which columns the values are of."""
    kept = [
        next(
            (i, j)
            for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
            if [four[i], four[j]] == pair and not any(four[k] for k in range(4) if k not in (i, j))
        )
        for pair, four in zip(
            values.reshape(-1, 2).tolist(), codes.reshape(-1, 4).tolist(), strict=True
        )
    ]
    nibbles = torch.tensor([i | j << 2 for i, j in kept]).view(len(codes), -1, 4)
    words = (nibbles << 4 * torch.arange(4)).sum(-1)
    return (words - (words >= 2**15).long() * 2**16).to(torch.int16)


def reordered(meta: torch.Tensor) -> torch.Tensor:
    """Rows within 64 in another order, blocks of 2 x 2 transposed, pairs of columns together."""
    rows, columns = meta.shape
    flat = torch.empty(rows * columns, dtype=meta.dtype)
    for r in range(rows):
        inside = r % 64
        row = r - inside + 4 * (inside // 8) + 2 * (inside % 2)
        row += (inside // 4) % 2 + 32 * ((inside // 2) % 2)
        for c in range(columns):
            to, at = row, c
            if row % 2 == 0 and c % 2 == 1:
                to, at = row + 1, c - 1
            elif row % 2 == 1 and c % 2 == 0:
                to, at = row - 1, c + 1
            flat[at // 2 * 2 * rows + to * 2 + at % 2] = meta[r, c]
    return flat.view(rows, columns)


def gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    theirs = {"weight_packed": "B_24", "meta": "B_meta", "scale_packed": "s"}
    return {theirs[name]: tensor for name, tensor in marlin(weight).items()}


def packed_ints(
    weight: torch.Tensor, sparse: bool = True, group: int = 64
) -> dict[str, torch.Tensor]:
    if sparse:
        codes, scale = codes_and_scales(weight, group)
    else:
        parts = weight.split(group, 1)  # the last one may be short
        scale = torch.stack([part.abs().amax(1) / 7 for part in parts], 1).half()
        each = [part / scale[:, at : at + 1].float() for at, part in enumerate(parts)]
        codes = torch.cat(each, 1).round().clamp(-8, 7)
    unsigned = (codes + 8).to(torch.int64).view(len(codes), -1, 8)
    words = sum(unsigned[..., k] << 4 * k for k in range(8)).numpy().astype(np.uint32)
    return {
        "weight_packed": torch.from_numpy(words.view(np.int32)),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def dequantized(weight: torch.Tensor, group: int) -> torch.Tensor:
    codes, scale = codes_and_scales(weight, group)
    return codes * scale.float().repeat_interleave(group or weight.shape[1], 1)


def orphan(directory: Path, pack: Pack, block: dict[str, object], sizes: Tiny = SIZES) -> Path:
    """A tiny model whose linears are packed, with the block in its config."""
    source = save_tiny(directory / "tiny", sizes)
    tensors = load_file(source / "model.safetensors")
    for name in NAMES:
        weight = tensors.pop(f"{name}.weight")
        tensors |= {f"{name}.{suffix}": part for suffix, part in pack(weight).items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    edit_json(source / "config.json", lambda config: config.update(quantization_config=block))
    return source


def original(directory: Path, name: str) -> torch.Tensor:
    """The weight that `orphan` packed: equal arguments give equal models."""
    again = save_tiny(directory / "again", SIZES)
    return load_file(again / "model.safetensors")[f"{name}.weight"]


def compressed(format_: str, **more: object) -> dict[str, object]:
    return {"quant_method": "compressed-tensors", "format": format_, **more}


SPARSITY = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
LAYOUTS: dict[str, tuple[Pack, dict[str, object], type, Callable[[torch.Tensor], torch.Tensor]]] = {
    "sparse-24-bitmask": (
        bitmask,
        compressed("dense", sparsity_config=SPARSITY),
        Sparse24,
        lambda w: two_of_four(w).bfloat16().float(),
    ),
    "marlin-24": (marlin, compressed("marlin-24"), Sparse24Int4, lambda w: dequantized(w, 128)),
    "marlin-24 by rows": (
        lambda w: marlin(w, 0),
        compressed("marlin-24"),
        Sparse24Int4,
        lambda w: dequantized(w, 0),
    ),
    "marlin_24": (
        gptq,
        {"quant_method": "gptq", "checkpoint_format": "marlin_24"},
        Sparse24Int4,
        lambda w: dequantized(w, 128),
    ),
    "pack-quantized": (
        packed_ints,
        compressed("pack-quantized"),
        Sparse24Int4,
        lambda w: dequantized(w, 64),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_weight_comes_over_as_it_was(name: str, tmp_path: Path) -> None:
    pack, block, kind, wanted = LAYOUTS[name]
    result = import_orphan(orphan(tmp_path, pack, block), tmp_path / "out")
    assert dict(result.linears) == {kind.kind: 14}
    checkpoint = Checkpoint.open(tmp_path / "out")
    for linear in (NAMES[0], NAMES[5], NAMES[13]):
        found = checkpoint.linear(linear)
        assert isinstance(found, kind)
        assert torch.equal(found.unpack(), wanted(original(tmp_path, linear)))
    assert not {"sparsity_config", "compression_config"} & checkpoint.config.keys()
    load_model(tmp_path / "out", "float32")


def test_codes_that_are_not_2_of_4_become_dense_ones(tmp_path: Path) -> None:
    source = orphan(tmp_path, lambda w: packed_ints(w, sparse=False), compressed("pack-quantized"))
    result = import_orphan(source, tmp_path / "out")
    assert dict(result.linears) == {Int4.kind: 14}


def test_a_group_that_ends_short_has_its_own_scale(tmp_path: Path) -> None:
    pack = partial(packed_ints, sparse=False, group=128)
    source = orphan(tmp_path, pack, compressed("pack-quantized"), SHORT)
    import_orphan(source, tmp_path / "out")
    weight = load_file(save_tiny(tmp_path / "again", SHORT) / "model.safetensors")
    for name in (NAMES[0], NAMES[13]):
        found = Checkpoint.open(tmp_path / "out").linear(name)
        assert isinstance(found, Int4) and found.group == 128
        whole = weight[f"{name}.weight"]
        parts = pack(whole)
        scale = parts["weight_scale"].float().repeat_interleave(128, 1)[:, : whole.shape[1]]
        assert ((found.unpack() - whole).abs() <= 0.51 * scale).all()


@pytest.mark.parametrize(
    ("aside", "weights", "message"),
    [
        ({}, {"symmetric": False}, "zero points"),
        ({}, {"group_size": 16}, "groups of 16 columns"),
        ({"weight_zero_point": torch.ones(1, dtype=torch.int8)}, {}, "zero points"),
        ({"weight_zero_point": torch.zeros(1, dtype=torch.int32)}, {}, "zero points"),
        ({"weight_g_idx": torch.arange(384)}, {}, "an order of their own"),
    ],
)
def test_codes_that_mean_something_else_are_refused(
    aside: dict[str, torch.Tensor], weights: dict[str, object], message: str, tmp_path: Path
) -> None:
    block = compressed("pack-quantized", config_groups={"group_0": {"weights": weights}})

    def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return packed_ints(weight) | {
            name: tensor[: weight.shape[1]].clone() for name, tensor in aside.items()
        }

    with pytest.raises(UnsupportedModel, match=message):
        import_orphan(orphan(tmp_path, pack, block), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_zero_points_of_zero_are_left_behind(tmp_path: Path) -> None:
    def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return packed_ints(weight) | {"weight_zero_point": torch.zeros(1, dtype=torch.int8)}

    source = orphan(tmp_path, pack, compressed("pack-quantized"))
    import_orphan(source, tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    assert not [name for name in load_file(shard) if name.endswith("zero_point")]


@pytest.mark.parametrize("bits", [16, 4])
def test_what_another_tool_pruned_can_be_trained(bits: int, tmp_path: Path) -> None:
    pack, block, _, _ = LAYOUTS["sparse-24-bitmask"]
    import_orphan(orphan(tmp_path, pack, block), tmp_path / "pruned")
    parent = save_tiny(tmp_path / "parent", SIZES)
    asked = Recovery(str(TEXT), tokens=4096, bits=bits, group=32, precision="float32")
    result = recover(tmp_path / "pruned", parent, tmp_path / "out", asked)
    assert not result.rolled_back
    kind = Sparse24Int4 if bits == 4 else Sparse24
    assert isinstance(Checkpoint.open(tmp_path / "out").linear(NAMES[3]), kind)


def test_a_dense_model_that_happens_to_be_2_of_4_is_packed(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", Tiny(hidden=64, heads=4, intermediate=96))
    tensors = load_file(source / "model.safetensors")
    for name in NAMES[:-1]:
        tensors[f"{name}.weight"] = two_of_four(tensors[f"{name}.weight"])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = import_orphan(source, tmp_path / "out")
    assert dict(result.linears) == {"sparse24": 13, "dense": 1}
    prompt = torch.tensor([5, 17, 3])
    texts = []
    for path in (source, tmp_path / "out"):
        decoder = load_model(path, "float32").decoder
        texts.append(decoder.logits(decoder.forward(prompt, decoder.new_cache())))
    torch.testing.assert_close(texts[0], texts[1])


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "phi3"])
def test_other_families_come_in_as_they_are_stored(family: str, tmp_path: Path) -> None:
    """GPT-2's linears lie the other way round, and stay so where they are not packed."""
    pack_directory(save_tiny(tmp_path / "tiny", FAMILIES[family]), tmp_path / "p", "sparse24")
    source = tmp_path / "p-dense"
    tensors = load_file(source / "model.safetensors")
    spoilt = next(name for name in sorted(tensors) if ".0." in name and tensors[name].dim() == 2)
    tensors[spoilt][:] = torch.randn(tensors[spoilt].shape)  # not 2:4
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = import_orphan(source, tmp_path / "out")
    assert (result.linears["dense"], len(result.linears)) == (1, 2)
    prompt, scores = torch.tensor([5, 17, 3]), []
    for path in (source, tmp_path / "out"):
        decoder = load_model(path, "float32").decoder
        scores.append(decoder.logits(decoder.forward(prompt, decoder.new_cache())))
    torch.testing.assert_close(*scores)


def test_what_is_nothing_of_the_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no linear that is 2:4"):
        import_orphan(save_tiny(tmp_path / "dense"), tmp_path / "out")
    source = orphan(tmp_path, bitmask, {"quant_method": "awq"})
    with pytest.raises(UnsupportedModel, match="'awq' is not read here"):
        import_orphan(source, tmp_path / "out")
    block = compressed("float-quantized")
    edit_json(source / "config.json", lambda config: config.update(quantization_config=block))
    with pytest.raises(UnsupportedModel, match="none of sparse-24-bitmask"):
        import_orphan(source, tmp_path / "out")
    block = compressed("dense", sparsity_config=SPARSITY, transform_config={"config_groups": {}})
    edit_json(source / "config.json", lambda config: config.update(quantization_config=block))
    with pytest.raises(UnsupportedModel, match="turned by a transform"):
        import_orphan(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_packed_head_is_refused(tmp_path: Path) -> None:
    source = orphan(tmp_path, packed_ints, compressed("pack-quantized"))
    tensors = load_file(source / "model.safetensors")
    head = packed_ints(tensors["model.embed_tokens.weight"].float())
    tensors |= {f"lm_head.{suffix}": part for suffix, part in head.items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match="lm_head is packed, and is no linear of a block"):
        import_orphan(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("suffix", "spoil", "message"),
    [
        ("bitmask", lambda t: t * 0 + 7, "two of every four"),
        ("bitmask", lambda t: t[:, 1:], "do not fit"),
        ("compressed", lambda t: t * float("nan"), "finite|numbers|NaN"),
    ],
)
def test_hostile_masks_are_told(
    suffix: str, spoil: Callable[[torch.Tensor], torch.Tensor], message: str, tmp_path: Path
) -> None:
    pack, block, _, _ = LAYOUTS["sparse-24-bitmask"]
    source = orphan(tmp_path, pack, block)
    tensors = load_file(source / "model.safetensors")
    name = f"{NAMES[3]}.{suffix}"
    tensors[name] = spoil(tensors[name]).contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        import_orphan(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["meta", "scale_packed", "weight_packed"])
def test_marlin_parts_that_do_not_fit_are_told(suffix: str, tmp_path: Path) -> None:
    pack, block, _, _ = LAYOUTS["marlin-24"]
    source = orphan(tmp_path, pack, block)
    tensors = load_file(source / "model.safetensors")
    name = f"{NAMES[3]}.{suffix}"
    tensors[name] = tensors[name][:, :-2].contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="do not fit each other"):
        import_orphan(source, tmp_path / "out")


def test_the_verb_takes_a_directory(halfweave: Command, tmp_path: Path) -> None:
    pack, block, _, _ = LAYOUTS["marlin-24"]
    source = orphan(tmp_path, pack, block)
    ran = halfweave("import", source, tmp_path / "out")
    assert ran.code == 0
    assert "14 sparse24_int4" in ran.out and "marlin-24" in ran.out
    told = halfweave("inspect", tmp_path / "out")
    assert told.code == 0 and "imported from tiny" in told.out
    manifest = json.loads((tmp_path / "out" / "halfweave.json").read_text())
    assert manifest["provenance"]["base"] == {"name": "tiny", "layout": "marlin-24"}
    assert_error(halfweave("import", source, tmp_path / "out"), 3, "exists already")
