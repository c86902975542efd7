"""The plain Triton kernels compiled for GPUs that are not there, and some of them emulated."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from halfweave.kernels.cuda.aot import Signature, compile_kernel
from halfweave.kernels.cuda.elementwise import gate, rms_norm, rope_and_remember
from halfweave.kernels.cuda.expand import expand_fragments, expand_int4
from halfweave.kernels.cuda.expand_gemm import expand_gemm
from halfweave.kernels.cuda.int4_gemm import int4_gemm
from halfweave.kernels.cuda.paged_attention import attend, join
from halfweave.kernels.cuda.reduce import add_parts
from halfweave.kernels.cuda.targets import ARCHITECTURES
from halfweave.kernels.paging import PAGE_POSITIONS
from ptx.emulator import Emulator
from support.emulated import Case, sparse_weight

ALL = bool(os.environ.get("HALFWEAVE_GPU_STATIC"))
TILE = {"BN": 64, "BM": 16, "BK": 128}
GEMM = dict.fromkeys("MNK", "i32")
HALVES = dict.fromkeys(("x", "bias", "y"), "*fp16")
GATE = {"up": "*fp32", "y": "*fp16", "size": "i32"}


def signature(types: dict[str, str], constants: dict[str, Any], *sizes: str) -> Signature:
    """Pointers are aligned, and so are the `sizes`."""
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    return Signature(types, constants, [*pointers, *sizes])


def expanded(group: int) -> Signature:
    values = "*u8" if group else "*fp16"
    types = {**HALVES, "values": values, "meta": "*u8", "scale": "*fp16", **GEMM}
    return signature(types, {**TILE, "group": group, "biased": True}, "N", "K")


def pages(coded: bool) -> dict[str, str]:
    stored = dict.fromkeys(("keys", "values"), "*i8" if coded else "*fp16")
    return {**stored, **dict.fromkeys(("key_scales", "value_scales"), "*fp32")}


def attending(coded: bool) -> Signature:
    types = {"q": "*fp16", **pages(coded), "tables": "*i32", "lengths": "*i32"}
    types |= {"partial": "*fp32", "sums": "*fp32", "factor": "fp32"}
    types |= dict.fromkeys(("kv_heads", "dim", "most_pages", "each"), "i32")
    known = {"G": 3, "D": 64, "B": 32, "page": PAGE_POSITIONS, "coded": coded}
    return signature(types, known, "dim", "each")


def remembering(coded: bool) -> Signature:
    types = {"qkv": "*fp16", "positions": "*i32", "tables": "*i32", "frequencies": "*fp32"}
    types |= {"q": "*fp16", **pages(coded)}
    types |= dict.fromkeys(("heads", "kv_heads", "half", "most_pages"), "i32")
    known = {"B": 32, "page": PAGE_POSITIONS, "coded": coded, "splits": 2}
    return signature(types, known, "half")


def expanding(group: int) -> Signature:
    types = dict.fromkeys(("values", "meta", "scales"), "*i32") | {"dense": "*i64"}
    types |= dict.fromkeys(("N", "K", "blocks"), "i32")
    return signature(types, {"group": group, "kind": tl.bfloat16, "both": False}, "N", "K")


KERNELS: dict[str, tuple[Any, Signature]] = {
    **{f"expand_gemm g{group}": (expand_gemm, expanded(group)) for group in (0, 64, 32)},
    "int4_gemm": (
        int4_gemm,
        signature(
            {**HALVES, "x": "*i32", "values": "*u8", "scale": "*fp16", **GEMM, "T": "i32"},
            {"BN": 64, "BM": 16, "group": 64, "kind": tl.float16, "biased": False},
            "N",
            "K",
        ),
    ),
    "add_parts": (
        add_parts,
        signature(
            {
                "parts": "*fp32",
                **dict.fromkeys(("bias", "residual", "y"), "*bf16"),
                **dict.fromkeys(("N", "size"), "i32"),
            },
            {"splits": 4, "B": 1024, "biased": True, "added": True},
            "N",
            "size",
        ),
    ),
    "rms_norm": (
        rms_norm,
        signature(
            {**dict.fromkeys(("x", "delta", "gain", "y"), "*fp16"), "size": "i32", "eps": "fp32"},
            {"B": 1024, "splits": 2},
            "size",
        ),
    ),
    "gate": (gate, signature(GATE, {"B": 1024, "splits": 4, "run": 0}, "size")),
    "gate, in turns": (gate, signature(GATE, {"B": 1024, "splits": 1, "run": 8}, "size")),
    **{f"expand_fragments g{group}": (expand_fragments, expanding(group)) for group in (0, 64)},
    "expand_int4": (
        expand_int4,
        signature(
            {"values": "*u8", "scale": "*fp16", "dense": "*i32", "K": "i32"},
            {"B": 1024, "group": 64, "kind": tl.bfloat16},
            "K",
        ),
    ),
    **{f"attend coded {coded}": (attend, attending(coded)) for coded in (False, True)},
    **{f"remember coded {c}": (rope_and_remember, remembering(c)) for c in (False, True)},
    "join": (
        join,
        signature(
            {
                **dict.fromkeys(("partial", "sums"), "*fp32"),
                **{"lengths": "*i32", "y": "*fp16"},
                **dict.fromkeys(("kv_heads", "dim", "splits", "each"), "i32"),
            },
            {"G": 3, "D": 64, "S": 64},
            "dim",
            "each",
        ),
    ),
}


@pytest.mark.parametrize("arch", ARCHITECTURES if ALL else [80])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_and_keep_to_their_registers(name: str, arch: int) -> None:
    kernel, known = KERNELS[name]
    made = compile_kernel(kernel, known, arch, 4)
    assert made.stack_bytes == 0
    assert made.shared_bytes <= ARCHITECTURES[arch].shared_per_program


@pytest.mark.parametrize("group", [0, 64])
def test_the_compiled_fallback_gives_what_the_oracle_gives(group: int) -> None:
    from halfweave.kernels.cuda.variants import TILES

    M, N, K = 13, 64, 256
    stored = sparse_weight(Case(TILES[0], M, N, K, group=group))
    made = compile_kernel(expand_gemm, expanded(group), 80, 4)
    emulator = Emulator(made.ptx, made.shared_bytes)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).half()
    bias = torch.randn(N, generator=torch.Generator().manual_seed(2)).half()
    put = emulator.memory.put
    y = put(np.zeros((M, N), np.float16))
    scale = stored.tensors().get("scale", torch.ones(1).half())
    tensors = (x, stored.values, stored.meta, scale, bias)
    addresses = [put(each.numpy()) for each in tensors]
    emulator.run((1, 1), [*addresses, y, M, N, K])
    wanted = (x.float() @ stored.unpack().T + bias.float()).numpy()
    found = emulator.memory.get(y).astype(np.float32)
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < 2e-3


def test_the_compiled_attention_gives_what_torch_gives() -> None:
    """Two sequences of 7 and 37 positions, in pages that stand in another order, in two parts."""
    lengths, heads, kv_heads, dim, most = [7, 37], 6, 2, 48, 4
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, dim, generator=generator).half()
    keys, values = (
        torch.randn(8, PAGE_POSITIONS, kv_heads, dim, generator=generator).half() for _ in range(2)
    )
    tables = torch.tensor([[5, 0, 3, 7], [2, 6, 1, 4]], dtype=torch.int32)
    made = compile_kernel(attend, attending(False), 80, 4)
    emulator = Emulator(made.ptx, made.shared_bytes)
    put = emulator.memory.put
    partial = put(np.zeros((2, kv_heads, 2, 16, 64), np.float32))
    sums = put(np.zeros((2, kv_heads, 2, 2, 16), np.float32))
    factor = int(np.float32(math.log2(math.e) / math.sqrt(dim)).view(np.uint32))
    known = [put(each.numpy()) for each in (q, keys, values)]
    none = put(np.zeros(4, np.float32))
    tail = [put(each) for each in (tables.numpy(), np.array(lengths, np.int32))]
    sizes = [factor, kv_heads, dim, most, 32]
    emulator.run((2, kv_heads, 2), [*known, none, none, *tail, partial, sums, *sizes])
    parts = torch.from_numpy(emulator.memory.get(partial))
    most_and_weights = torch.from_numpy(emulator.memory.get(sums))
    for sequence, length in enumerate(lengths):
        own = tables[sequence].long()
        k, v = (
            each[own].flatten(0, 1)[:length].float().repeat_interleave(heads // kv_heads, 1)
            for each in (keys, values)
        )
        weights = torch.einsum("hd,thd->ht", q[sequence].float(), k) / math.sqrt(dim)
        wanted = torch.einsum("ht,thd->hd", weights.softmax(-1), v)
        for head in range(heads):
            pair, row = head // 3, head % 3
            scores = most_and_weights[sequence, pair, :, 0, row]
            share = torch.exp2(scores - scores.max())
            mixed = (parts[sequence, pair, :, row, :dim] * share[:, None]).sum(0)
            total = (most_and_weights[sequence, pair, :, 1, row] * share).sum()
            torch.testing.assert_close(mixed / total, wanted[head], rtol=0, atol=4e-3)
