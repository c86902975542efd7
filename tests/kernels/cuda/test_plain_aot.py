"""The plain Triton kernels compiled for GPUs that are not there, and some of them emulated."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from halfweave.kernels.cuda.aot import Compiled, Signature, compile_kernel
from halfweave.kernels.cuda.dense import _PAIRS
from halfweave.kernels.cuda.elementwise import gate, rms_norm, rope_and_remember
from halfweave.kernels.cuda.expand import expand_fragments, expand_int4
from halfweave.kernels.cuda.expand_gemm import expand_gemm
from halfweave.kernels.cuda.int4_gemm import int4_gemm
from halfweave.kernels.cuda.paged_attention import attend, join
from halfweave.kernels.cuda.plain_linear import _EXPANDED, _ROWS
from halfweave.kernels.cuda.reduce import add_parts
from halfweave.kernels.cuda.steps import _GATED, _MOST_SPLITS, _RESULTS, _TOGETHER, _warps
from halfweave.kernels.cuda.targets import ARCHITECTURES
from halfweave.kernels.paging import PAGE_POSITIONS
from ptx.emulator import Emulator
from support.emulated import Case, sparse_weight

ALL = bool(os.environ.get("HALFWEAVE_GPU_STATIC"))
GEMM = dict.fromkeys("MNK", "i32")
HALVES = dict.fromkeys(("x", "bias", "y"), "*fp16")
GATE = {"up": "*fp32", "y": "*fp16", "size": "i32"}


@dataclass(frozen=True)
class Launched:
    """A kernel as it is launched; `stages` None: as Triton has it."""

    kernel: Any
    signature: Signature
    warps: int = 4
    stages: int | None = None

    def compiled(self, arch: int) -> Compiled:
        return compile_kernel(self.kernel, self.signature, arch, self.warps, stages=self.stages)


def signature(types: dict[str, str], constants: dict[str, Any], *sizes: str) -> Signature:
    """Pointers are aligned, and so are the `sizes`."""
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    return Signature(types, constants, [*pointers, *sizes])


def expanded(group: int) -> Signature:
    values = "*u8" if group else "*fp16"
    types = {**HALVES, "values": values, "meta": "*u8", "scale": "*fp16", **GEMM}
    return signature(types, {**_EXPANDED, "group": group, "biased": True}, "N", "K")


def multiplied(tokens: int, group: int, splits: bool) -> Launched:
    """By dense codes."""
    types = {**HALVES, "x": "*i32", "values": "*u8", "scale": "*fp16", **GEMM, "T": "i32"}
    types["y"] = "*fp32" if splits else "*fp16"
    known = {"BN": _ROWS, "BM": tokens, "group": group, "kind": tl.float16, "biased": not splits}
    return Launched(int4_gemm, signature(types, known, "N", "K"), stages=4)


def pages(coded: bool) -> dict[str, str]:
    stored = dict.fromkeys(("keys", "values"), "*i8" if coded else "*fp16")
    return {**stored, **dict.fromkeys(("key_scales", "value_scales"), "*fp32")}


def attending(coded: bool, dim: int, shared: int = 3) -> Signature:
    types = {"q": "*fp16", **pages(coded), "tables": "*i32", "lengths": "*i32"}
    types |= {"partial": "*fp32", "sums": "*fp32", "factor": "fp32"}
    types |= dict.fromkeys(("kv_heads", "dim", "most_pages", "each"), "i32")
    known = {"G": shared, "D": dim, "B": _TOGETHER, "page": PAGE_POSITIONS, "coded": coded}
    return signature(types, known, "dim", "each")


def remembering(coded: bool, dim: int) -> Signature:
    types = {"qkv": "*fp16", "positions": "*i32", "tables": "*i32", "frequencies": "*fp32"}
    types |= {"q": "*fp16", **pages(coded)}
    types |= dict.fromkeys(("heads", "kv_heads", "half", "most_pages"), "i32")
    known = {"B": dim // 2, "page": PAGE_POSITIONS, "coded": coded, "splits": 2}
    return signature(types, known, "half")


def joining(dim: int) -> Signature:
    types = dict.fromkeys(("partial", "sums"), "*fp32") | {"lengths": "*i32", "y": "*fp16"}
    types |= dict.fromkeys(("kv_heads", "dim", "splits", "each"), "i32")
    return signature(types, {"G": 3, "D": dim, "S": _MOST_SPLITS}, "dim", "each")


def norming(width: int, splits: int) -> Launched:
    types = dict.fromkeys(("x", "delta", "gain", "y"), "*fp16") | {"size": "i32", "eps": "fp32"}
    known = signature(types, {"B": width, "splits": splits}, "size")
    return Launched(rms_norm, known, min(16, max(1, width // 256)))


def gating(splits: int, run: int) -> Launched:
    known = {"B": _GATED, "splits": splits, "run": run}
    return Launched(gate, signature(GATE, known, "size"))


def expanding(group: int) -> Signature:
    types = dict.fromkeys(("values", "meta", "scales"), "*i32") | {"dense": "*i64"}
    types |= dict.fromkeys(("N", "K", "blocks"), "i32")
    return signature(types, {"group": group, "kind": tl.bfloat16, "both": False}, "N", "K")


ADDED = signature(
    {
        "parts": "*fp32",
        **dict.fromkeys(("bias", "residual", "y"), "*bf16"),
        **dict.fromkeys(("N", "size"), "i32"),
    },
    {"splits": 4, "B": _RESULTS, "biased": True, "added": True},
    "N",
    "size",
)
WRITTEN_OUT = signature(
    {"values": "*u8", "scale": "*fp16", "dense": "*i32", "K": "i32"},
    {"B": _PAIRS, "group": 64, "kind": tl.bfloat16},
    "K",
)
DIMS = (64, 128, 256)
KERNELS: dict[str, Launched] = {
    **{f"expand_gemm g{g}": Launched(expand_gemm, expanded(g)) for g in (0, 64, 32)},
    **{
        f"int4_gemm {tokens} tokens g{group}": multiplied(tokens, group, splits)
        for tokens, group, splits in (
            (16, 32, True),
            (16, 64, True),
            (16, 128, True),
            (32, 64, False),
            (32, 128, True),
        )
    },
    "add_parts": Launched(add_parts, ADDED),
    **{f"rms_norm {width}": norming(width, splits) for width, splits in ((1024, 2), (4096, 1))},
    "gate": gating(4, 0),
    "gate, in turns": gating(1, 8),
    **{f"expand_fragments g{g}": Launched(expand_fragments, expanding(g)) for g in (0, 64)},
    "expand_int4": Launched(expand_int4, WRITTEN_OUT),
    **{
        f"attend {dim} coded {coded}": Launched(attend, attending(coded, dim), _warps(dim, coded))
        for dim in DIMS
        for coded in (False, True)
    },
    **{
        f"remember {dim} coded {coded}": Launched(rope_and_remember, remembering(coded, dim), 1)
        for dim in DIMS
        for coded in (False, True)
    },
    **{f"join {dim}": Launched(join, joining(dim), _warps(dim, True)) for dim in DIMS},
}


EVERY = [(name, arch) for name in KERNELS for arch in ARCHITECTURES]
# Of the least shared memory; and those that spilled elsewhere, once, with four warps.
SOME = [(name, 86) for name in KERNELS] + [("attend 256 coded True", 90), ("join 256", 80)]


@pytest.mark.parametrize(("name", "arch"), EVERY if ALL else SOME)
def test_kernels_compile_and_keep_to_their_registers(name: str, arch: int) -> None:
    made = KERNELS[name].compiled(arch)
    assert made.stack_bytes == 0
    assert made.shared_bytes <= ARCHITECTURES[arch].shared_per_program


@pytest.mark.parametrize("group", [0, 64])
def test_the_compiled_fallback_gives_what_the_oracle_gives(group: int) -> None:
    from halfweave.kernels.cuda.variants import TILES

    M, N, K = 13, 64, 256
    stored = sparse_weight(Case(TILES[0], M, N, K, group=group))
    made = Launched(expand_gemm, expanded(group)).compiled(80)
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
    """Two sequences of 7 and 100 positions, in pages that stand in another order, in two parts."""
    lengths, heads, kv_heads, dim, most = [7, 100], 6, 2, 48, 8
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, dim, generator=generator).half()
    keys, values = (
        torch.randn(2 * most, PAGE_POSITIONS, kv_heads, dim, generator=generator).half()
        for _ in range(2)
    )
    tables = torch.randperm(2 * most, generator=generator).int().view(2, most)
    made = Launched(attend, attending(False, 64)).compiled(86)
    emulator = Emulator(made.ptx, made.shared_bytes)
    put = emulator.memory.put
    partial = put(np.zeros((2, kv_heads, 2, 16, 64), np.float32))
    sums = put(np.zeros((2, kv_heads, 2, 2, 16), np.float32))
    factor = int(np.float32(math.log2(math.e) / math.sqrt(dim)).view(np.uint32))
    known = [put(each.numpy()) for each in (q, keys, values)]
    none = put(np.zeros(4, np.float32))
    tail = [put(each) for each in (tables.numpy(), np.array(lengths, np.int32))]
    sizes = [factor, kv_heads, dim, most, _TOGETHER]
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
