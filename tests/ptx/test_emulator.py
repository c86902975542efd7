"""The emulator does what PTX says: every instruction by itself, every check by a breach of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ptx.emulator import HANDLERS, Emulator
from ptx.numbers import Array, PTXError, bfloat_to_float, float_to_bfloat

_KERNEL = """
.version 8.4
.target sm_80
.visible .entry one(
    .param .u64 .ptr .global one_param_0, .param .u64 one_param_1,
    .param .u64 one_param_2, .param .u64 one_param_3
) .reqntid %d
{
    .reg .pred %%p<5>; .reg .b16 %%h<8>; .reg .b32 %%r<24>; .reg .b64 %%rd<12>;
    ld.param.b64 %%rd0, [one_param_0]; ld.param.b64 %%rd1, [one_param_1];
    ld.param.b64 %%rd2, [one_param_2]; ld.param.b64 %%rd3, [one_param_3];
    mov.u32 %%r0, %%tid.x;
    mul.wide.u32 %%rd4, %%r0, 4; // a lane's place
    add.s64 %%rd5, %%rd0, %%rd4; add.s64 %%rd6, %%rd1, %%rd4;
    add.s64 %%rd7, %%rd2, %%rd4; add.s64 %%rd8, %%rd3, %%rd4;
    ld.global.b32 %%r1, [%%rd5]; ld.global.b32 %%r2, [%%rd6]; ld.global.b32 %%r3, [%%rd7];
%s
    st.global.b32 [%%rd8], %%r9;
    ret;
}
"""
LANES = 32
_RANDOM = np.random.default_rng(0)
WORDS = [_RANDOM.integers(0, 2**32, LANES, dtype=np.uint32) for _ in range(3)]
SINGLES = [_RANDOM.standard_normal(LANES).astype(np.float32) for _ in range(3)]
HALVES = [_RANDOM.standard_normal(2 * LANES).astype(np.float16) for _ in range(3)]
BFLOATS = [float_to_bfloat(_RANDOM.standard_normal(2 * LANES).astype(np.float32)) for _ in range(3)]


def execute(body: str, inputs: list[Array], threads: int = LANES) -> Array:
    """What lanes leave in %r9, having the inputs in %r1, %r2 and %r3: uint32."""
    emulator = Emulator(_KERNEL % (threads, body))
    words = [np.ascontiguousarray(each).view(np.uint32) for each in inputs]
    arguments = [emulator.memory.put(each) for each in words]
    out = emulator.memory.put(np.zeros(threads, np.uint32))
    emulator.run((1,), [*arguments, out])
    return emulator.memory.get(out)


def signed(words: Array) -> Array:
    return words.view(np.int32)


def rotated(words: Array, by: int) -> Array:
    return np.roll(words, -by)


def pairs(halves: Array) -> Array:
    return halves.astype(np.float16).view(np.uint32)


def bfloat_pairs(values: Array) -> Array:
    return float_to_bfloat(values.astype(np.float32)).view(np.uint32)


A, B, C = WORDS
X, Y, Z = SINGLES
F, G, H = HALVES
P, Q, R = (bfloat_to_float(each).astype(np.float64) for each in BFLOATS)
SMALL = [each % 37 for each in WORDS]

INTEGERS: list[tuple[str, list[Array], Any]] = [
    ("add.s32 %r9, %r1, %r2;", WORDS, A + B),
    ("sub.s32 %r9, %r1, %r2;", WORDS, A - B),
    ("abs.s32 %r9, %r1;", WORDS, np.abs(signed(A))),
    ("neg.s32 %r9, %r1;", WORDS, -signed(A)),
    ("min.s32 %r9, %r1, %r2;", WORDS, np.minimum(signed(A), signed(B))),
    ("max.u32 %r9, %r1, %r2;", WORDS, np.maximum(A, B)),
    ("mul.lo.s32 %r9, %r1, %r2;", WORDS, A * B),
    ("mul.hi.u32 %r9, %r1, %r2;", WORDS, A.astype(np.uint64) * B >> np.uint64(32)),
    ("mad.lo.s32 %r9, %r1, %r2, %r3;", WORDS, A * B + C),
    (
        "mul.wide.s32 %rd9, %r1, %r2; mad.wide.s32 %rd9, %r2, %r3, %rd9;mov.b64 {%r8, %r9}, %rd9;",
        WORDS,
        (
            signed(A).astype(np.int64) * signed(B) + signed(B).astype(np.int64) * signed(C)
            >> np.int64(32)
        ),
    ),
    (
        "or.b32 %r4, %r2, 1; div.s32 %r9, %r1, %r4;",
        WORDS,
        np.trunc(signed(A).astype(np.float64) / signed(B | 1)),
    ),
    ("or.b32 %r4, %r2, 1; rem.s32 %r9, %r1, %r4;", WORDS, np.fmod(signed(A), signed(B | 1))),
    ("and.b32 %r9, %r1, %r2;", WORDS, A & B),
    ("or.b32 %r9, %r1, %r2;", WORDS, A | B),
    ("xor.b32 %r9, %r1, %r2;", WORDS, A ^ B),
    ("not.b32 %r9, %r1;", WORDS, ~A),
    ("lop3.b32 %r9, %r1, %r2, %r3, 0xea;", WORDS, (A & B) | C),
    ("lop3.b32 %r9, %r1, %r2, %r3, 0x96;", WORDS, A ^ B ^ C),
    ("shl.b32 %r9, %r1, 5;", WORDS, A << np.uint32(5)),
    ("shl.b32 %r9, %r1, %r2;", [A, SMALL[1], C], np.where(SMALL[1] < 32, A << SMALL[1] % 32, 0)),
    ("shr.u32 %r9, %r1, %r2;", [A, SMALL[1], C], np.where(SMALL[1] < 32, A >> SMALL[1] % 32, 0)),
    ("shr.s32 %r9, %r1, 40;", WORDS, signed(A) >> 31),
    ("shf.l.wrap.b32 %r9, %r1, %r2, 8;", WORDS, B << np.uint32(8) | A >> np.uint32(24)),
    ("shf.r.wrap.b32 %r9, %r1, %r2, 8;", WORDS, A >> np.uint32(8) | B << np.uint32(24)),
    ("bfe.u32 %r9, %r1, 4, 7;", WORDS, A >> np.uint32(4) & np.uint32(127)),
    ("bfe.s32 %r9, %r1, 20, 12;", WORDS, signed(A) >> 20),
    (
        "bfi.b32 %r9, %r1, %r2, 8, 16;",
        WORDS,
        B & np.uint32(0xFF0000FF) | (A & np.uint32(0xFFFF)) << np.uint32(8),
    ),
    ("prmt.b32 %r9, %r1, %r2, 0x5410;", WORDS, B << np.uint32(16) | A & np.uint32(0xFFFF)),
    ("prmt.b32 %r9, %r1, %r2, 0xBBBB;", WORDS, np.where(A >> np.uint32(31), 0xFFFFFFFF, 0)),
    (
        "setp.lt.s32 %p1, %r1, %r2; setp.gt.and.u32 %p2, %r1, %r2, %p1;"
        "not.pred %p3, %p2; selp.b32 %r9, %r1, %r3, %p3;",
        WORDS,
        np.where((signed(A) < signed(B)) & (A > B), C, A),
    ),
    (
        "setp.lo.u32 %p1, %r1, %r2; mov.pred %p2, %p1; xor.pred %p4, %p2, %p1;"
        "or.pred %p4, %p4, %p1; and.pred %p4, %p4, %p2; mov.b32 %r9, %r3; @%p4 mov.b32 %r9, %r1;",
        WORDS,
        np.where(A < B, A, C),
    ),
    (
        "mov.b32 {%h1, %h2}, %r1; mov.b32 %r9, {%h2, %h1};",
        WORDS,
        A >> np.uint32(16) | A << np.uint32(16),
    ),
    ("cvt.u16.u32 %h1, %r1; cvt.s32.s16 %r9, %h1;", WORDS, A.astype(np.int16)),
    ("cvt.u64.u32 %rd9, %r1; cvta.to.global.u64 %rd9, %rd9; cvt.u32.u64 %r9, %rd9;", WORDS, A),
    ("mov.b32 %r9, %laneid;", WORDS, np.arange(LANES)),
    ("createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0; mov.b32 %r9, %r1;", WORDS, A),
    (
        "fence.acq_rel.gpu; membar.gl; bar.sync 0; barrier.sync 0; bar.warp.sync -1;"
        "mov.b32 %r9, %r1;",
        WORDS,
        A,
    ),
    ("shfl.sync.bfly.b32 %r9, %r1, 5, 31, -1;", WORDS, A[np.arange(LANES) ^ 5]),
    ("shfl.sync.idx.b32 %r9, %r1, 3, 0x181f, -1;", WORDS, A[np.arange(LANES) // 8 * 8 + 3]),
    (
        "shfl.sync.up.b32 %r9|%p1, %r1, 2, 0, -1;",
        WORDS,
        A[np.maximum(np.arange(LANES) - 2, np.arange(LANES) % 2 * (np.arange(LANES) < 2))],
    ),
    ("shfl.sync.down.b32 %r9, %r1, 1, 31, -1;", WORDS, A[np.minimum(np.arange(LANES) + 1, 31)]),
]

FLOATS: list[tuple[str, list[Array], Array]] = [
    ("add.f32 %r9, %r1, %r2;", SINGLES, X + Y),
    ("sub.f32 %r9, %r1, %r2;", SINGLES, X - Y),
    ("mul.rn.f32 %r9, %r1, %r2;", SINGLES, X * Y),
    ("div.full.f32 %r9, %r1, %r2;", SINGLES, X / Y),
    ("fma.rn.f32 %r9, %r1, %r2, %r3;", SINGLES, (X.astype(np.float64) * Y + Z).astype(np.float32)),
    ("mad.rn.f32 %r9, %r1, %r2, %r3;", SINGLES, (X.astype(np.float64) * Y + Z).astype(np.float32)),
    ("max.f32 %r9, %r1, %r2;", SINGLES, np.maximum(X, Y)),
    ("min.f32 %r9, %r1, %r2;", SINGLES, np.minimum(X, Y)),
    ("abs.f32 %r4, %r1; sqrt.approx.f32 %r9, %r4;", SINGLES, np.sqrt(np.abs(X))),
    (
        "abs.f32 %r4, %r1; rsqrt.approx.f32 %r9, %r4;",
        SINGLES,
        1 / np.sqrt(np.abs(X).astype(np.float64)),
    ),
    ("abs.f32 %r4, %r1; lg2.approx.f32 %r9, %r4;", SINGLES, np.log2(np.abs(X).astype(np.float64))),
    ("ex2.approx.f32 %r9, %r1;", SINGLES, np.exp2(X.astype(np.float64))),
    ("rcp.approx.f32 %r9, %r1;", SINGLES, 1 / X.astype(np.float64)),
    ("neg.f32 %r9, %r1;", SINGLES, -X),
    ("cvt.rni.s32.f32 %r4, %r1; cvt.rn.f32.s32 %r9, %r4;", SINGLES, np.rint(X)),
    ("cvt.rzi.s32.f32 %r4, %r1; cvt.rn.f32.s32 %r9, %r4;", SINGLES, np.trunc(X)),
    ("cvt.rmi.s32.f32 %r4, %r1; cvt.rn.f32.s32 %r9, %r4;", SINGLES, np.floor(X)),
    ("cvt.rpi.s32.f32 %r4, %r1; cvt.rn.f32.s32 %r9, %r4;", SINGLES, np.ceil(X)),
    ("cvt.rn.f16.f32 %h1, %r1; cvt.f32.f16 %r9, %h1;", SINGLES, X.astype(np.float16)),
    (
        "cvt.rn.bf16.f32 %h1, %r1; cvt.f32.bf16 %r9, %h1;",
        SINGLES,
        bfloat_to_float(float_to_bfloat(X)),
    ),
    ("mov.b32 %r9, 0f3F800000;", SINGLES, np.ones(LANES)),
    ("setp.geu.f32 %p1, %r1, %r2; selp.f32 %r9, %r1, %r2, %p1;", SINGLES, np.maximum(X, Y)),
]

PACKED: list[tuple[str, list[Array], Array]] = [
    ("add.f16x2 %r9, %r1, %r2;", HALVES, pairs(F + G)),
    ("sub.f16x2 %r9, %r1, %r2;", HALVES, pairs(F - G)),
    ("mul.f16x2 %r9, %r1, %r2;", HALVES, pairs(F * G)),
    ("fma.rn.f16x2 %r9, %r1, %r2, %r3;", HALVES, pairs(F.astype(np.float64) * G + H)),
    ("max.f16x2 %r9, %r1, %r2;", HALVES, pairs(np.maximum(F, G))),
    ("fma.rn.bf16x2 %r9, %r1, %r2, %r3;", BFLOATS, bfloat_pairs(P * Q + R)),
    ("cvt.rn.f16x2.f32 %r9, %r2, %r1;", SINGLES, pairs(np.stack([X, Y], 1).reshape(-1))),
    ("cvt.rn.bf16x2.f32 %r9, %r2, %r1;", SINGLES, bfloat_pairs(np.stack([X, Y], 1).reshape(-1))),
    (
        "mov.b32 {%h1, %h2}, %r1; setp.lt.f16 %p1, %h1, %h2; selp.b16 %h3, %h1, %h2, %p1;"
        "mov.b32 %r9, {%h3, %h3};",
        HALVES,
        pairs(np.repeat(np.minimum(F[0::2], F[1::2]), 2)),
    ),
    (
        "mov.b32 {%h1, %h2}, %r1; setp.lt.bf16 %p1, %h1, %h2; selp.b16 %h3, %h1, %h2, %p1;"
        "mov.b32 %r9, {%h3, %h3};",
        BFLOATS,
        bfloat_pairs(np.repeat(np.minimum(P[0::2], P[1::2]), 2)),
    ),
]


@pytest.mark.parametrize(("body", "inputs", "expected"), INTEGERS, ids=[c[0] for c in INTEGERS])
def test_integer_instructions(body: str, inputs: list[Array], expected: Array) -> None:
    found = execute(body, inputs)
    assert np.array_equal(found, np.asarray(expected).astype(np.int64).astype(np.uint32))


@pytest.mark.parametrize(("body", "inputs", "expected"), FLOATS, ids=[c[0] for c in FLOATS])
def test_float_instructions(body: str, inputs: list[Array], expected: Array) -> None:
    assert np.array_equal(execute(body, inputs).view(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize(("body", "inputs", "expected"), PACKED, ids=[c[0] for c in PACKED])
def test_packed_instructions(body: str, inputs: list[Array], expected: Array) -> None:
    assert np.array_equal(execute(body, inputs), expected)


def test_not_a_number_compares_as_ptx_says() -> None:
    broken = X.copy()
    broken[::2] = np.nan
    for how, expected in (("lt", broken < 0), ("ltu", ~(broken >= 0)), ("ne", broken < broken)):
        other = "0f00000000" if how != "ne" else "%r1"
        body = f"setp.{how}.f32 %p1, %r1, {other}; selp.b32 %r9, 1, 0, %p1;"
        assert np.array_equal(execute(body, [broken, Y, Z]), expected.astype(np.uint32))
    for how in ("nan", "num"):
        body = f"setp.{how}.f32 %p1, %r1, %r1; selp.b32 %r9, 1, 0, %p1;"
        expected = np.isnan(broken) == (how == "nan")
        assert np.array_equal(execute(body, [broken, Y, Z]), expected.astype(np.uint32))


def test_shared_memory_and_vectors_move_what_they_say() -> None:
    body = """
    shl.b32 %r10, %r0, 2; st.shared.b32 [%r10], %r1; bar.sync 0;
    shr.u32 %r11, %r0, 2; shl.b32 %r11, %r11, 4;
    ld.shared.v4.b32 {%r12, %r13, %r14, %r15}, [%r11];
    add.s32 %r9, %r12, %r13; add.s32 %r9, %r9, %r14; add.s32 %r9, %r9, %r15;
    """
    expected = np.repeat(A.reshape(-1, 4).sum(1, dtype=np.uint32), 4)
    assert np.array_equal(execute(body, WORDS), expected)


@pytest.mark.parametrize("operation", ["add", "max", "min", "exch", "or"])
def test_atomics_take_one_thread_after_the_other(operation: str) -> None:
    kind = "b32" if operation in ("exch", "or") else "u32"
    body = f"atom.global.{operation}.{kind} %r9, [%rd0], %r2;"
    found, old = execute(body, WORDS), A[0]
    combine: dict[str, Callable[[Any, Any], Any]] = {
        "add": lambda x, y: x + y,
        "max": max,
        "min": min,
        "exch": lambda x, y: y,
        "or": lambda x, y: x | y,
    }
    for lane in range(LANES):
        assert found[lane] == old
        with np.errstate(over="ignore"):
            old = combine[operation](old, B[lane])
    reduced = execute(
        f"red.global.{operation}.{kind} [%rd0], %r2; bar.sync 0; ld.global.b32 %r9, [%rd0];", WORDS
    )
    assert (reduced == old).all()


def test_asynchronous_copies_land_when_they_are_waited_for() -> None:
    body = """
    shl.b32 %r10, %r0, 2;
    cp.async.ca.shared.global [%r10], [%rd5], 4; cp.async.commit_group;
    add.s32 %r11, %r10, 128; mov.b32 %r12, 0;
    cp.async.ca.shared.global [%r11], [%rd6], 4, %r12; cp.async.commit_group;
    cp.async.wait_group 1; bar.sync 0; ld.shared.b32 %r13, [%r10];
    cp.async.wait_all; bar.sync 0; ld.shared.b32 %r14, [%r11]; add.s32 %r9, %r13, %r14;
    """
    assert np.array_equal(execute(body, WORDS), A)  # the second one's bytes are zeros


def test_matrices_are_loaded_in_fragment_order_and_stored_back() -> None:
    body = """
    shl.b32 %r10, %r0, 2; st.shared.b32 [%r10], %r1; bar.sync 0;
    and.b32 %r11, %r0, 7; shl.b32 %r11, %r11, 4;
    ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {%r12}, [%r11]; bar.sync 0;
    stmatrix.sync.aligned.m8n8.x1{again}.shared.b16 [%r11], {%r12}; bar.sync 0;
    ld.shared.b32 %r13, [%r10]; mov.b32 %r9, {result};
    """

    def filled(trans: str, again: str, result: str) -> str:
        return body.replace("{trans}", trans).replace("{again}", again).replace("{result}", result)

    matrix = F.reshape(8, 8)
    plain = execute(filled("", "", "%r12"), HALVES)
    assert np.array_equal(plain, pairs(matrix.reshape(-1)))
    turned = execute(filled(".trans", "", "%r12"), HALVES)
    assert np.array_equal(turned, pairs(np.ascontiguousarray(matrix.T).reshape(-1)))
    for trans in ("", ".trans"):
        back = execute(filled(trans, trans, "%r13"), HALVES)
        assert np.array_equal(back, pairs(matrix.reshape(-1)))
    once = execute(filled("", ".trans", "%r13"), HALVES)
    assert np.array_equal(once, pairs(np.ascontiguousarray(matrix.T).reshape(-1)))


def product(kind: str, sparse: bool) -> str:
    """%r9 becomes sum 0 of A = {r1, r2, r1, r2}, B = {r3, r1} or {r3, r1, r2, r3}, C = 0."""
    a, zeros = "{%r1, %r2, %r1, %r2}", "{%r20, %r20, %r20, %r20}"
    outputs = "{%r9, %r10, %r11, %r12}"
    if not sparse:
        return (
            f"mov.b32 %r20, 0; mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            f"{outputs}, {a}, {{%r3, %r1}}, {zeros};"
        )
    return (
        "mov.b32 %r20, 0; mov.b32 %r21, 0x9C4E4E9C;"
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
        f"{outputs}, {a}, {{%r3, %r1, %r2, %r3}}, {zeros}, %r21, 1;"
    )


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("sparse", [False, True])
def test_matrix_products_are_those_of_the_tables_in_the_manual(kind: str, sparse: bool) -> None:
    """By plain loops over the manual's tables, element by element."""
    halves = HALVES if kind == "f16" else BFLOATS
    as_floats = [
        each.astype(np.float64) if kind == "f16" else bfloat_to_float(each).astype(np.float64)
        for each in halves
    ]
    one, two, three = (each.reshape(LANES, 2) for each in as_floats)
    registers_a, registers_b = [one, two, one, two], [three, one, two, three]
    depth = 32 if sparse else 16
    left, right = np.zeros((16, depth)), np.zeros((depth, 8))
    nibbles = [0x9C4E4E9C >> 4 * i & 15 for i in range(8)]
    for lane in range(LANES):
        g, t = divmod(lane, 4)
        for register in range(4):
            row = g + 8 * (register % 2)
            for at in range(2):
                column = 2 * t + at + 8 * (register // 2)  # among those that are stored
                if sparse:
                    # Sixteen bits of a row for every 16 columns; all lanes have this word.
                    four = column // 2
                    nibble = nibbles[four % 4 + 4 * (row // 8)]
                    column = 4 * four + (nibble & 3 if column % 2 == 0 else nibble >> 2)
                left[row, column] = registers_a[register][lane, at]
        for register in range(depth // 8):
            for at in range(2):
                right[8 * register + 2 * t + at, g] = registers_b[register][lane, at]
    expected = left @ right
    found = execute(product(kind, sparse), halves).view(np.float32)
    for lane in range(LANES):
        assert found[lane] == pytest.approx(expected[lane // 4, 2 * (lane % 4)], rel=1e-5, abs=1e-5)


BREACHES = [
    ("frob.b32 %r9, %r1;", "unknown instruction"),
    ("mov.b32 %r9, %r1; ld.global.b32 %r9, [%rd5+4096];", "out of bounds"),
    ("ld.global.b32 %r9, [%rd5+2];", "misaligned"),
    ("shl.b32 %r10, %r0, 2; ld.shared.b32 %r9, [%r10];", "never written"),
    ("mov.b32 %r10, 0x40000; ld.shared.b32 %r9, [%r10];", "out of bounds"),
    ("shl.b32 %r10, %r0, 2; st.shared.b32 [%r10+2], %r1;", "misaligned"),
    (
        "shl.b32 %r10, %r0, 2; cp.async.ca.shared.global [%r10], [%rd5], 4;"
        "cp.async.commit_group; bar.sync 0; ld.shared.b32 %r9, [%r10];",
        "in flight",
    ),
    (
        "shl.b32 %r10, %r0, 2; cp.async.ca.shared.global [%r10], [%rd5], 4;"
        "cp.async.ca.shared.global [%r10], [%rd5], 4;",
        "in flight",
    ),
    (
        "setp.lt.u32 %p1, %r0, 3; @%p1 bra $end; mov.b32 %r9, %r1; $end: mov.b32 %r9, %r2;",
        "parts the threads",
    ),
    ("setp.lt.u32 %p1, %r0, 3; @%p1 bar.sync 0;", "under a predicate"),
    ("setp.lt.u32 %p1, %r0, 3; @%p1 ret;", "under a predicate"),
    (
        "mov.b32 %r20, 0; mov.b32 %r21, 0;"
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32"
        " {%r9, %r10, %r11, %r12},"
        "{%r1, %r1, %r1, %r1}, {%r2, %r2, %r2, %r2}, {%r20, %r20, %r20, %r20}, %r21, 0;",
        "do not increase",
    ),
    ("cvt.s32.f32 %r9, %r1;", "how to round"),
]


@pytest.mark.parametrize(("body", "message"), BREACHES, ids=[c[1] + c[0][:20] for c in BREACHES])
def test_what_ptx_leaves_undefined_is_an_error(body: str, message: str) -> None:
    body = body.replace("$end:", "\n$end:\n")
    with pytest.raises(PTXError, match=message):
        execute(body, WORDS)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("st.shared.b32 [%r10], %r1;", "ld.shared.b32 %r9, [%r11];", "a read after a write"),
        ("st.shared.b32 [%r10], %r1;", "st.shared.b32 [%r11], %r1;", "a write after a write"),
        ("ld.shared.b32 %r9, [%r10];", "st.shared.b32 [%r11], %r1;", "a write after a read"),
    ],
)
@pytest.mark.parametrize("barrier", [False, True])
def test_warps_that_meet_without_a_barrier_are_seen(
    first: str, second: str, message: str, barrier: bool
) -> None:
    """The second warp goes to where the first one was."""
    start = "st.shared.b32 [%r10], %r1; bar.sync 0;" if first.startswith("ld") else ""
    body = f"""
    shl.b32 %r10, %r0, 2; xor.b32 %r11, %r10, 128;
    {start} {first} {"bar.sync 0;" if barrier else ""} {second}
    """
    inputs = [np.tile(each, 2) for each in WORDS]
    if barrier:
        execute(body, inputs, threads=64)
    else:
        with pytest.raises(PTXError, match=message):
            execute(body, inputs, threads=64)


def test_blocks_that_disagree_at_a_branch_each_go_their_way() -> None:
    body = """
    mov.u32 %r10, %ctaid.x; setp.eq.s32 %p1, %r10, 1;
    shl.b32 %r11, %r10, 2; mul.wide.u32 %rd9, %r10, 128; add.s64 %rd8, %rd8, %rd9;
    mov.b32 %r9, %r1;
    @%p1 bra $other;
    bra.uni $end;
$other:
    mov.b32 %r9, %r2;
$end:
    """
    emulator = Emulator(_KERNEL % (LANES, body))
    arguments = [emulator.memory.put(each) for each in WORDS]
    out = emulator.memory.put(np.zeros(3 * LANES, np.uint32))
    emulator.run((3,), [*arguments, out])
    assert np.array_equal(emulator.memory.get(out), np.concatenate([A, B, A]))


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536), (2**31,)])
def test_a_grid_that_no_card_launches_is_refused(grid: tuple[int, ...]) -> None:
    emulator = Emulator(_KERNEL % (LANES, "mov.b32 %r9, %r1;"))
    arguments = [emulator.memory.put(each) for each in WORDS]
    out = emulator.memory.put(np.zeros(LANES, np.uint32))
    with pytest.raises(PTXError, match="no card launches"):
        emulator.run(grid, [*arguments, out], only=[(0, 0, 0)])
    emulator.run((2**31 - 1, 65535, 65535), [*arguments, out], only=[(0, 0, 0)])
    assert np.array_equal(emulator.memory.get(out), A)


def test_costs_of_memory_are_counted() -> None:
    body = """
    shl.b32 %r10, %r0, 7; and.b32 %r10, %r10, 4095; st.shared.b32 [%r10], %r1;
    mul.wide.u32 %rd9, %r0, 4; mov.b32 %r9, %r1;
    """
    emulator = Emulator(_KERNEL % (LANES, body))
    arguments = [emulator.memory.put(each) for each in WORDS]
    emulator.run((1,), [*arguments, emulator.memory.put(A)], counting=True)
    requests, turns, least = emulator.traffic["st.shared"]
    assert (requests, turns, least) == (1, 32, 1)  # all lanes want the same bank
    assert emulator.traffic["ld.global"] == (3, 12, 12)
    assert emulator.counts["shl"] == 1


def test_every_handler_is_exercised_here() -> None:
    """An instruction without a case of its own would be a guess."""
    from pathlib import Path

    text = Path(__file__).read_text()
    missing = [name for name in HANDLERS if f"{name}." not in text and name not in ("ret", "exit")]
    assert not missing
