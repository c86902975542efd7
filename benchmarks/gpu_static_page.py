"""The page of docs/results/gpu.md, from its JSON twin.

python benchmarks/gpu_static_page.py [RESULTS_DIR]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
Figures = dict[str, Any]

PAGE = """# GPU kernels, without a GPU

**Nothing on this page was timed**; for that see [gpu_measured.md](gpu_measured.md), of one card.
What follows was compiled by Triton {triton} on a machine without a GPU, counted in the machine
code, and computed from data sheets, {date}.

- Command: `python benchmarks/gpu_static.py`.
- Emulated: the program that Triton made for sm_80, executed instruction by instruction on a CPU
  (`tests/ptx`), against the torch oracle. The error is the greatest one over the greatest result;
  rounding results to 16 bits alone costs up to 5e-4 (fp16) and 4e-3 (bf16).
- mma.sp and instructions are those of one warp in one step of K, in the main loop. "Fit" is how
  many programs share a multiprocessor, by registers, shared memory and warps.
- "Split" writes fp32 parts of a K that is divided among programs; "ragged" is for a K that is no
  multiple of 128 and, where K is not divided, adds a bias and a residual; "gated" one is that of a
  gate and what it lets through, with a bias and the product of both.
- Roofs are the least time that memory bandwidth and tensor cores allow. Real kernels stay below
  them: launches, latency, caches, clocks and power are not in them.
- Mutants: {planted} faults were planted in the compiled program (a relaxed wait, a wrong selector,
  a wrong mask, ...), {caught} were seen by the tests; dropped barriers have a test of their own.

## Variants

{built} variants were compiled for sm_80, 86, 89 and 90: {spilling} spill registers, {wide}
registers at most, mma.sp in all. Below those of sm_80; the others differ by a few registers.

{variants}

## Roofs of decoding

One sequence, all linears alike, the head in 16 bits, keys and values left out.

{decoding}

## Roofs of single products

Four linears of a block of Llama-3-8B together: time of a dense 16-bit weight at its own roof over
ours, so what the formats allow at most.

{products}

What others measured on such cards, as they published it: Marlin (dense int4, g128) about 3.9x of
fp16 up to 16 to 32 tokens on an A10, and Sparse-Marlin (2:4+int4) about 5.3x on an RTX 3090
(Frantar et al., 2408.11743); torchao, Llama-3-8B on an A100-80GB, tokens a second: bf16 95.6, int4
g64 180.8, with 2:4 and Sparse-Marlin's kernel 226.0 (its README of 2024). torch's own
`to_sparse_semi_structured` is made for long batches: cuSPARSELt took 0.196 ms for one token and
4096 x 4096, where the dense product took 0.022 (pytorch issue 111339).
"""
_HEADER = (
    "tile",
    "warps",
    "weights",
    "registers",
    "shared, KiB",
    "mma.sp",
    "instructions",
    "fit",
    "emulated error",
)


def write_page(results: Path) -> None:
    """Write gpu.md beside gpu.json."""
    document = json.loads((results / "gpu.json").read_text())
    variants = document["variants"]
    text = PAGE.format(
        triton=document["triton"],
        date=document["date"],
        planted=document["mutants"]["planted"],
        caught=document["mutants"]["caught"],
        built=len(variants),
        spilling=sum(1 for each in variants if each["spills"]),
        wide=max(each["registers"] for each in variants),
        variants=_variants(variants),
        decoding=_decoding(document["decoding"]),
        products=_products(document["products"]),
    )
    (results / "gpu.md").write_text(text)


def _variants(variants: Sequence[Figures]) -> str:
    rows = []
    for each in (v for v in variants if v["arch"] == 80):
        stored = f"int4 g{each['group']}, " if each["group"] else ""
        pattern = "" if each["format"] == "int4" else "2:4 "
        rows.append(
            (
                "x".join(map(str, each["tile"]))
                + (" split" if each["split"] else "")
                + ("" if each["whole_k"] else " ragged")
                + (" gated" if each["gated"] else ""),
                each["warps"],
                f"{pattern}{stored}{each['dtype']}",
                each["registers"],
                f"{each['smem_bytes'] / 1024:.0f}",
                f"{each['hmma_sp_per_tile']:g}",
                f"{each['instructions_per_tile']:.0f}",
                each["resident_programs"],
                f"{each['max_rel_err']:.1e}",
            )
        )
    return _table(_HEADER, rows)


def _decoding(roofs: Sequence[Figures]) -> str:
    rows = [
        (
            each["model"],
            each["card"],
            f"2:4 int4 g{each['group']}" if each["group"] else "2:4",
            f"{each['roof_tokens_per_s']:.0f}",
            f"{each['dense_roof_tokens_per_s']:.0f}",
        )
        for each in roofs
    ]
    return _table(("model", "card", "weights", "roof, tokens/s", "dense 16 bits, tokens/s"), rows)


def _products(products: Sequence[Figures]) -> str:
    own = [each for each in products if each["model"] == "Llama-3-8B"]
    tokens = sorted({each["M"] for each in own})
    rows = []
    for card in dict.fromkeys(each["card"] for each in own):
        for group in sorted({each["group"] for each in own}):
            cells = []
            for count in tokens:
                chosen = [e for e in own if (e["card"], e["group"], e["M"]) == (card, group, count)]
                dense = sum(each["dense_roof_us"] for each in chosen)
                cells.append(f"{dense / sum(each['roof_us'] for each in chosen):.2f}x")
            rows.append((card, f"2:4 int4 g{group}" if group else "2:4", *cells))
    return _table(("card", "weights", *(f"M = {count}" for count in tokens)), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    write_page(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
