"""What a document says, as quantities with one value for each repetition."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_INT4 = "int4"


@dataclass(frozen=True)
class Metric:
    """One quantity of one thing that was measured.

    `main` ones are tested apart from the rest, so that many details do not hide a change in them.
    The verdict is of those that decide: not of times where something relative to them was measured.
    """

    name: str
    unit: str
    more_is_better: bool
    main: bool
    values: tuple[float, ...]
    decides: bool = True


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


def _kernel(document: Mapping[str, Any]) -> Iterator[Metric]:
    """What decides is relative to dense int4 in the same turn: a shared machine is a different one
    some minutes later, which moves both."""
    rows = document["rows"]
    beside = [row for row in rows if _INT4 in row.get("others", ())]
    if beside:
        yield Metric("all products, to dense int4", "x", False, True, _to_int4(beside))
    rounds = zip(*(row["samples_us"] for row in rows), strict=True)
    means = tuple(statistics.geometric_mean(each) for each in rounds)
    yield Metric("all products, geometric mean", "us", False, not beside, means, not beside)
    for row in rows:
        name = f"{row['format']} {row['N']}x{row['K']}, {row['M']} tokens"
        yield Metric(name, "us", False, False, tuple(row["samples_us"]), not beside)


def _to_int4(rows: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """The geometric mean over products of how many times as long ours takes, by repetition."""
    ratios = (
        [own / other for own, other in zip(row["samples_us"], _int4_of(row), strict=True)]
        for row in rows
    )
    return tuple(statistics.geometric_mean(each) for each in zip(*ratios, strict=True))


def _int4_of(row: Mapping[str, Any]) -> Sequence[float]:
    found: Sequence[float] = row["others"][_INT4]["samples_us"]
    return found


def _offline(document: Mapping[str, Any]) -> Iterator[Metric]:
    prompt = document["plan"]["prompt_tokens"]
    for model in document["models"]:
        name, samples = model["name"], model["samples"]
        decode = (1000 * sum(s["gap_tokens"]) / sum(s["gaps_ms"]) for s in samples)
        prefill = (1000 * prompt / s["prefill_ms"] for s in samples)
        yield Metric(f"{name}: decode", "tokens/s", True, True, tuple(decode))
        yield Metric(f"{name}: prefill", "tokens/s", True, True, tuple(prefill))
        ttft = tuple(float(s["ttft_ms"]) for s in samples)
        yield Metric(f"{name}: TTFT", "ms", False, False, ttft)
        for each in model["batches"]:
            yield from _batch(name, prompt, each)


def _batch(name: str, prompt: int, batch: Mapping[str, Any]) -> Iterator[Metric]:
    samples, size = batch["samples"], batch["batch"]
    decode = tuple(s["decode_tokens"] / s["decode_s"] for s in samples)
    prefill = tuple(size * prompt / s["prefill_s"] for s in samples)
    yield Metric(f"{name}: decode x{size}", "tokens/s", True, False, decode)
    yield Metric(f"{name}: prefill x{size}", "tokens/s", True, False, prefill)


def _serve(document: Mapping[str, Any]) -> Iterator[Metric]:
    """A repetition's value is the median over its requests: these wait for each other."""
    for point in document["points"]:
        load = (
            f"{point['rate']:g} req/s"
            if point["mode"] == "open"
            else f"{point['concurrency']} clients"
        )
        rounds: dict[int, list[Mapping[str, Any]]] = {}
        for sample in point["samples"]:
            if sample["outcome"] == "completed":
                rounds.setdefault(sample["repetition"], []).append(sample)
        for field, title in (("e2e_ms", "E2E"), ("ttft_ms", "TTFT"), ("tpot_ms", "TPOT")):
            values = tuple(
                statistics.median(sample[field] for sample in each)
                for each in rounds.values()
                if all(sample[field] is not None for sample in each)
            )
            if values:
                name = f"{point['model']}, {load}: {title}"
                yield Metric(name, "ms", False, field == "e2e_ms", values)
