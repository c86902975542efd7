"""The report of a model directory: one HTML file that needs no other, and its charts as PNGs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HalfweaveError
from ..files import write_bytes, write_text
from ..kernels.schema import REPORT_DIRECTORY as PICTURES
from ..kernels.schema import REPORT_FILE as PAGE
from .chart import DASH, MIB, Chart, Table, number
from .documents import Metric, TaskFigures
from .gather import Found, gather_all
from .theme import css_variables, drawing, format_name, need_matplotlib, short

if TYPE_CHECKING:
    from jinja2 import Template

# Told after each section: sections done, sections in all, and its name.
ReportProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ReportResult:
    """What was written: the page, the pictures, and the charts for which nothing was measured."""

    page: str
    pictures: tuple[str, ...]
    drawn: tuple[str, ...]
    absent: tuple[tuple[str, str, str], ...]  # title, why, and the command that would measure it


def write_report(
    path: str | Path,
    others: Sequence[str | Path] = (),
    progress: ReportProgress | None = None,
) -> ReportResult:
    """Write report.html and report/*.png into the model directory `path`.

    `others` are directories to compare with. Files are replaced one by one, each whole.

    Raises:
        RefusedError: matplotlib is not installed.
        CapacityError: the disk is full.
        HalfweaveError: the directory cannot be written to.
    """
    need_matplotlib()
    main, *rest = gather_all([path, *others])
    charts = []
    with drawing():
        makers = _makers(main, rest)
        for done, (name, make) in enumerate(makers, start=1):
            charts += make()
            if progress is not None:
                progress(done, len(makers), name)
    try:
        pictures = _save(main.path, charts, render(main, charts))
    except OSError as error:
        raise HalfweaveError(f"{error.filename} cannot be written: {error.strerror}") from error
    return ReportResult(
        str(main.path / PAGE),
        tuple(pictures),
        tuple(chart.title for chart in charts if chart.picture is not None),
        tuple((chart.title, chart.absent, chart.command) for chart in charts if chart.absent),
    )


def _save(directory: Path, charts: Sequence[Chart], page: str) -> list[str]:
    """Write the pictures, then the page; pictures of an older report go."""
    folder = directory / PICTURES
    folder.mkdir(exist_ok=True)
    drawn = {f"{chart.name}.png": chart.picture for chart in charts if chart.picture is not None}
    for old in folder.glob("*.png"):
        if old.name not in drawn:
            old.unlink()
    for name, picture in drawn.items():
        write_bytes(folder / name, picture.png)
    write_text(directory / PAGE, page)
    return [str(folder / name) for name in drawn]


def _makers(main: Found, rest: Sequence[Found]) -> list[tuple[str, Callable[[], list[Chart]]]]:
    from . import quality_charts as quality
    from . import speed_charts as speed
    from .batch_chart import batch_chart

    return [
        ("quality", lambda: [quality.pareto_chart(main, rest)]),
        ("tasks", lambda: _task_section([main, *rest])),
        ("errors", lambda: [quality.error_chart(main)]),
        ("kernels", lambda: speed.kernel_charts(main)),
        ("batches", lambda: [batch_chart(main)]),
        ("latency", lambda: [speed.latency_chart(main)]),
        ("pattern", lambda: [quality.pattern_chart(main)]),
    ]


def render(main: Found, charts: Sequence[Chart]) -> str:
    """The page. Everything but the charts' own SVG is escaped."""
    light, dark = css_variables()
    return _template().render(
        title=f"{main.name}: what was won and lost",
        intro=_intro(main),
        charts=charts,
        provenance=_provenance(main),
        light=light,
        dark=dark,
    )


def _template() -> Template:
    from jinja2 import Environment

    source = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True).from_string(source)


def _intro(main: Found) -> list[str]:
    formats = ", ".join(format_name(kind) for kind in main.formats)
    lines = [f"{formats}, {main.weight_bytes / MIB:.1f} MiB of weight files in {main.path}."]
    if main.parent:
        method = main.recipe.get("method", "an unknown method")
        lines.append(f"Pruned from {main.parent} by {method}.")
    if main.eval is not None:
        quality = main.eval.result
        against = (
            "" if quality.against_ppl is None else f", its dense parent {quality.against_ppl:.2f}"
        )
        lines.append(
            f"Perplexity {number(quality.ppl, 2)}{against}, on {quality.tokens} tokens of "
            f"{short(main.eval.text)}."
        )
    return lines


def _provenance(main: Found) -> list[str]:
    """Command, time, machine, versions and notes of every document that is shown."""
    lines = []
    for kind, found in main.documents.items():
        versions = ", ".join(f"{name} {value}" for name, value in found.versions.items())
        commit = f", commit {found.commit[:12]}" if found.commit else ""
        lines.append(
            f"{kind}: {shlex.join(found.command) or 'unknown command'}; {found.created}; "
            f"{found.hardware.line}, load {found.hardware.load:.1f}; {versions}{commit}"
        )
        lines += [f"{kind}, note: {note}" for note in found.notes]
    lines += [f"{kind}: {why}" for kind, why in main.missing.items() if why != "not measured"]
    return lines or ["Nothing was measured of this model yet."]


def _task_section(everything: Sequence[Found]) -> list[Chart]:
    """A table of all tasks, the dense parent's figures beside; no section without tasks."""
    rows: list[tuple[str, ...]] = []
    for found in everything:
        if found.eval is not None:
            if found.eval.against is not None:
                rows += _task_rows(found.eval.against.name, found.eval.against_tasks)
            rows += _task_rows(found.name, found.eval.tasks)
    if not rows:
        return []
    table = Table(("model", "task", "metric", "value", "standard error", "n"), tuple(rows))
    caption = "Tasks of the evaluation harness, asked through the runtime that serves."
    return [Chart("tasks", "Tasks", caption, table)]


def _task_rows(name: str, tasks: TaskFigures) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for task, figures in tasks.items():
        count = figures.get("n")
        for metric, figure in figures.items():
            if isinstance(figure, Metric):
                told = (number(figure.value, 4), number(figure.stderr, 4))
                rows.append((name, task, metric, *told, DASH if count is None else str(count)))
    return rows
