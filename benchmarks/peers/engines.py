"""Whole models in turns: prompts read, tokens decoded alone and in a batch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from prepare import Contender, Missing
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


@dataclass
class _Runner:
    """A contender that is running, and its rates so far."""

    contender: Contender
    process: Process
    peak_rss_mib: int = 0
    rates: dict[Task, list[float]] = field(default_factory=dict)

    def measure(self, task: Task, keep: bool) -> None:
        answer = self.process.ask(**asdict(task))
        self.peak_rss_mib = answer["peak_rss_mib"]
        if keep and answer["seconds"]:
            rate = task.tokens * task.batch / answer["seconds"]
            self.rates.setdefault(task, []).append(rate)


def measure_engines(
    contenders: Sequence[Contender], threads: int, rounds: int
) -> tuple[list[dict[str, Any]], list[Missing]]:
    """Rows of the table for one number of threads, and what ended before it was measured.

    Every round goes through all contenders task by task; the first one only warms up.
    """
    runners: list[_Runner] = []
    missing: list[Missing] = []
    try:
        for one in contenders:
            try:
                process = Process(one.python, one.script, str(one.model), threads)
                runners.append(_Runner(one, process))
            except RuntimeError as error:
                missing.append(Missing(one.engine, one.format, str(error)))
        for number in range(rounds + 1):
            for task in TASKS:
                missing += _turn(runners, task, keep=number > 0)
    finally:
        for runner in runners:
            runner.process.close()
    return [row for runner in runners for row in _rows(runner, threads)], missing


def _turn(runners: list[_Runner], task: Task, keep: bool) -> list[Missing]:
    """Let every runner do the task; those that end over it are taken out and returned."""
    ended = []
    for runner in list(runners):
        try:
            runner.measure(task, keep)
        except RuntimeError as error:
            one = runner.contender
            ended.append(Missing(one.engine, one.format, f"{task.phase}: {error}"))
            runner.process.close()
            runners.remove(runner)
    return ended


def _rows(runner: _Runner, threads: int) -> list[dict[str, Any]]:
    return [
        {
            "engine": runner.contender.engine,
            "version": runner.process.version,
            "format": runner.contender.format,
            "threads": threads,
            "phase": task.phase,
            "depth": task.depth,
            "batch": task.batch,
            "tokens_per_s": round(statistics.median(found), 1),
            "spread": [round(min(found), 1), round(max(found), 1)],
            "peak_rss_mib": runner.peak_rss_mib,
            "load_s": round(runner.process.load_s, 2),
        }
        for task, found in runner.rates.items()
    ]
