"""The page of docs/results/cpu.md, from its JSON twin.

python benchmarks/peers/page.py RESULTS_DIR
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
QUALITY = Path(__file__).resolve().parents[2] / "docs" / "results" / "quality.md"
BASELINE = ("llama.cpp", "Q4_0")
TASKS = {
    ("prefill", 0, 1): "prompt of 512",
    ("decode", 0, 1): "decode, depth 0",
    ("decode", 512, 1): "decode, depth 512",
    ("decode", 0, 16): "decode, batch 16",
}

PAGE = """# Speed on the CPU, beside other engines

SmolLM2-135M-Instruct in every engine's format, {hardware}, kernels at level `{level}`, {date}.

- Command: `make bench-peers`; {versions}.
- Tokens a second, median of {rounds} rounds (least-greatest). All engines stay loaded and are
  measured in turns, task by task, so that they share the machine's busy moments. A virtual machine
  with neighbours: trust ratios before absolutes.
- halfweave's models are pruned or rounded by magnitude: **their text is worthless, and speed does
  not depend on the values**. What quality costs is in [quality.md]({quality}). The peers run the
  dense model.
- Heads: 8 bits in our 4-bit models, but for the line that says 4, and in llama.cpp's; bf16 in our
  bf16 ones.
- llama.cpp is that of the package llama-cpp-python of the version told, built from source for this
  processor: 4096 positions in one cache for 16 sequences, batches of 512, flash attention if it
  decodes faster with it behind 512 tokens, all else as by default, called through its C API.
- Batches: llama.cpp and halfweave only; the others' interfaces were not driven with batches.
- RSS is the process's greatest, Python and its libraries included.
{missing}{tables}{products}"""

PRODUCTS = """
## Single products

Weights out of the caches, on large pages, several equal ones in turn; microseconds of one product
with M tokens, inputs in fp32, their rounding included. "Of read" divides the bytes a second by what
this machine's threads read at the same moment. "To ggml" is the time of ggml's Q4_0 product of the
same shape, repacked where it can be, over ours: above 1, ours is faster; the median of ratios
inside a round.
{kernels}"""


def write_page(results: Path) -> None:
    """Write cpu.md beside cpu.json."""
    document = json.loads((results / "cpu.json").read_text())
    text = PAGE.format(
        hardware=document["hardware"],
        level=document["level"],
        date=document["date"],
        versions=", ".join(f"{name} {version}" for name, version in document["versions"].items()),
        rounds=document["rounds"],
        quality=os.path.relpath(QUALITY, results.resolve()),
        missing="".join(
            f"- Not measured: {each['engine']} {each['format']}: {each['reason']}\n"
            for each in document["missing"]
        ),
        tables="".join(_engines(document["rows"], t) for t in _threads(document["rows"])),
        products=_products(document["kernels"]),
    )
    (results / "cpu.md").write_text(text)


def _threads(rows: Sequence[Figures]) -> list[int]:
    return sorted({row["threads"] for row in rows})


def _engines(rows: Sequence[Figures], threads: int) -> str:
    found: dict[tuple[str, str], dict[tuple[str, int, int], Figures]] = {}
    for row in rows:
        if row["threads"] == threads:
            tasks = found.setdefault((row["engine"], row["format"]), {})
            tasks[row["phase"], row["depth"], row["batch"]] = row
    base = found.get(BASELINE, {})
    lines = []
    for (engine, stored), tasks in found.items():
        some = next(iter(tasks.values()))
        cells = [f"{engine} {some['version']}", stored]
        cells += [_rate(tasks.get(task), base.get(task)) for task in TASKS]
        lines.append([*cells, str(some["load_s"]), str(some["peak_rss_mib"])])
    header = ["engine", "format", *TASKS.values(), "load, s", "RSS, MiB"]
    note = (
        f"In brackets behind the spread: the multiple of {' '.join(BASELINE)}.\n\n" if base else ""
    )
    return f"\n## {threads} thread{'s' * (threads > 1)}\n\n{note}{_table(header, lines)}"


def _rate(row: Figures | None, base: Figures | None) -> str:
    if row is None:
        return ""
    least, greatest = row["spread"]
    text = f"{row['tokens_per_s']:.0f} ({least:.0f}-{greatest:.0f})"
    if base is not None and base is not row:
        text += f" [{row['tokens_per_s'] / base['tokens_per_s']:.2f}x]"
    return text


def _products(rows: Sequence[Figures]) -> str:
    if not rows:
        return ""
    return PRODUCTS.format(kernels="".join(_kernels(rows, t) for t in _threads(rows)))


def _kernels(rows: Sequence[Figures], threads: int) -> str:
    lines = [
        [
            f"{row['N']} x {row['K']}",
            str(row["M"]),
            row["format"],
            f"{row['us']:.1f} ({row['spread'][0]:.1f}-{row['spread'][1]:.1f})",
            f"{row['gmac_per_s']:.0f}",
            f"{row['gb_per_s']:.1f}" if row["M"] == 1 else "",
            f"{100 * row['gb_per_s'] / row['read_gb_per_s']:.0f} %" if row["M"] == 1 else "",
            "" if row["ratio_to_ggml_q4_0"] is None else f"{row['ratio_to_ggml_q4_0']:.2f}x",
        ]
        for row in rows
        if row["threads"] == threads
    ]
    header = ["N x K", "M", "format", "us", "GMAC/s, counted dense", "GB/s", "of read", "to ggml"]
    return f"\n### {threads} thread{'s' * (threads > 1)}\n\n{_table(header, lines)}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))


if __name__ == "__main__":
    write_page(Path(sys.argv[1]))
