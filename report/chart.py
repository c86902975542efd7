"""A chart of the report: what it shows, how to read it, its numbers, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .documents import BaseDocument, Spread
from .theme import Picture

MIB = 2**20
DASH = "-"


@dataclass(frozen=True)
class Table:
    """The numbers of a chart. Columns after the first are numbers where `numeric` says so."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Chart:
    """One section of the report. Without a picture `absent` says why, and `command` what to do.

    `name` is its id on the page and the name of its PNG.
    """

    name: str
    title: str
    caption: str = ""
    table: Table | None = None
    picture: Picture | None = None
    absent: str = ""
    command: str = ""


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or a dash where nothing was measured."""
    return DASH if value is None else f"{value:,.{digits}f}"


def spread(value: Spread | None, digits: int = 1) -> str:
    """Median with least and greatest."""
    if value is None:
        return DASH
    low, high = number(value.low, digits), number(value.high, digits)
    return f"{number(value.median, digits)} ({low}{DASH}{high})"


def percent(share: float | None) -> str:
    """A share of one as a percentage."""
    return DASH if share is None else f"{100 * share:.1f} %"


def whiskers(values: Sequence[Spread]) -> list[list[float]]:
    """How far the least and the greatest are from each median: what matplotlib draws bars by."""
    below = [max(value.median - value.low, 0.0) for value in values]
    above = [max(value.high - value.median, 0.0) for value in values]
    return [below, above]


def measured_on(document: BaseDocument) -> str:
    """Where and when, for a caption."""
    return f"Measured {document.created[:10]} on {document.hardware.line}."
