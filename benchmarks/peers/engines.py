"""Whole models in turns: prompts read, tokens decoded alone and in a batch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prepare import Contender
from process import Process


@dataclass(frozen=True)
class Task:
    """One thing to measure: `tokens` read at once, or decoded one by one in `batch` sequences."""

    phase: str
    tokens: int
    depth: int = 0
    batch: int = 1


TASKS = (
    Task("prefill", 512),
    Task("decode", 64),
    Task("decode", 64, depth=512),
    Task("decode", 32, batch=16),
)


def measure_engines(
    contenders: Sequence[Contender], threads: int, rounds: int
) -> list[dict[str, Any]]:
    """Rows of the table for one number of threads.

    Every round goes through all contenders task by task; the first one only warms up.
    """
    running = [
        (one, Process(one.python, one.script, str(one.model), threads)) for one in contenders
    ]
    rates: dict[tuple[int, Task], list[float]] = {}
    peaks = [0] * len(running)
    try:
        for number in range(rounds + 1):
            for task in TASKS:
                for i, (_, process) in enumerate(running):
                    answer = process.ask(**asdict(task))
                    peaks[i] = answer["peak_rss_mib"]
                    if number and answer["seconds"]:
                        rate = task.tokens * task.batch / answer["seconds"]
                        rates.setdefault((i, task), []).append(rate)
    finally:
        for _, process in running:
            process.close()
    return [
        {
            "engine": running[i][0].engine,
            "version": running[i][1].version,
            "format": running[i][0].format,
            "threads": threads,
            "phase": task.phase,
            "depth": task.depth,
            "batch": task.batch,
            "tokens_per_s": round(statistics.median(found), 1),
            "spread": [round(min(found), 1), round(max(found), 1)],
            "peak_rss_mib": peaks[i],
            "load_s": round(running[i][1].load_s, 2),
        }
        for (i, task), found in rates.items()
    ]
