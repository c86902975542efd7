"""What the quality table measures: columns, rows, seeds, and in which order.

A row is one way of pruning one model, with one seed. Knows nothing of running or of printing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

GROUP = 64  # divides both widths of SmolLM2-135M; its own weights were 4-bit in groups of 32
SEEDS = (0, 1, 2)
OURS, BASELINE = "admm", "sparsegpt"
MAX_PPL_RATIO = 1.15  # the quality that the budget rows ask for
ASIDE = 0.25  # the part of the minutes that columns beside the headlines are trained for

# The best found for an hour of recovery on two cores, blocks first and then the whole model
# (docs/pruning.md): the minutes of the whole model, and the other flags that are its own.
HOUR_MINUTES = 28.0
HOUR_FLAGS = {"calib-windows": 256, "block-epochs": 1, "recover-rate": 2e-3, "recover-ce": 1.0}


@dataclass(frozen=True)
class Column:
    """One thing that a model may be pruned to: a pattern and the bits of a kept weight."""

    pattern: str
    bits: int

    @property
    def title(self) -> str:
        """Its name in headings."""
        return f"{self.pattern}, " + (f"int4 g{GROUP}" if self.bits == 4 else "16 bits")


HEADLINES = (Column("2:4", 16), Column("2:4", 4))
# Dense and 4-bit leaves the choice of weights out: magnitude is then rounding to nearest, and
# SparseGPT is GPTQ (2210.17323).
MIXED = Column("mixed", 0)  # what a budget leads to: each linear has formats of its own
COLUMNS = (Column("50%", 16), Column("4:8", 16), *HEADLINES, Column("dense", 4))


@dataclass(frozen=True)
class Row:
    """One way of pruning.

    Attributes:
        method: a name of the pruner's table of methods.
        column: pattern and bits.
        recover: "none", "blocks", "distill", or "blocks+distill", the best of an hour.
        minutes: most minutes of distillation; 0 where there is none.
        max_ppl_ratio: the quality budget, or None.
        seed: draws the calibration windows.
    """

    method: str
    column: Column
    recover: str = "none"
    minutes: float = 0.0
    max_ppl_ratio: float | None = None
    seed: int = 0

    @property
    def label(self) -> str:
        """What filters match: method:pattern:bits, then how it recovers; or method:budget."""
        if self.max_ppl_ratio is not None:
            return f"{self.method}:budget"
        parts = [self.method, self.column.pattern, str(self.column.bits)]
        if self.recover != "none":
            parts.append(self.recover)
        return ":".join(parts)

    @property
    def asks_words(self) -> bool:
        """Whether the last words are asked for: of one run of each line of the headlines.

        Of the hour's all are asked: it is the line that matters most, and hardly adds to its time.
        """
        first = self.seed == SEEDS[0] or self.recover == "blocks+distill"
        return first and self.column in (*HEADLINES, MIXED)

    @property
    def file_name(self) -> str:
        """The label and the seed, as the beginning of a file's name."""
        label = self.label.replace("%", "pct").replace(":", "-")
        return f"{label}-s{self.seed}"


def all_rows(minutes: float) -> list[Row]:
    """Every row, the most telling ones first.

    Training may take `minutes` where a comparison rests on it, and a part of that elsewhere.
    """
    order = [
        *_one_shot(HEADLINES, (BASELINE, OURS)),
        *_one_shot(COLUMNS, (BASELINE, OURS, "magnitude", "wanda")),
        *_distilled(HEADLINES, (OURS, BASELINE), minutes),
        *_tuned(HEADLINES),
        *(Row(OURS, HEADLINES[1], "blocks+distill", HOUR_MINUTES, seed=seed) for seed in SEEDS),
        Row(OURS, MIXED, max_ppl_ratio=MAX_PPL_RATIO),
        *_more_seeds(_one_shot(HEADLINES, (BASELINE, OURS))),
        *_more_seeds(_one_shot(COLUMNS, (BASELINE, OURS))),
        *_distilled([c for c in COLUMNS if c not in HEADLINES], (OURS,), minutes * ASIDE),
        *_tuned(COLUMNS),
    ]
    return list(dict.fromkeys(order))


def chosen(rows: Sequence[Row], filters: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    """The rows whose label matches a filter (`*` stands for anything; none match all)."""
    return [
        row
        for row in rows
        if row.seed in seeds and any(fnmatchcase(row.label, f) for f in filters or ("*",))
    ]


def curve_rows(label: str, minutes: Sequence[float]) -> list[Row]:
    """One distilled row at several budgets of minutes; no minutes is the same without recovery.

    Raises:
        ValueError: no row has that label, or it is no distilled one.
    """
    found = [row for row in all_rows(1.0) if row.label == label and row.seed == 0]
    if not found or not found[0].minutes:
        raise ValueError(f"{label!r} is no distilled row")
    row = found[0]
    unrecovered = replace(row, recover="none", minutes=0.0)
    return [replace(row, minutes=m) if m else unrecovered for m in minutes]


def start_of(row: Row) -> Row:
    """The row whose checkpoint a distilled one starts from: codes come after the training."""
    column = row.column
    if column.bits == 4 and column.pattern != "dense":
        column = replace(column, bits=16)
    return replace(row, column=column, recover="none", minutes=0.0)


def _one_shot(columns: Sequence[Column], methods: Sequence[str]) -> Iterator[Row]:
    for column in columns:
        for method in methods:
            # Wanda only chooses weights: where all stay, it is magnitude.
            if not (method == "wanda" and column.pattern == "dense"):
                yield Row(method, column)


def _distilled(columns: Sequence[Column], methods: Sequence[str], minutes: float) -> Iterator[Row]:
    return (Row(method, column, "distill", minutes) for column in columns for method in methods)


def _tuned(columns: Sequence[Column]) -> Iterator[Row]:
    return (Row(OURS, column, "blocks") for column in columns)


def _more_seeds(rows: Iterator[Row]) -> list[Row]:
    first = list(rows)
    return [replace(row, seed=seed) for seed in SEEDS[1:] for row in first]
