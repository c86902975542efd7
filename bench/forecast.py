"""What `bench offline` would do and how long it would take, judged by a small part of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..runtime.eval import count_windows, evaluate
from ..runtime.hardware import peak_memory_bytes
from ..runtime.model import LoadSettings
from ..runtime.threads import in_passing_thread
from .offline import baseline_first, first_tokens, load_all
from .offline_plan import BenchPlan
from .turns import take_turn


@dataclass(frozen=True)
class Forecast:
    """A run that was not made: `turns` of one request and of all batches, by each of the models.

    `seconds` of all, and the memory that its small part took.
    """

    models: tuple[str, ...]
    windows: int
    turns: int
    batches: tuple[int, ...]
    seconds: float
    peak_memory_bytes: int


def forecast(
    paths: Mapping[str, str | Path], text: str, plan: BenchPlan, loading: LoadSettings
) -> Forecast:
    """Load the models, take one turn and look at one window, and say what all of it takes.

    Raises as `bench_offline`.
    """
    ordered = baseline_first(paths)
    started = time.perf_counter()
    models = load_all(ordered, loading)
    load_s = time.perf_counter() - started
    prompt = first_tokens(models, text, plan)
    baseline = next(iter(models.values()))
    windows = count_windows(baseline, text, plan.window, plan.max_windows)

    def one_window() -> None:
        for model in models.values():
            against = None if model is baseline else baseline
            evaluate(model, text, window=plan.window, max_windows=1, against=against)

    in_passing_thread(one_window)  # the first of all warms up
    quality_s = windows * _seconds(lambda: in_passing_thread(one_window))
    take_turn(models, prompt, replace(plan, batches=plan.batches[:1]))  # as above
    turns_s = plan.turns * _seconds(lambda: take_turn(models, prompt, plan))
    return Forecast(
        tuple(models),
        windows,
        plan.turns,
        plan.batches,
        2 * load_s + quality_s + turns_s,  # each is loaded once more, by itself, for its memory
        peak_memory_bytes(),
    )


def _seconds(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
