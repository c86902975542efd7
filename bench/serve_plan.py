"""How an endpoint is to be loaded, and what is good enough for its users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import UsageError
from .traffic import Load

SLO_NAMES = ("ttft", "tpot", "e2e")
_LEAST_REPETITIONS = 5


@dataclass(frozen=True)
class ServePlan:
    """Each of the `loads` is run `repetitions` times, in turns, with `requests` each time.

    `slos` are the most milliseconds of ttft, tpot or e2e that a request may take to count as good.

    Raises:
        UsageError: a number is too small, or there is no load.
    """

    loads: tuple[Load, ...]
    requests: int = 24
    repetitions: int = 11
    warmups: int = 2
    prompt_tokens: int = 128
    new_tokens: int = 64
    slos: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    ignore_eos: bool = True
    chat: bool = False
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        least = {"requests": 1, "repetitions": _LEAST_REPETITIONS, "warmups": 1}
        for name, low in (*least.items(), ("prompt_tokens", 1), ("new_tokens", 1)):
            if getattr(self, name) < low:
                raise UsageError(f"{name} must be at least {low}")
        if not self.loads:
            raise UsageError("no load is given", "--rate 2, or --concurrency 8")
        if len(set(self.loads)) < len(self.loads):
            raise UsageError("a load is given twice")
        for load in self.loads:
            if (load.rate is None) == (load.concurrency is None):
                raise UsageError("a load is a rate or a concurrency")
            if not 0 < (load.rate or load.concurrency or 0) < float("inf"):
                raise UsageError("a rate or concurrency must be above 0")
            if (load.concurrency or 0) > self.requests:
                raise UsageError(
                    f"{load.concurrency} clients would share {self.requests} requests, "
                    "and some of them have none",
                    f"--requests {load.concurrency}, or more",
                )


def loads(rates: Sequence[float], concurrencies: Sequence[int]) -> tuple[Load, ...]:
    """Open loops of these rates, closed ones of these clients; one of eight if none is given."""
    if not rates and not concurrencies:
        concurrencies = (8,)
    return (
        *(Load(rate=rate) for rate in rates),
        *(Load(concurrency=clients) for clients in concurrencies),
    )


def parse_slos(texts: Sequence[str]) -> dict[str, float]:
    """Of words such as ttft:200, in milliseconds, which may stand together with blanks or commas.

    Raises:
        UsageError: a word is none of these.
    """
    found = {}
    for word in " ".join(texts).replace(",", " ").split():
        name, _, limit = word.partition(":")
        try:
            value = float(limit)
        except ValueError:
            value = 0.0
        if name not in SLO_NAMES or not 0 < value < float("inf"):
            known = ", ".join(f"{each}:MS" for each in SLO_NAMES)
            raise UsageError(f"{word!r} is no limit for goodput; known are {known}")
        found[name] = value
    return found
