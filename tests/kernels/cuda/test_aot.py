"""What the compiler makes of the kernels for GPUs that are not there, and which tile a shape gets.

`make test-gpu-static` sets HALFWEAVE_GPU_STATIC and takes every variant on every architecture.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import triton.language as tl
from halfweave.errors import HalfweaveError
from halfweave.kernels.cuda.aot import Signature, compile_kernel
from halfweave.kernels.cuda.build import build, every_variant, signature
from halfweave.kernels.cuda.int4_gemm import int4_gemm
from halfweave.kernels.cuda.roofs import bits_per_weight, decode_roof, dense_roof, sparse_roof
from halfweave.kernels.cuda.sparse_gemm import sparse_gemm
from halfweave.kernels.cuda.targets import ARCHITECTURES, CARDS
from halfweave.kernels.cuda.variants import (
    TILES,
    Choice,
    Product,
    Tile,
    Variant,
    all_variants,
    choose,
)
from support.command import Command, assert_error

ALL = bool(os.environ.get("HALFWEAVE_GPU_STATIC"))
SOME = [
    (Variant(TILES[0], "f16", 0, True, False), 80),
    (Variant(TILES[0], "f16", 0, True, True), 80),  # once spilled for programs that do not fit
    (Variant(TILES[0], "f16", 64, True, True), 86),
    (Variant(TILES[2], "bf16", 0, True, False), 90),
    (Variant(TILES[0], "bf16", 128, True, False), 90),
    (Variant(TILES[3], "f16", 64, True, True), 80),
    (Variant(TILES[5], "bf16", 64, False, False, True, True), 90),
    (Variant(TILES[6], "f16", 64, True, False), 80),
    (Variant(TILES[6], "bf16", 0, True, True), 90),
    (Variant(TILES[7], "bf16", 64, True, False), 80),
    (Variant(TILES[0], "bf16", 128, True, True, dense=True), 90),
    (Variant(TILES[6], "f16", 32, False, False, True, True, True), 80),
    (Variant(TILES[7], "f16", 0, False, False, True, True), 90),
    (Variant(TILES[5], "f16", 32, False, False, True, True), 80),
    (Variant(TILES[0], "bf16", 64, True, False, gated=True), 90),
    (Variant(TILES[7], "f16", 0, False, False, bias=True, gated=True), 80),
]


@pytest.mark.parametrize(("variant", "arch"), every_variant(ARCHITECTURES) if ALL else SOME)
def test_a_variant_is_what_it_is_meant_to_be(variant: Variant, arch: int) -> None:
    row = build(variant, arch)
    made = row.compiled
    assert made.stack_bytes == 0
    assert made.registers <= variant.tile.registers
    assert made.shared_bytes == variant.tile.shared_bytes(variant.group, variant.dense)
    assert made.shared_bytes <= ARCHITECTURES[arch].shared_per_program
    assert row.resident >= 1
    tile = variant.tile
    products = 2 * (tile.BN // 16 // tile.WN) * (tile.BM // 8 // tile.WM)
    assert row.products_per_step == products
    copies = [name for name in made.instructions if name.startswith("LDGSTS")]
    assert copies
    assert all("128" in name for name in copies)


def test_a_lost_promise_of_alignment_would_be_seen() -> None:
    """Without it copies are of 4 bytes, which is what the test above is there to catch."""
    variant, _ = SOME[0]
    known = Signature(signature(variant).types, {"V": variant}, ())
    made = compile_kernel(sparse_gemm, known, 80, variant.tile.warps)
    copies = [name for name in made.instructions if name.startswith("LDGSTS")]
    assert any("128" not in name for name in copies)


def test_a_kernel_that_does_not_compile_says_why_in_a_line() -> None:
    types = dict.fromkeys(("x", "values", "scale", "bias", "y"), "*fp16")
    types |= dict.fromkeys("MNKT", "i32") | {"x": "*i32"}
    constants = {"BN": 63, "BM": 16, "group": 64, "kind": tl.float16, "biased": False}
    with pytest.raises(HalfweaveError, match="int4_gemm does not compile for sm_80"):
        compile_kernel(int4_gemm, Signature(types, constants, ()), 80, 4)


def test_every_choice_is_a_variant_that_is_built() -> None:
    for arch, limits in ARCHITECTURES.items():
        built = {
            (v.tile, v.kind, v.group, v.dense, v.splits, v.gated) for v in all_variants(limits)
        }
        for M in (1, 8, 9, 16, 31, 33, 64, 65, 128, 4096):
            for N, K in ((576, 576), (1536, 576), (4096, 14336), (28672, 4096), (64, 128)):
                for group, dense in ((0, False), (32, False), (64, False), (128, True)):
                    chosen = choose(Product(M, N, K, "f16", group, dense), limits, 108)
                    if chosen.tile is None:
                        assert M > 64 if dense else (arch, M) == (90, 4096)
                        continue
                    found = chosen.tile, "f16", group, dense, chosen.splits > 1
                    assert (*found, False) in built, arch
                    assert chosen.splits > 1 or (*found, True) in built, arch
                    assert chosen.tile.shared_bytes(group, dense) <= limits.shared_per_program
                    assert chosen.splits == 1 or K // (64 * chosen.tile.WK) // chosen.splits >= 2


def test_few_tokens_get_few_and_long_rows_are_split_until_the_gpu_is_full() -> None:
    h200, rtx = ARCHITECTURES[90], ARCHITECTURES[86]
    assert choose(Product(1, 4096, 4096, "f16", 0), h200, 132) == Choice(TILES[0], 2)
    assert choose(Product(8, 4096, 4096, "f16", 64), h200, 132) == Choice(TILES[0], 8)
    assert choose(Product(1, 28672, 4096, "f16", 64), h200, 132) == Choice(TILES[0], 1)
    assert choose(Product(1, 576, 576, "f16", 64), h200, 132).tile == TILES[3]  # K is no 256
    assert choose(Product(17, 4096, 4096, "f16", 0), h200, 132).tile == TILES[2]
    assert choose(Product(17, 4096, 4096, "f16", 64), h200, 132).tile == TILES[5]
    assert choose(Product(64, 4096, 4096, "f16", 64), h200, 132) == Choice(TILES[6], 4)
    assert choose(Product(256, 28672, 4096, "f16", 64), h200, 132) == Choice(TILES[7], 1)
    assert choose(Product(512, 28672, 4096, "f16", 64), h200, 132).tile is None
    assert choose(Product(512, 28672, 4096, "f16", 0), rtx, 82).tile == replace(TILES[7], stages=3)


def test_programs_that_fit_are_limited_by_what_runs_out_first() -> None:
    a100 = ARCHITECTURES[80]
    assert a100.resident(registers=64, shared_bytes=0, warps=2) == 16
    assert a100.resident(registers=255, shared_bytes=0, warps=8) == 1
    assert a100.resident(registers=32, shared_bytes=40000, warps=1) == 4
    assert a100.resident(registers=32, shared_bytes=200_000, warps=1) == 0
    assert a100.resident(registers=16, shared_bytes=0, warps=1) == 32


def test_roofs_are_the_ratios_of_bytes_and_of_rates() -> None:
    assert [bits_per_weight(group) for group in (0, 128, 64, 32)] == [9, 3.125, 3.25, 3.5]
    card = CARDS["A100-80GB"]
    few, many = (Product(M, 4096, 4096, "f16", 0) for M in (1, 4096))
    assert dense_roof(few, card).us / sparse_roof(few, card).us == pytest.approx(16 / 9, rel=0.01)
    assert dense_roof(many, card).us / sparse_roof(many, card).us == pytest.approx(2, rel=0.01)
    linears, head = [(4096, 4096)] * 3, (32000, 4096)
    one, eight = (decode_roof(linears, head, batch, 128, card) for batch in (1, 8))
    assert one.dense < one.sparse < 16 / 3 * one.dense
    assert 7 * one.sparse < eight.sparse < 8 * one.sparse


def test_the_verb_prints_a_table_and_leaves_cubins(
    halfweave: Command, tmp_path: Path, tiny_model: Path
) -> None:
    out = tmp_path / "built"
    flags = ("--arch", "80", "--tile", "128x64", "--out", out, "--model", tiny_model)
    ran = halfweave("kernels", "compile", *flags, "--json")
    assert ran.code == 0
    variants = json.loads(ran.out)["variants"]
    assert len(variants) == 60
    assert {row["spills"] for row in variants} == {0}
    assert len(list(out.glob("*.cubin"))) == len(list(out.glob("*.ptx"))) == 60
    assert {row["batch"] for row in ran.document["roofs_tokens_per_s"]} == {1, 8, 32}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--arch", "81"), "architecture 81 is none of 80, 86, 89, 90"),
        (("--arch", "new"), "are no numbers"),
        (("--tile", "3x3"), "there is no tile 3x3"),
    ],
)
def test_wrong_calls_say_what_there_is(
    halfweave: Command, flags: tuple[str, ...], message: str
) -> None:
    assert_error(halfweave("kernels", "compile", *flags), 2, message)


def test_a_tile_s_shared_memory_is_that_of_its_stages_or_of_its_parts() -> None:
    assert Tile(64, 8, 1, 2, 1, 4).shared_bytes(0) == 45056
    assert Tile(64, 8, 1, 2, 1, 4).shared_bytes(64) == 20480
