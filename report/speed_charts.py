"""Charts of speed: single products against what memory allows, and a server under load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .chart import DASH, Chart, Table, measured_on, number, percent, spread, whiskers
from .documents import KernelDocument, KernelRow, LoadPoint, Percentiles, ServeDocument, Spread
from .gather import Found, command
from .labels import Label, end_labels
from .theme import (
    FORMATS,
    INK,
    MUTED,
    SERIES,
    axes_grid,
    finish,
    format_name,
    from_zero,
    short,
    styles,
)

_ONE = "Fewest tokens at once: bytes read a second, by shape"
_ROOFLINE = "Products of more tokens, by shape"
_LATENCY = "Latency against load"
_MOST_SHAPES = 6
_RANKS = ("p50", "p90", "p99")
_RANK_COLORS = (SERIES[1][0], SERIES[5][0], SERIES[2][0])

Shape = tuple[int, int]


def kernel_charts(main: Found) -> list[Chart]:
    """Two views of the products: a token at a time, and many at once."""
    document = main.kernel
    if document is None or not document.rows:
        absent = main.missing.get("kernel", "not measured: the document has no rows")
        told = command("kernel", main)
        return [
            Chart("one-token", _ONE, absent=absent, command=told),
            Chart("roofline", _ROOFLINE, absent=absent, command=told),
        ]
    return [_one_token(document), _roofline(document)]


def _one_token(document: KernelDocument) -> Chart:
    """Bars of bandwidth, with the ideal line."""
    least = min(row.M for row in document.rows)
    rows = [row for row in document.rows if row.tokens == least]
    shapes, kinds = _shapes(rows), _kinds(rows)
    looks = styles(list(kinds.values()))
    height = 0.26 * len(rows) + 0.35 * len(shapes) + 1.3
    figure, (axes,) = axes_grid(1, 1, (9.4, height))
    at, ticks, words = 0.0, [], []
    for shape in shapes:
        group = [row for row in rows if row.shape == shape]
        ticks.append((at + (len(group) - 1) / 2, _shape_title(group)))
        for row in group:
            look = looks[kinds[row.format]]
            bandwidth = _bandwidth(row)
            axes.barh(at, bandwidth.median, color=look.color, height=0.82)
            axes.errorbar(
                bandwidth.median, at, xerr=whiskers([bandwidth]), color=INK, capsize=3, lw=1
            )
            ratio = "" if row.to_dense is None else f", {row.to_dense:.2f}x dense"
            words.append((at, f"{kinds[row.format]}: {number(row.us.median)} µs{ratio}"))
            at += 1
        at += 0.9
    axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of weights, as stored")
    ideal = document.read_gb_per_s
    if ideal is not None:
        axes.axvline(ideal, color=INK, linestyle="--", linewidth=1.4)
        axes.set_title(f"dashed: ideal, what memory gives here, {ideal:.1f} GB/s", fontsize=10)
    most = max([_bandwidth(row).high for row in rows] + ([ideal] if ideal else []))
    axes.set_xlim(0, 1.06 * most)
    for place, text in words:  # right of everything, the ideal line included
        axes.annotate(text, (1.07 * most, place), va="center", fontsize=9.5, annotation_clip=False)
    caption = (
        f"A product reads each weight once, so memory sets a limit: the ideal line. M = {least}; "
        f"bars span the least and the greatest of n = {_repetitions(rows)}. Beyond the line, the "
        f"weights were in a cache. {measured_on(document)}"
    )
    picture = finish(figure, "one-token", _ONE, f"{len(rows)} products at M = {least}.")
    return Chart("one-token", _ONE, caption, _kernel_table(rows), picture)


def _bandwidth(row: KernelRow) -> Spread:
    """GB/s; the slowest product has the least."""
    read = row.bytes / 1e3
    times = (row.us.median, row.us.high, row.us.low)
    median, low, high = (read / time if time else 0.0 for time in times)
    return Spread(median=median, low=low, high=high)


def _compute(row: KernelRow, us: Spread) -> Spread:
    """GFLOP/s of the dense product that it stands for, at such times."""
    work = 2 * row.N * row.K * row.M / 1e3
    median, low, high = (work / time if time else 0.0 for time in (us.median, us.high, us.low))
    return Spread(median=median, low=low, high=high)


def _roofline(document: KernelDocument) -> Chart:
    """GFLOP/s against M, a chart a shape, the model's own formats below their ideal lines."""
    rows = document.rows
    shapes = _shapes(rows)[:_MOST_SHAPES]
    tokens = sorted({row.M for row in rows})
    columns = min(len(shapes), 3)
    lines = -(-len(shapes) // columns)
    figure, cells = axes_grid(lines, columns, (max(3.6, 10.4 / columns), 3.3))
    looks = styles([label for shape in shapes for label in _lines(rows, shape)])
    handles: dict[str, Any] = {}
    for axes, shape in zip(cells, shapes, strict=False):
        most = 0.0
        for label, line in _lines(rows, shape).items():
            look, places = looks[label], [tokens.index(row.M) for row, _ in line]
            speeds = [_compute(row, us) for row, us in line]
            handles[label] = axes.errorbar(
                places,
                [speed.median for speed in speeds],
                yerr=whiskers(speeds),
                color=look.color,
                marker=look.marker,
                markersize=5,
                capsize=3,
                linewidth=1.4,
            )
            most = max(most, *(speed.high for speed in speeds))
            own = all(us is row.us for row, us in line)
            if own and document.read_gb_per_s is not None:
                roof = [_roof(row, line[0][0], document.read_gb_per_s) for row, _ in line]
                axes.plot(places, roof, color=look.color, linestyle="--", linewidth=1, zorder=1)
        _finish_shape(axes, shape, rows, tokens, most)
    for unused in cells[len(shapes) :]:
        unused.set_visible(False)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
    )
    caption = (
        "Operations a second of the dense product that each one stands for. A dashed line is the "
        "ideal of the format in its colour: what memory allows where every weight is read once for "
        "all M tokens; it leaves the picture where arithmetic, not memory, is the limit. Bars span "
        f"the least and the greatest of n = {_repetitions(rows)}. {measured_on(document)}"
    )
    picture = finish(figure, "roofline", _ROOFLINE, f"{len(shapes)} shapes, M = {tokens}.")
    return Chart("roofline", _ROOFLINE, caption, _kernel_table(rows), picture)


# Ways to compute with every weight; beside them may be int4, or on a GPU other tiles of our kernel.
_DENSE = ("torch-float32", "torch-bfloat16", "native-dense", "torch-dense")


def _lines(rows: Sequence[KernelRow], shape: Shape) -> dict[str, list[tuple[KernelRow, Spread]]]:
    """Times of a shape by M: of the model's formats, and of what they were measured beside.

    Of the dense kernels the fastest is the one to beat, and of what stands beside several formats
    at the same M the fastest too.
    """
    found: dict[str, dict[int, tuple[KernelRow, Spread]]] = {}

    def take(label: str, row: KernelRow, us: Spread) -> None:
        line = found.setdefault(label, {})
        if row.M not in line or us.median < line[row.M][1].median:
            line[row.M] = (row, us)

    for row in sorted((row for row in rows if row.shape == shape), key=lambda row: row.tokens):
        take(format_name(row.format), row, row.us)
        dense = [other.us for name, other in row.others.items() if name in _DENSE]
        beside = {"dense": min(dense, key=lambda us: us.median, default=None)}
        beside["int4"] = row.others["int4"].us if "int4" in row.others else None
        for label, us in beside.items():
            if us is not None and row.format != label:
                take(label, row, us)
    return {label: list(line.values()) for label, line in found.items()}


def _roof(row: KernelRow, least: KernelRow, gb_per_s: float) -> float:
    """GFLOP/s if the bytes of the smallest product were all that is read, as fast as memory can."""
    seconds = least.bytes / (gb_per_s * 1e9)
    return 2 * row.N * row.K * row.M / seconds / 1e9 if seconds else 0.0


def _finish_shape(
    axes: Any, shape: Shape, rows: Sequence[KernelRow], tokens: Sequence[int], most: float
) -> None:
    of_shape = [row for row in rows if row.shape == shape]
    axes.set_title(_shape_title([r for r in of_shape if r.M == of_shape[0].M]), fontsize=10.5)
    axes.set_xticks(range(len(tokens)), list(map(str, tokens)), fontsize=9.5)
    axes.set_xlabel("M, tokens at once")
    axes.set_ylabel("GFLOP/s")
    axes.set_ylim(0, 1.15 * max(most, 1e-9))


def _shape_title(rows: Sequence[KernelRow]) -> str:
    """Of all formats of a shape, at one number of tokens."""
    return f"{rows[0].N} x {rows[0].K}, {_counted(sum(row.count for row in rows), 'linear')}"


def _counted(count: int | None, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _shapes(rows: Sequence[KernelRow]) -> list[Shape]:
    """Those that take most of a model first."""
    weights: dict[Shape, int] = {}
    for row in rows:
        weights[row.shape] = weights.get(row.shape, 0) + row.N * row.K * row.count
    return sorted(weights, key=lambda shape: -weights[shape])


def _kinds(rows: Sequence[KernelRow]) -> dict[str, str]:
    """What people call each format, by its name, in one order."""
    found = dict.fromkeys(row.format for row in rows)
    order = [*FORMATS, *(kind for kind in found if kind not in FORMATS)]
    return {kind: format_name(kind) for kind in order if kind in found}


def _repetitions(rows: Sequence[KernelRow]) -> str:
    counts = sorted({len(row.samples_us) for row in rows})
    if counts == [0]:
        return "an unknown number"
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _kernel_table(rows: Sequence[KernelRow]) -> Table:
    header = (
        "shape",
        "linears",
        "M",
        "format",
        "kernel",
        "time, µs",
        "GB/s",
        "of memory's",
        "GFLOP/s",
        "to dense",
        "to int4",
        "n",
    )
    return Table(
        header,
        tuple(
            (
                f"{row.N} x {row.K}",
                str(row.count),
                str(row.M),
                format_name(row.format),
                row.kernel,
                spread(row.us),
                number(row.gb_per_s),
                percent(row.bandwidth_share),
                number(row.gflop_per_s),
                _times(row.to_dense),
                _times(row.to_int4),
                str(len(row.samples_us)) if row.samples_us else DASH,
            )
            for row in rows
        ),
    )


def _times(ratio: float | None) -> str:
    return DASH if ratio is None else f"{ratio:.2f}x"


# ---- a server under load


@dataclass(frozen=True)
class _Load:
    """Points of one mode and model, and what is across."""

    title: str
    model: str
    points: Sequence[LoadPoint]
    across: Callable[[LoadPoint], float]


def latency_chart(main: Found) -> Chart:
    """Latencies and throughput against the rate of requests, or against clients at once."""
    document = main.serve
    if document is None or not document.points:
        absent = main.missing.get("serve", "not measured: the document has no points")
        return Chart("latency", _LATENCY, absent=absent, command=command("serve", main))
    loads = _loads(document)
    figure, cells = axes_grid(len(loads), 3, (4.0, 3.3))
    names: list[tuple[Any, list[Label]]] = []
    for at, load in enumerate(loads):
        ttft, tpot, rate = cells[3 * at : 3 * at + 3]
        names.append((ttft, _percentile_lines(ttft, load, lambda p: p.ttft_ms, "TTFT, ms")))
        names.append((tpot, _percentile_lines(tpot, load, lambda p: p.tpot_ms, "TPOT, ms")))
        _throughput(rate, load)
        ttft.set_title(load.model, fontsize=10.5)
    _alike(cells, loads)
    for axes, labels in names:
        end_labels(axes, labels)
    finished = [point.completed for point in document.points]
    lost = {
        "failed": sum(point.failed for point in document.points),
        "refused": sum(point.refused for point in document.points),
        "timed out": sum(point.timed_out for point in document.points),
    }
    caption = (
        "TTFT: from the request to its first token, queueing included. TPOT: (whole time - TTFT) / "
        "(tokens - 1). Lines are percentiles over requests; the shaded band spans the median and "
        f"the 99th. n = {min(finished)} to {max(finished)} finished requests a point, "
        f"{', '.join(f'{count} {what}' for what, count in lost.items())}. {measured_on(document)}"
    )
    told = f"{len(document.points)} loads."
    picture = finish(figure, "latency", _LATENCY, told)
    return Chart("latency", _LATENCY, caption, _load_table(document.points), picture)


def _loads(document: ServeDocument) -> list[_Load]:
    """Open loads, then closed ones, each model's by itself and in order."""
    across: dict[str, tuple[str, Callable[[LoadPoint], float]]] = {
        "open": ("requests/s that were sent", lambda point: point.rate or 0.0),
        "closed": ("clients at once", lambda point: float(point.concurrency or 0)),
    }
    return [
        _Load(title, short(model), sorted(points, key=place), place)
        for mode, (title, place) in across.items()
        for model in dict.fromkeys(point.model for point in document.points)
        if (points := [p for p in document.points if (p.mode, p.model) == (mode, model)])
    ]


def _percentile_lines(
    axes: Any, load: _Load, of: Callable[[LoadPoint], Percentiles | None], title: str
) -> list[Label]:
    """Draw the lines; returns their names, which have to wait for the final limits."""
    ends = []
    for rank, color in zip(_RANKS, _RANK_COLORS, strict=True):
        line = [
            (load.across(point), getattr(found, rank))
            for point in load.points
            if (found := of(point)) is not None and getattr(found, rank) is not None
        ]
        if line:
            axes.plot(*zip(*line, strict=True), color=color, marker="o", markersize=5, lw=1.5)
            ends.append(Label(*line[-1], rank, color))
    band = [
        (load.across(point), found.p50, found.p99)
        for point in load.points
        if (found := of(point)) is not None and found.p50 is not None and found.p99 is not None
    ]
    if band:
        axes.fill_between(*zip(*band, strict=True), color=SERIES[1][0], alpha=0.12, linewidth=0)
    if not ends:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color=MUTED)
    axes.set_xlabel(load.title)
    axes.set_ylabel(title)
    from_zero(axes, room=1.2)
    return ends


def _alike(cells: Sequence[Any], loads: Sequence[_Load]) -> None:
    """The same heights for all models under the same kind of load, so that they compare."""
    for title in {load.title for load in loads}:
        rows = [at for at, load in enumerate(loads) if load.title == title]
        for column in range(3):
            same = [cells[3 * row + column] for row in rows]
            top = max(axes.get_ylim()[1] for axes in same)
            for axes in same:
                axes.set_ylim(0, top)


def _throughput(axes: Any, load: _Load) -> None:
    line = [
        (load.across(p), p.output_tokens_per_s)
        for p in load.points
        if p.output_tokens_per_s is not None
    ]
    if line:
        axes.plot(*zip(*line, strict=True), color=SERIES[3][0], marker="^", markersize=6, lw=1.5)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color=MUTED)
    axes.set_xlabel(load.title)
    axes.set_ylabel("output tokens/s")
    from_zero(axes, room=1.2)


def _load_table(points: Sequence[LoadPoint]) -> Table:
    header = (
        "model",
        "load",
        "finished",
        "failed",
        "refused",
        "timed out",
        "TTFT p50/p90/p99, ms",
        "TPOT p50/p90/p99, ms",
        "ITL p50/p90/p99, ms",
        "E2E p50/p90/p99, ms",
        "output tokens/s",
        "requests/s",
        "goodput/s",
    )
    return Table(
        header,
        tuple(
            (
                point.model,
                f"{point.rate:g} requests/s"
                if point.mode == "open" and point.rate is not None
                else _counted(point.concurrency, "client"),
                f"{point.completed} of {point.requests}",
                *map(str, (point.failed, point.refused, point.timed_out)),
                *map(_percentiles, (point.ttft_ms, point.tpot_ms, point.itl_ms, point.e2e_ms)),
                number(point.output_tokens_per_s),
                number(point.requests_per_s, 2),
                number(point.goodput_per_s, 2),
            )
            for point in points
        ),
    )


def _percentiles(found: Percentiles | None) -> str:
    if found is None:
        return DASH
    return " / ".join(number(getattr(found, rank)) for rank in _RANKS)
