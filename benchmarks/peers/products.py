"""Single products in turns, ours and ggml's: shapes of SmolLM2-135M and of 1B and 7B models.

The weights of one shape take more room together than any cache, so each is read from memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from process import Process

FORMATS = ("2:4+int4 g64", "int4 g64", "2:4 bf16", "dense bf16")
SHAPES = (  # N, K
    (576, 576),
    (1536, 576),
    (576, 1536),
    (49152, 576),
    (2048, 2048),
    (8192, 2048),
    (4096, 4096),
    (11008, 4096),
)
TOKENS = (1, 512)
_COLD_BYTES = 160 * 2**20  # of our smallest format, over all copies
_MOST_PRODUCTS = 2**34  # of a round with many tokens, which caches do not matter to


def measure_products(
    ours: tuple[Path, Path], ggml: tuple[Path, Path] | None, threads: int, rounds: int
) -> list[dict[str, Any]]:
    """Rows of the kernel table; `ours` and `ggml` are Python and script, or None."""
    processes = {"ours": Process(*ours, "-", threads)}
    try:
        if ggml is not None:
            processes["ggml"] = Process(*ggml, "-", threads)
        return [
            row
            for rows, columns in SHAPES
            for tokens in TOKENS
            for row in _shape_rows(processes, (tokens, rows, columns), threads, rounds)
        ]
    finally:
        for process in processes.values():
            process.close()


def _shape_rows(
    processes: dict[str, Process], shape: tuple[int, int, int], threads: int, rounds: int
) -> list[dict[str, Any]]:
    tokens, rows, columns = shape
    copies = max(1, _COLD_BYTES // (rows * columns * 3 // 8))
    if tokens > 1:
        copies = max(1, min(copies, _MOST_PRODUCTS // (rows * columns * tokens)))
    asked = {"M": tokens, "N": rows, "K": columns, "copies": copies}
    rows_made = []
    for kind in FORMATS:
        times: dict[str, list[float]] = {name: [] for name in processes}
        answers: list[dict[str, Any]] = []
        for number in range(rounds + 1):  # the first one makes the weights, and warms up
            for name, process in processes.items():
                found = process.ask(**asked, format=kind)
                if number:
                    times[name].append(found["us"])
                if number and name == "ours":
                    answers.append(found)
        rows_made.append(_row(kind, shape, threads, times, answers))
    return rows_made


def _row(
    kind: str,
    shape: tuple[int, int, int],
    threads: int,
    times: dict[str, list[float]],
    answers: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    tokens, rows, columns = shape
    us = statistics.median(times["ours"])
    others = times.get("ggml")
    ratio = None
    if others:
        ratio = round(
            statistics.median(b / a for a, b in zip(times["ours"], others, strict=True)), 2
        )
    return {
        "format": kind,
        "M": tokens,
        "N": rows,
        "K": columns,
        "threads": threads,
        "us": round(us, 1),
        "spread": [round(min(times["ours"]), 1), round(max(times["ours"]), 1)],
        "gb_per_s": round(answers[0]["bytes"] / us / 1e3, 2),
        "read_gb_per_s": round(statistics.median(a["read_gb_per_s"] for a in answers), 2),
        "gmac_per_s": round(rows * columns * tokens / us / 1e3, 1),
        "ratio_to_ggml_q4_0": ratio,
    }
