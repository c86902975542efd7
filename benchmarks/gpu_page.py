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

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
Figures = dict[str, Any]

PAGE = """# GPU kernels, on a GPU

Measured on one {card} ({date}); torch {torch}, triton {triton}. {dtype}, groups of {group}. No
other card has run them. What was compiled and emulated for others is in [gpu.md](gpu.md).

- `make gpu` runs the tests, compute-sanitizer and both benchmarks. The tests passed on this card,
  and the sanitizer found nothing.
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

The same perplexity: SmolLM2-135M-Instruct in 2:4+int4, distilled for 60 minutes, has 35.362 on
this card in bf16 and 35.35 on a CPU, over the same 27621 tokens.

## Single products

Microseconds of one product, weights not in the cache, M tokens. `{kernel_command}`.

{kernels}

What it took of the card's 4.8 TB/s (data sheet) to read the weight, one token:

{bandwidth}

## Where it loses

- From about 128 tokens at once a dense product is faster: sparse tensor cores are reached through
  instructions of one warp, and Hopper's faster ones (wgmma) are not used. Prompts are therefore
  multiplied by a dense matrix, written out for the moment: {prompt} of dense speed.
- 128 sequences at once: {crowd} of dense speed for 2:4+int4, whose codes have to become floats
  again for every 64 tokens.
- Small models: a product of 960 x 576 takes 4 to 5 microseconds in any format, most of it to start.
- Beside dense 4 bits, 2:4+int4 gains {beside} at one sequence, of the 1.31 that its bytes allow.
"""

NAMES = {"dense": "dense", "sparse24": "2:4", "int4": "int4", "sparse24_int4": "2:4 + int4"}
_CARD_BYTES_PER_US = 4.8e6


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
        bandwidth=_bandwidth(kernels["rows"], kernels["group"]),
        prompt=_speed(rows, "prompt", 512, "sparse24_int4"),
        crowd=_speed(rows, "decode", 128, "sparse24_int4"),
        beside=f"{_ms(rows, 'int4') / _ms(rows, 'sparse24_int4'):.2f}",
    )
    (results / "gpu_measured.md").write_text(text)


def _decoding(rows: Sequence[Figures]) -> str:
    cells = []
    for row in rows:
        spread = f"({row['least_ms']:.2f}..{row['greatest_ms']:.2f})"
        what = f"{row['tokens']} sequences" if row["what"] == "decode" else "prompt of 512"
        cells.append(
            (
                what.replace("1 sequences", "1 sequence"),
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


def _bandwidth(rows: Sequence[Figures], group: int) -> str:
    bits = {"dense": 16.0, "sparse24": bits_per_weight(0), "int4": 4 + 16 / group}
    bits["sparse24_int4"] = bits_per_weight(group)
    cells = []
    for N, K in dict.fromkeys((row["N"], row["K"]) for row in rows):
        here = {r["format"]: r for r in rows if (r["N"], r["K"], r["M"]) == (N, K, 1)}
        shares = [N * K * bits[f] / 8 / here[f]["us"] / _CARD_BYTES_PER_US for f in bits]
        cells.append((f"{N} x {K}", *(f"{100 * share:.0f} %" for share in shares)))
    return _table(("N x K", *(NAMES[name] for name in bits)), cells)


def _speed(rows: Sequence[Figures], what: str, tokens: int, name: str) -> str:
    found = [r for r in rows if (r["what"], r["tokens"], r["format"]) == (what, tokens, name)]
    return f"{found[0]['to_dense']:.2f}"


def _ms(rows: Sequence[Figures], name: str) -> float:
    """Of a step of one sequence."""
    found = [r for r in rows if (r["what"], r["tokens"], r["format"]) == ("decode", 1, name)]
    return float(found[0]["ms"])


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    write_page(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
