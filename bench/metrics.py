"""What a document says, as quantities with one value for each repetition.

A quantity that has something beside it, measured in the same turn, is also told relative to that: a
shared machine is a different one some minutes later, which moves both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_INT4 = "int4"

# One value for each turn of a measurement, by its number: some may be missing.
_Turns = Mapping[int, float]


@dataclass(frozen=True)
class Metric:
    """One quantity of one thing that was measured.

    `main` ones are tested apart from the rest, so that many details do not hide a change in them.
    `relative` ones are ratios to the baseline in the same turn. The verdict is of those that
    `decide`. `parts` are the things that a quantity sums up, by name, with their repetitions.
    """

    name: str
    unit: str
    more_is_better: bool
    main: bool
    values: tuple[float, ...]
    relative: bool = False
    decides: bool = True
    parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def metrics(document: Mapping[str, Any]) -> list[Metric]:
    """Every quantity that can be compared, in the order of the document.

    Raises:
        KeyError, TypeError, ValueError: the document is not as described.
    """
    of_kind = {"kernel": _kernel, "offline": _offline, "serve": _serve}
    found = list(of_kind[document["kind"]](document))
    for metric in found:
        if not metric.values or not all(0 < value < math.inf for value in metric.values):
            raise ValueError(f"{metric.name} has values that are no positive numbers")
    return found


@dataclass(frozen=True)
class _Quantity:
    """What is measured, whichever thing it is of."""

    title: str
    unit: str
    more_is_better: bool
    main: bool = False

    def told(self, of: str, turns: _Turns, beside: _Turns, baseline: str) -> Iterator[Metric]:
        """By itself, and relative to the baseline in the turns that have both."""
        name = f"{of}: {self.title}"
        both = tuple(turns[turn] / beside[turn] for turn in turns if turn in beside)
        if both:
            title = f"{name}, to {baseline}"
            yield Metric(title, "x", self.more_is_better, self.main, both, relative=True)
        if turns:
            yield Metric(name, self.unit, self.more_is_better, self.main, tuple(turns.values()))


def _kernel(document: Mapping[str, Any]) -> Iterator[Metric]:
    """All products together; each alone is marked, but one run is one look at where it came to lie.

    Relative ones are to dense int4, which only products of pruned weights have beside them.
    """
    times, ratios = {}, {}
    for row in document["rows"]:
        group = f" g{row['group']}" if row.get("group") else ""
        name = f"{row['format']}{group} {row['N']}x{row['K']}, {row['M']} tokens"
        times[name] = tuple(row["samples_us"])
        beside = row.get("others", {}).get(_INT4)
        if beside is not None:
            both = zip(times[name], beside["samples_us"], strict=True)
            ratios[f"{name}, to dense int4"] = tuple(own / other for own, other in both)
    if ratios:
        typical = _by_turn(ratios, statistics.median)
        name = "all products, to dense int4"
        yield Metric(name, "x", False, True, typical, relative=True, parts=ratios)
    means = _by_turn(times, statistics.geometric_mean)
    yield Metric("all products, geometric mean", "us", False, True, means, parts=times)
    for name, values in ratios.items():
        yield Metric(name, "x", False, False, values, relative=True, decides=False)
    for name, values in times.items():
        yield Metric(name, "us", False, False, values)


def _by_turn(
    parts: Mapping[str, Sequence[float]], summary: Callable[[Sequence[float]], float]
) -> tuple[float, ...]:
    return tuple(summary(turn) for turn in zip(*parts.values(), strict=True))


def _offline(document: Mapping[str, Any]) -> Iterator[Metric]:
    prompt, models = document["plan"]["prompt_tokens"], document["models"]
    baseline = _baseline(models)
    beside = {} if baseline is None else dict(_speeds(baseline, prompt))
    for model in models:
        for quantity, turns in _speeds(model, prompt):
            theirs = {} if model is baseline else beside.get(quantity, {})
            yield from quantity.told(model["name"], turns, theirs, "dense")


def _baseline(models: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((model for model in models if model.get("is_baseline")), None)


def _speeds(model: Mapping[str, Any], prompt: int) -> Iterator[tuple[_Quantity, _Turns]]:
    """Every quantity of one model, by turn."""
    samples = model["samples"]
    if not samples:
        raise ValueError(f"{model['name']} has no samples")
    decode = [1000 * sum(s["gap_tokens"]) / sum(s["gaps_ms"]) for s in samples]
    prefill = [1000 * prompt / s["prefill_ms"] for s in samples]
    yield _Quantity("decode", "tokens/s", True, main=True), _turns(decode)
    yield _Quantity("prefill", "tokens/s", True, main=True), _turns(prefill)
    yield _Quantity("TTFT", "ms", False), _turns(s["ttft_ms"] for s in samples)
    for each in model["batches"]:
        size, rounds = each["batch"], each["samples"]
        decode = [s["decode_tokens"] / s["decode_s"] for s in rounds]
        prefill = [size * prompt / s["prefill_s"] for s in rounds]
        yield _Quantity(f"decode x{size}", "tokens/s", True), _turns(decode)
        yield _Quantity(f"prefill x{size}", "tokens/s", True), _turns(prefill)


def _turns(values: Iterable[float]) -> _Turns:
    return {turn: float(value) for turn, value in enumerate(values)}


_WAITS = {
    "e2e_ms": _Quantity("E2E", "ms", False, main=True),
    "ttft_ms": _Quantity("TTFT", "ms", False),
    "tpot_ms": _Quantity("TPOT", "ms", False),
}


def _serve(document: Mapping[str, Any]) -> Iterator[Metric]:
    """A repetition's value is the median over its requests: these wait for each other."""
    waits = {(point["model"], load(point)): point["samples"] for point in document["points"]}
    baseline = (_baseline(document.get("models", ())) or {}).get("name")
    for (model, loaded), samples in waits.items():
        for field_name, quantity in _WAITS.items():
            theirs = () if model == baseline else waits.get((baseline, loaded), ())
            turns, beside = _medians(samples, field_name), _medians(theirs, field_name)
            yield from quantity.told(f"{model}, {loaded}", turns, beside, "dense")


def load(point: Mapping[str, Any]) -> str:
    """What a server was loaded with, in words."""
    if point["mode"] == "open":
        return f"{point['rate']:g} req/s"
    return f"{point['concurrency']} clients"


def _medians(samples: Iterable[Mapping[str, Any]], name: str) -> _Turns:
    """By repetition, where every completed request has this time."""
    rounds: dict[int, list[Any]] = {}
    for sample in samples:
        if sample["outcome"] == "completed":
            rounds.setdefault(sample["repetition"], []).append(sample[name])
    return {turn: statistics.median(each) for turn, each in rounds.items() if None not in each}
