"""The quality table as a Markdown page, from its JSON twin: reads quality.json, writes quality.md.

python benchmarks/quality_page.py [RESULTS_DIR]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from string import ascii_uppercase
from typing import Any

from quality_rows import BASELINE, COLUMNS, GROUP, HOUR_FLAGS, MIXED, OURS, Column

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
Figures = dict[str, Any]

PAGE = """# Quality of pruned models

{model}, pruned by halfweave's methods: the same texts and protocol for all rows.
`{ours}` is halfweave's own method; magnitude, Wanda and SparseGPT are the published ones.
**{measured} of {planned} planned runs are measured**; the rest is listed as such.

- Command: `{command}`, with the paths; {date}; {versions}.
- Runs were made {made}, in several goes; a run keeps its figures, and the machine they were
  measured on, until it is measured again. Machines: {machines}.
- Evaluation: {tokens} predicted tokens, windows of {window} that do not overlap, every k-th window
  of the text; text SHA-256 `{text_sha256}`. fp32, halfweave's own runtime.
- Calibration: {calib} tokens ({windows} x {length}) drawn by the seed, from other articles than the
  evaluation text, block after block on the already pruned model. Both texts come from
  `benchmarks/make_text.py`. Magnitude needs no tokens.
- int4: symmetric, groups of {group}. The dense model is the dequantized Q4_1 GGUF (4-bit, groups
  of 32), so 4-bit rows may flatter; groups of 32 would flatter more.
- A figure is the median over the seeds that were measured, with (least..greatest) beside it where
  there are several; "1 of 3" means one of three planned. With one seed, differences of a few
  percent mean nothing. "To dense" and "to SparseGPT" divide medians; the latter takes SparseGPT
  without recovery, of the same table.
- Recovery: `blocks` trains each block behind its pruning; `distill` the whole model, for at most so
  many minutes, and rounds it on the way where it is to end in codes. `blocks+distill` is the best
  found for an hour, with `{hour}`: one behind the other, from
  more calibration text than the other rows have.
- Last word, asked of one run of each line of the headline columns: share of the last words of
  clauses, seen before in their paragraph, that are guessed greedily, with its standard error in
  percent points; `benchmarks/last_word.py`, not LAMBADA.
- MiB are all weight files, embeddings included. 50 % and 4:8 are stored dense, with their zeros.
- Minutes are wall minutes of the whole `prune` command, loading and recovery included, with other
  work on the machine: upper bounds, not a benchmark. Of them, where it was timed apart, recovery
  took those in brackets, with its measurements and roundings. RSS is the greatest of the runs.
{tables}"""

HEADER = (
    "method", "recovery", "runs", "perplexity", "to dense", "to SparseGPT", "KL, nats",
    "agreement", "last word, %", "MiB", "minutes", "RSS, GiB", "machine",
)  # fmt: skip
BUDGET_HEADER = (
    "method", "asked", "runs", "perplexity", "to dense", "KL, nats", "MiB",
    "of dense", "minutes", "machine",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One way of pruning: its measured runs, and how many were planned."""

    method: str
    recover: str
    minutes: float
    budget: float | None
    runs: Sequence[Figures]
    planned: int

    def middle(self, key: str) -> float | None:
        """Median over the runs that have the figure."""
        values = [run[key] for run in self.runs if run.get(key) is not None]
        return median(values) if values else None

    def spread(self, key: str, show: Callable[[float], str]) -> str:
        """Median, with least and greatest where there are several."""
        values = [run[key] for run in self.runs if run.get(key) is not None]
        if not values:
            return ""
        ends = f" ({show(min(values))}..{show(max(values))})" if len(values) > 1 else ""
        return show(median(values)) + ends

    @property
    def recovery(self) -> str:
        """How it recovers, and the most minutes that it may train for."""
        if self.recover == "none":
            return ""
        return f"{self.recover}, {self.minutes:g} min" if self.minutes else self.recover

    def machines(self, letters: dict[str, str]) -> str:
        """Where the runs were made."""
        return ", ".join(sorted({letters[run["hardware"]] for run in self.runs}))

    @property
    def count(self) -> str:
        """How many of the planned runs there are."""
        return f"{len(self.runs)} of {self.planned}"


def write_page(results: Path) -> None:
    """Write quality.md beside quality.json."""
    document = json.loads((results / "quality.json").read_text())
    (results / "quality.md").write_text(to_markdown(document))


def to_markdown(document: Figures) -> str:
    """The whole page."""
    dense, *runs = document["rows"]
    calibration = document["calibration"]
    dates = sorted(run["date"] for run in runs)
    letters = letters_of(document)
    tables = [table(column, dense, document) for column in COLUMNS]
    return PAGE.format(
        **document["eval"],
        model=dense["model"],
        ours=OURS,
        measured=len(runs),
        planned=len(runs) + len(document["missing"]),
        command=document["command"],
        date=document["date"],
        made=dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
        machines="; ".join(f"{letter} is {line}" for line, letter in letters.items()),
        versions=", ".join(f"{name} {value}" for name, value in document["versions"].items()),
        calib=calibration["windows"] * calibration["length"],
        windows=calibration["windows"],
        length=calibration["length"],
        group=GROUP,
        hour=" ".join(f"--{name} {value:g}" for name, value in HOUR_FLAGS.items()),
        tables="\n".join(["", *tables, budgets(dense, document)]),
    )


def letters_of(document: Figures) -> dict[str, str]:
    """A letter for each machine that has a run, in the order of their runs."""
    lines = dict.fromkeys(run["hardware"] for run in document["rows"] if run["method"] != "dense")
    return dict(zip(lines, ascii_uppercase, strict=False))


def lines_of(column: Column, document: Figures) -> list[Line]:
    """The column's lines, best first; those without a run last, in planned order."""
    runs = [run for run in document["rows"] if is_in(column, run) and run["method"] != "dense"]
    missing = [run for run in document["missing"] if is_in(column, run)]
    grouped: dict[tuple[str, str, float, float | None], list[Figures]] = {}
    planned: dict[tuple[str, str, float, float | None], int] = {}
    for run in [*runs, *missing]:
        kind = (run["method"], run["recover"], run["recover_minutes"], run["max_ppl_ratio"])
        planned[kind] = planned.get(kind, 0) + 1
        grouped.setdefault(kind, []).extend([run] if "ppl" in run else [])
    lines = [Line(*kind, found, planned[kind]) for kind, found in grouped.items()]
    return sorted(lines, key=lambda line: line.middle("ppl") or float("inf"))


def is_in(column: Column, run: Figures) -> bool:
    return (run["pattern"], run["bits"] or 0) == (column.pattern, column.bits)


def table(column: Column, dense: Figures, document: Figures) -> str:
    """One column as a section of the page."""
    lines = lines_of(column, document)
    baseline = next(
        (x.middle("ppl") for x in lines if (x.method, x.recover) == (BASELINE, "none")), None
    )
    parent = Line("dense", "none", 0.0, None, [dense], 1)
    letters = letters_of(document)
    rows = [cells(parent, column, dense["ppl"], baseline, letters)]
    rows += [cells(line, column, dense["ppl"], baseline, letters) for line in lines]
    return f"## {column.title}\n\n" + markdown(HEADER, rows)


def cells(
    line: Line, column: Column, dense: float, baseline: float | None, letters: dict[str, str]
) -> list[str]:
    """One line of a column's table."""
    name = method_name(line.method, column)
    ppl = line.middle("ppl")
    if ppl is None:
        return [name, line.recovery, line.count, "not yet measured", *[""] * (len(HEADER) - 4)]
    minutes = "" if line.method == "dense" else line.spread("minutes", "{:.1f}".format)
    if alone := line.middle("recovery_minutes"):
        minutes += f" [{alone:.1f}]"
    peaks = [run["peak_rss_gib"] for run in line.runs if run["peak_rss_gib"] is not None]
    return [
        name,
        line.recovery,
        "" if line.method == "dense" else line.count,
        line.spread("ppl", "{:.2f}".format),
        f"{ppl / dense:.2f}x",
        f"{ppl / baseline:.3f}" if baseline and line.method != "dense" else "",
        line.spread("kl", "{:.3f}".format),
        line.spread("agreement", "{:.3f}".format),
        last_word(line),
        line.spread("bytes", mebibytes),
        minutes,
        f"{max(peaks):.2f}" if peaks else "",
        "" if line.method == "dense" else line.machines(letters),
    ]


def method_name(method: str, column: Column) -> str:
    """The method, by the name that it has elsewhere when no weight is removed."""
    others = {"magnitude": "round to nearest", BASELINE: "GPTQ"}
    if column.pattern == "dense" and method in others:
        return f"{others[method]} ({method})"
    return method


def last_word(line: Line) -> str:
    """Median accuracy and the standard error of one run, in percent."""
    accuracy, error = line.middle("last_word_accuracy"), line.middle("last_word_standard_error")
    if accuracy is None or error is None:
        return ""
    return f"{100 * accuracy:.1f} +- {100 * error:.1f}"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.1f}"


def budgets(dense: Figures, document: Figures) -> str:
    """The runs that were asked for a quality instead of a size."""
    letters = letters_of(document)
    rows = [budget_cells(line, dense, letters) for line in lines_of(MIXED, document)]
    intro = "Asked for a perplexity of so many times the dense one, as small as it gets with that."
    return f"## Quality budgets\n\n{intro}\n\n" + markdown(BUDGET_HEADER, rows)


def budget_cells(line: Line, dense: Figures, letters: dict[str, str]) -> list[str]:
    """One line of the table of budgets."""
    start = [line.method, f"{line.budget:g}x", line.count]
    ppl, size = line.middle("ppl"), line.middle("bytes")
    if ppl is None or size is None:
        return [*start, "not yet measured", *[""] * (len(BUDGET_HEADER) - len(start) - 1)]
    return [
        *start,
        line.spread("ppl", "{:.2f}".format),
        f"{ppl / dense['ppl']:.2f}x",
        line.spread("kl", "{:.3f}".format),
        mebibytes(size),
        f"{size / dense['bytes']:.2f}x",
        line.spread("minutes", "{:.1f}".format),
        line.machines(letters),
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows]) + "\n"


if __name__ == "__main__":
    write_page(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
