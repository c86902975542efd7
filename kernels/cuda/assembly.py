"""The PTX that Gluon has no words for: the sparse product, and 4-bit codes to halves.

Operands are numbered $0 and on, outputs first. Each text works on the four registers that a lane
holds of a fragment (fragments.py).
"""

# No `from __future__ import annotations`: kernels call these functions while they are compiled.
from triton.experimental import gluon

# Four outputs D; four registers of A, four of B, four copies of the metadata, four of C.
MMA_OPERANDS = "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f"
# Four registers of A; four copies of a word of codes, four of a word of scales.
DEQUANT_OPERANDS = "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r"


@gluon.constexpr_function
def mma_text(kind: str, selector: int) -> str:
    """D = A B + C; `kind` is f16 or bf16, `selector` the pair of lanes whose metadata counts."""
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$16,$17,$18,$19}, $12, "
        f"{selector};"
    )


@gluon.constexpr_function
def dequant_text(kind: str, scaled: bool) -> str:
    """Registers of A from eight codes ($4) and, if `scaled`, the scales of two rows ($8, fp16).

    A code + 8 in the lowest bits of a half whose exponent makes them its last ones is the number
    1024 + code + 8, exactly; for codes four bits up it is 1024 + 16 (code + 8), and a multiply-add
    brings it down. In bf16, where seven bits follow the exponent, the number is 128 + code + 8.
    """
    lines = ["{ .reg .b32 dq_t, dq_k1, dq_k2, dq_k3, dq_s0, dq_s1;"]
    lines += _halves() if kind == "f16" else _bfloats()
    if scaled:
        lines += _half_scales() if kind == "f16" else _bfloat_scales()
    return " ".join([*lines, "}"])


@gluon.constexpr_function
def _halves() -> list[str]:
    lines = [
        "mov.b32 dq_k1, 0x64086408;",  # 1024 + 8, twice
        "mov.b32 dq_k2, 0x2c002c00;",  # 1/16
        "mov.b32 dq_k3, 0xd480d480;",  # -(1024/16 + 8)
        "shr.u32 dq_t, $4, 8;",
    ]
    for register, source, mask in (
        ("$0", "$4", "0x000f000f"),
        ("$1", "$4", "0x00f000f0"),
        ("$2", "dq_t", "0x000f000f"),
        ("$3", "dq_t", "0x00f000f0"),
    ):
        lines.append(f"lop3.b32 {register}, {source}, {mask}, 0x64006400, 0xea;")
    for register in ("$0", "$2"):
        lines.append(f"sub.f16x2 {register}, {register}, dq_k1;")
    for register in ("$1", "$3"):
        lines.append(f"fma.rn.f16x2 {register}, {register}, dq_k2, dq_k3;")
    return lines


@gluon.constexpr_function
def _bfloats() -> list[str]:
    lines = ["mov.b32 dq_k1, 0x3f803f80;", "mov.b32 dq_k2, 0xc308c308;"]  # 1 and -(128 + 8)
    for register in range(4):
        source = "$4"
        if register:
            lines.append(f"shr.u32 dq_t, $4, {4 * register};")
            source = "dq_t"
        lines.append(f"lop3.b32 ${register}, {source}, 0x000f000f, 0x43004300, 0xea;")
        lines.append(f"fma.rn.bf16x2 ${register}, ${register}, dq_k1, dq_k2;")
    return lines


@gluon.constexpr_function
def _half_scales() -> list[str]:
    """Registers 0 and 2 are of row g, 1 and 3 of row g + 8."""
    lines = ["prmt.b32 dq_s0, $8, $8, 0x1010;", "prmt.b32 dq_s1, $8, $8, 0x3232;"]
    return lines + [f"mul.f16x2 ${n}, ${n}, dq_s{n % 2};" for n in range(4)]


@gluon.constexpr_function
def _bfloat_scales() -> list[str]:
    """The same; scales stay fp16 in memory and are rounded here."""
    lines = [
        "{ .reg .b16 dq_h0, dq_h1; .reg .f32 dq_f0, dq_f1;",
        "mov.b32 {dq_h0, dq_h1}, $8;",
        "cvt.f32.f16 dq_f0, dq_h0; cvt.f32.f16 dq_f1, dq_h1;",
        "cvt.rn.bf16x2.f32 dq_s0, dq_f0, dq_f0; cvt.rn.bf16x2.f32 dq_s1, dq_f1, dq_f1; }",
        "mov.b32 dq_k3, 0x80008000;",  # -0: there is no product without a sum
    ]
    return lines + [f"fma.rn.bf16x2 ${n}, ${n}, dq_s{n % 2}, dq_k3;" for n in range(4)]
