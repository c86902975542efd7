"""The page of docs/results/gpu_measured.md, from gpu_measured.json and gpu_decode.json.

python benchmarks/gpu_page.py [RESULTS_DIR]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfweave.kernels.cuda.roofs import bits_per_weight
from halfweave.kernels.cuda.targets import CARDS

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
Figures = dict[str, Any]

PAGE = """# GPU kernels, on a GPU

Measured on one {card} ({date}); torch {torch}, triton {triton}. {dtype}, groups of {group}. What
was compiled and emulated for others is in [gpu.md](gpu.md), what follows from this in
[../gpu.md](../gpu.md).

- `make gpu` runs the tests first, and writes this page only if they pass.
- Clocks and power were left as they were found. Figures are medians of {rounds} rounds, in which
  each format takes its turn, with (least..greatest). A ratio divides medians; over 1 is faster.
- Dense is torch's product by a 16-bit weight (cuBLAS); "torch 2:4" is torch's own
  `to_sparse_semi_structured`. int4 is a dense weight of 4 bits, which our kernel multiplies as two
  2:4 ones.

## Whole decoders

The sizes of Llama-3-8B with random weights, the head in 16 bits: as fast as real ones, and they
say nothing of quality, for which see [quality.md](quality.md). A step is all that the engine does
for one new token of every sequence, {context} positions long: the batch to the device, the
recorded step, the likeliest tokens back. `{decode_command}`.

{decoding}

Weights on the device: {bytes}.

## Single products

Microseconds of one product, weights not in the cache, M tokens. `{kernel_command}`.

{kernels}

{bandwidth}

## Where it loses

Slower than dense in 16 bits, among whole decoders: {losing}.
Single products that lose are in the table above.

Beside dense 4 bits, 2:4+int4 gains {beside}x at one sequence; by the bytes of its linears alone it
would be {allowed}x.
"""

NAMES = {"dense": "dense", "sparse24": "2:4", "int4": "int4", "sparse24_int4": "2:4 + int4"}


def write_page(results: Path) -> None:
    """Write gpu_measured.md beside its twins."""
    kernels = json.loads((results / "gpu_measured.json").read_text())
    decode = json.loads((results / "gpu_decode.json").read_text())
    rows = decode["rows"]
    text = PAGE.format(
        card=kernels["card"],
        date=kernels["date"],
        **kernels["versions"],
        dtype=kernels["dtype"],
        group=kernels["group"],
        rounds="5 to 7",
        context=max(row["context"] for row in rows),
        decode_command=decode["command"],
        decoding=_decoding(rows),
        bytes=", ".join(
            f"{NAMES[name]} {size / 2**30:.1f} GiB" for name, size in decode["weight_bytes"].items()
        ),
        kernel_command=kernels["command"],
        kernels=_kernels(kernels["rows"]),
        bandwidth=_bandwidth(kernels),
        losing=_losing(rows),
        beside=f"{_ms(rows, 'int4') / _ms(rows, 'sparse24_int4'):.2f}",
        allowed=f"{_bits(kernels['group'])['int4'] / bits_per_weight(kernels['group']):.2f}",
    )
    (results / "gpu_measured.md").write_text(text)


def _decoding(rows: Sequence[Figures]) -> str:
    cells = []
    for row in rows:
        spread = f"({row['least_ms']:.2f}..{row['greatest_ms']:.2f})"
        cells.append(
            (
                _what(row),
                NAMES[row["format"]],
                f"{row['ms']:.2f} {spread}",
                f"{row['tokens_per_s']:.0f}",
                f"{row['to_dense']:.2f}",
            )
        )
    return _table(("step of", "weights", "ms", "tokens/s", "to dense"), cells)


def _kernels(rows: Sequence[Figures]) -> str:
    formats = list(dict.fromkeys(row["format"] for row in rows))
    places = dict.fromkeys((row["N"], row["K"], row["M"]) for row in rows)
    cells = []
    for place in places:
        here = {row["format"]: row for row in rows if (row["N"], row["K"], row["M"]) == place}
        own = [f"{here['dense']['us']:.1f}"]
        own += [f"{here[f]['us']:.1f} ({here[f]['to_dense']:.2f}x)" for f in formats[1:]]
        cells.append((f"{place[0]} x {place[1]}", place[2], *own))
    names = [NAMES.get(name, "torch 2:4") for name in formats]
    return _table(("N x K", "M", *names), cells)


def _bits(group: int) -> dict[str, float]:
    """That are read for a weight, by format."""
    return {
        "dense": 16.0,
        "sparse24": bits_per_weight(0),
        "int4": 4 + 16 / group,
        "sparse24_int4": bits_per_weight(group),
    }


def _bandwidth(document: Figures) -> str:
    """What reading the weight took of the card's bandwidth; nothing of a card that is not known."""
    known = [card for name, card in CARDS.items() if name in document["card"]]
    if not known:
        return ""
    bits, rows, cells = _bits(document["group"]), document["rows"], []
    for N, K in dict.fromkeys((row["N"], row["K"]) for row in rows):
        here = {r["format"]: r for r in rows if (r["N"], r["K"], r["M"]) == (N, K, 1)}
        shares = [N * K * bits[f] / 8e3 / here[f]["us"] / known[0].gb_per_s for f in bits]
        cells.append((f"{N} x {K}", *(f"{100 * share:.0f} %" for share in shares)))
    table = _table(("N x K", *(NAMES[name] for name in bits)), cells)
    told = f"the card's {known[0].gb_per_s:g} GB/s (data sheet) to read the weight, one token"
    return f"What it took of {told}:\n\n{table}"


def _losing(rows: Sequence[Figures]) -> str:
    found = [
        f"{NAMES[r['format']]}, {_what(r)} ({r['to_dense']:.2f}x)"
        for r in rows
        if r["to_dense"] < 1
    ]
    return "; ".join(found) or "none"


def _what(row: Figures) -> str:
    if row["what"] == "prompt":
        return f"prompt of {row['tokens']}"
    return f"{row['tokens']} sequence{'s' if row['tokens'] > 1 else ''}"


def _ms(rows: Sequence[Figures], name: str) -> float:
    """Of a step of one sequence."""
    found = [r for r in rows if (r["what"], r["tokens"], r["format"]) == ("decode", 1, name)]
    return float(found[0]["ms"])


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    write_page(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
