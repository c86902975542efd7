"""Charts of what a model lost and kept: quality against size and speed, errors, kept weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from .chart import DASH, MIB, Chart, Table, measured_on, number, percent, spread, whiskers
from .documents import EvalDocument, Identity, ModelSpeed, OfflineDocument, Spread
from .gather import Found, command
from .labels import Label, point_labels
from .theme import GRID, MUTED, SERIES, axes_grid, finish, format_name, from_zero, short, styles

_PARETO = "Quality against size and speed"
_ERRORS = "Error of each linear"
_PATTERN = "Weights that were kept"
_MOST_CELL_NUMBERS = 12  # layers up to which cells hold their numbers


@dataclass(frozen=True)
class Point:
    """One model of the comparison. `speed` is decoded tokens a second, of `n` repetitions.

    Those of one `key` are the same model; `is_parent` says that it is what others are measured by.
    """

    key: str
    is_parent: bool
    label: str
    name: str
    weight_bytes: int
    ppl: float
    agreement: float | None
    speed: Spread | None
    prefill: Spread | None
    n: int


def pareto_chart(main: Found, others: Sequence[Found]) -> Chart:
    """Quality against size against speed, all on one text."""
    points, notes, source = _points(main, others)
    drawn = [point for point in points if math.isfinite(point.ppl)]
    if source is None or not drawn:
        absent = main.missing.get("offline", "not measured")
        return Chart("pareto", _PARETO, absent=absent, command=command("offline", main))
    caption = (
        "Further left is smaller, further right faster; below, the share of tokens on which a "
        "model and its dense parent find the same next one likeliest. Bars span the least and the "
        f"greatest of {_counts(drawn)} repetitions. The dashed line joins models that no other "
        f"one beats in both respects. {measured_on(source)} {_text_of(source)} {' '.join(notes)}"
    )
    with_agreement = any(point.agreement is not None for point in drawn)
    rows = 2 if with_agreement else 1
    figure, axes = axes_grid(rows, 2, (5.2, 4.0))
    _quality_row(axes[:2], drawn, "perplexity (lower is better)", lambda p: p.ppl, up=False)
    if with_agreement:
        label = "same next token, % (higher is better)"
        _quality_row(axes[2:], drawn, label, _agreed, up=True)
        for cell in axes[2:]:
            cell.set_ylim(0, 112)
            cell.set_yticks(range(0, 101, 20))
    told = "; ".join(f"{p.label}: {p.weight_bytes / MIB:.0f} MiB, {p.ppl:.1f}" for p in drawn)
    picture = finish(figure, "pareto", _PARETO, f"Weights and perplexity: {told}.")
    return Chart("pareto", _PARETO, caption.strip(), _pareto_table(points), picture)


def _agreed(point: Point) -> float | None:
    """In percent; the dense parent agrees with itself."""
    if point.agreement is None:
        return 100.0 if point.is_parent else None
    return 100 * point.agreement


def _counts(points: Sequence[Point]) -> str:
    counts = sorted({point.n for point in points if point.speed is not None})
    return " or ".join(map(str, counts)) or "no"


def _text_of(document: OfflineDocument | EvalDocument) -> str:
    if isinstance(document, OfflineDocument):
        return f"Quality: {short(document.text.origin)}, n = {document.text.tokens} tokens."
    return f"Quality: {short(document.text)}, n = {document.result.tokens} tokens."


def _points(
    main: Found, others: Sequence[Found]
) -> tuple[list[Point], list[str], OfflineDocument | EvalDocument | None]:
    """Models that were measured on one and the same text, what was left out, and a document.

    That is the one that all others are like in what they were measured on; None without points.
    """
    everything = [main, *others]
    notes: list[str] = []
    first: OfflineDocument | EvalDocument | None
    if any(found.offline is not None for found in everything):
        points, first = _of_runs(everything, notes)
    else:
        points, first = _of_evals(everything, notes)
    return _told_apart(points), notes, first


def _of_runs(
    everything: Sequence[Found], notes: list[str]
) -> tuple[list[Point], OfflineDocument | None]:
    points: list[Point] = []
    first: OfflineDocument | None = None
    for found in everything:
        run = found.offline
        if run is None:
            if found.eval is not None:
                notes.append(f"Speed of {short(found.name)} was not measured; it is left out.")
            continue
        if first is not None:
            if _protocol(run) != _protocol(first):
                notes.append(f"{short(found.name)} was measured on another text and is left out.")
                continue
            notes.append(f"Speeds of {short(found.name)} are from another run.")
        first = first or run
        points += [_of_speed(model) for model in run.models]
    return points, first


def _protocol(document: OfflineDocument | EvalDocument) -> tuple[object, ...]:
    """What perplexities have to have in common to be compared."""
    if isinstance(document, OfflineDocument):
        return document.text.sha256, document.text.tokens, document.plan.get("window")
    return document.result.text_sha256, document.result.tokens, document.result.window


def _of_speed(model: ModelSpeed) -> Point:
    kinds = [format_name(kind) for kind in model.kernels]
    label = "dense" if model.is_baseline else " and ".join(kinds) or "dense"
    ppl = math.inf if model.ppl is None else model.ppl
    return Point(
        _key(model),
        model.is_baseline,
        label,
        model.name,
        model.weight_bytes,
        ppl,
        model.agreement,
        model.decode_tokens_per_s,
        model.prefill_tokens_per_s,
        len(model.samples),
    )


def _key(model: ModelSpeed | Identity) -> str:
    """The digest of a dense model is of its config alone, which another one may have as well."""
    return f"{model.digest or model.path} {model.name} {model.weight_bytes}"


def _of_evals(
    everything: Sequence[Found], notes: list[str]
) -> tuple[list[Point], EvalDocument | None]:
    """Without speeds: what `eval` measured, as far as it was the same text."""
    points: list[Point] = []
    first: EvalDocument | None = None
    for found in everything:
        if found.eval is None:
            continue
        first = first or found.eval
        if _protocol(found.eval) != _protocol(first):
            notes.append(f"{short(found.name)} was measured on another text and is left out.")
            continue
        quality = found.eval.result
        if found.eval.against is not None and quality.against_ppl is not None:
            points += _dense(found.eval.against, quality.against_ppl)
        label = " and ".join(format_name(kind) for kind in found.formats)
        ppl = math.inf if quality.ppl is None else quality.ppl
        point = Point(
            _key(found.eval.model),
            False,
            label,
            found.name,
            found.weight_bytes,
            ppl,
            quality.agreement,
            None,
            None,
            0,
        )
        points.append(point)
    if points:
        notes.append("Speed was not measured.")
    return points, first


def _dense(parent: Identity, ppl: float) -> list[Point]:
    size = parent.weight_bytes
    if size is None:
        return []
    return [Point(_key(parent), True, "dense", parent.name, size, ppl, None, None, None, 0)]


def _told_apart(points: Sequence[Point]) -> list[Point]:
    """Each model once; those of one format by their names, and if need be by numbers."""
    unique = list({point.key: point for point in reversed(points)}.values())
    unique.reverse()
    labels = [point.label for point in unique]
    named = [
        label if labels.count(label) == 1 else f"{label}, {short(point.name)}"
        for label, point in zip(labels, unique, strict=True)
    ]
    numbered = [
        label if named.count(label) == 1 else f"{label} ({named[: at + 1].count(label)})"
        for at, label in enumerate(named)
    ]
    return [replace(point, label=label) for point, label in zip(unique, numbered, strict=True)]


def _quality_row(
    cells: Sequence[Any],
    points: Sequence[Point],
    title: str,
    value: Callable[[Point], float | None],
    up: bool,
) -> None:
    """The same quality twice: against size, and against speed. `up` says that more is better."""
    by_size, by_speed = cells
    shown = [point for point in points if value(point) is not None]
    _scatter(by_size, shown, lambda p: (p.weight_bytes / MIB, None), value, up)
    by_size.set_xlabel("weight files, MiB")
    by_size.set_ylabel(title)
    fast = [point for point in shown if point.speed is not None]
    if fast:
        _scatter(by_speed, fast, lambda p: (p.speed.median if p.speed else 0.0, p.speed), value, up)
    else:
        by_speed.text(0.5, 0.5, "speed: not measured", ha="center", transform=by_speed.transAxes)
    by_speed.set_xlabel("decoded tokens/s, one request")
    by_speed.set_ylabel(title)


def _scatter(
    axes: Any,
    points: Sequence[Point],
    across: Callable[[Point], tuple[float, Spread | None]],
    value: Callable[[Point], float | None],
    up: bool,
) -> None:
    looks = styles([point.label for point in points])
    places = [(across(point)[0], value(point) or 0.0) for point in points]
    for point, (x, y) in zip(points, places, strict=True):
        bar, look = across(point)[1], looks[point.label]
        axes.errorbar(
            [x],
            [y],
            xerr=None if bar is None else whiskers([bar]),
            color=look.color,
            marker=look.marker,
            markersize=8,
            capsize=4,
            linestyle="none",
        )
    from_zero(axes, room=1.25)
    faster = any(across(point)[1] is not None for point in points)
    front = _front(places, more_is_better=faster, up=up)
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=MUTED, linestyle="--", linewidth=1, zorder=1)
    names = [
        Label(x, y, point.label, looks[point.label].color)
        for point, (x, y) in zip(points, places, strict=True)
    ]
    point_labels(axes, names, [*places, *_along(front)])


def _along(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places on a line, close enough for no word to stand on it."""
    steps = [step / 24 for step in range(1, 24)]
    return [
        (a[0] + part * (b[0] - a[0]), a[1] + part * (b[1] - a[1]))
        for a, b in pairwise(line)
        for part in steps
    ]


def _front(
    places: Sequence[tuple[float, float]], more_is_better: bool, up: bool
) -> list[tuple[float, float]]:
    """Those that none of the others beats in both respects, from left to right."""
    sign, side = (-1 if more_is_better else 1), (-1 if up else 1)
    scored = [(sign * x, side * y) for x, y in places]
    kept = [
        place
        for place, own in zip(places, scored, strict=True)
        if not any(o[0] <= own[0] and o[1] <= own[1] and o != own for o in scored)
    ]
    return sorted(set(kept))


def _pareto_table(points: Sequence[Point]) -> Table:
    header = (
        "model",
        "format",
        "weights, MiB",
        "perplexity",
        "same next token",
        "decode, tokens/s",
        "prefill, tokens/s",
        "n",
    )
    rows = [
        (
            point.name,
            point.label,
            number(point.weight_bytes / MIB),
            number(point.ppl, 2) if math.isfinite(point.ppl) else DASH,
            percent(point.agreement),
            spread(point.speed),
            spread(point.prefill),
            str(point.n) if point.n else DASH,
        )
        for point in points
    ]
    return Table(header, tuple(rows))


def error_chart(main: Found) -> Chart:
    """A cell for every linear: its relative error on the calibration tokens."""
    known = {place: error for place, error in main.errors.items() if error is not None}
    if not known:
        absent = (
            "not measured: the manifest has no errors, which a training drops"
            if main.errors
            else "not measured: nothing was pruned here"
        )
        return Chart("errors", _ERRORS, absent=absent, command="halfweave prune DENSE OUT")
    kinds = list(dict.fromkeys(kind for _, kind in main.errors))
    layers = sorted({layer for layer, _ in main.errors})
    tokens = _calibration_tokens(main)
    caption = (
        "Relative squared error of a linear's outputs, by the pruner, on the calibration tokens"
        f"{tokens}; 0 is no error. Crossed cells were kept as they were, or not measured."
    )
    if any("*" in kind for kind in kinds):
        caption += " Of a layer's experts it is the worst."
    grid = [[known.get((layer, kind), math.nan) for layer in layers] for kind in kinds]
    picture = _heat_map(kinds, layers, grid)
    rows = tuple(
        (str(layer), *(number(known.get((layer, kind)), 4) for kind in kinds)) for layer in layers
    )
    return Chart("errors", _ERRORS, caption, Table(("layer", *kinds), rows), picture)


def _calibration_tokens(main: Found) -> str:
    windows, length = main.recipe.get("calib_windows"), main.recipe.get("calib_length")
    if isinstance(windows, int) and isinstance(length, int):
        return f" (n = {windows * length})"
    return ""


def _heat_map(kinds: Sequence[str], layers: Sequence[int], grid: list[list[float]]) -> Any:
    import numpy as np

    width = min(max(6.0, 0.3 * len(layers) + 2.6), 12.0)
    figure, (axes,) = axes_grid(1, 1, (width, 0.42 * len(kinds) + 1.5))
    values = np.ma.masked_invalid(np.asarray(grid, dtype=float))
    top = max(float(values.max()), 1e-9)
    mesh = axes.pcolormesh(values, cmap="cividis", vmin=0, vmax=top, edgecolors="face", lw=0.2)
    for row, column in np.argwhere(values.mask) if values.mask.any() else []:
        axes.plot(column + 0.5, row + 0.5, marker="x", color=MUTED, markersize=7)
    axes.set_yticks([row + 0.5 for row in range(len(kinds))], [short(kind) for kind in kinds])
    step = max(1, math.ceil(len(layers) / 16))
    axes.set_xticks([at + 0.5 for at in range(len(layers))][::step], list(map(str, layers))[::step])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.invert_yaxis()
    axes.set_xlabel("layer")
    if len(layers) <= _MOST_CELL_NUMBERS:
        for (row, column), value in np.ndenumerate(values.filled(math.nan)):
            if math.isfinite(value):
                color = "#ffffff" if value < 0.6 * top else "#000000"
                text = f"{value:.3f}"
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=color)
    bar = figure.colorbar(mesh, ax=axes, label="relative error (no unit)", pad=0.02)
    bar.outline.set_visible(False)
    bar.solids.set_rasterized(True)
    worst = f"The largest of {values.count()} errors is {top:.4f}."
    return finish(figure, "errors", _ERRORS, worst)


def pattern_chart(main: Found) -> Chart:
    """Which weights of one layer were kept: a corner of it, and how often each pair of slots."""
    corner = main.corner
    if corner is None:
        absent = "not measured: no linear of this model is stored as 2:4"
        return Chart("pattern", _PATTERN, absent=absent, command="halfweave prune DENSE OUT")
    rows, columns = corner.kept.shape
    pairs = _pairs(corner.kept)
    figure, (image, bars) = axes_grid(1, 2, (5.2, 4.9))
    _draw_corner(image, corner.weights, corner.kept)
    image.set_title(f"{short(corner.linear)}", fontsize=10)
    counts = list(pairs.values())
    bars.bar(list(pairs), counts, color=SERIES[1][0], width=0.6)
    bars.axhline(sum(counts) / 6, color=MUTED, linestyle="--", linewidth=1)
    bars.set_ylim(0, 1.2 * max(counts))
    bars.set_title("dashed: all six pairs equally often", fontsize=10)
    bars.set_xlabel("places that are kept of 0, 1, 2, 3")
    bars.set_ylabel("groups of four")
    for at, count in enumerate(counts):
        bars.text(at, 0.04 * max(counts), str(count), ha="center", color="#ffffff")
    caption = (
        f"The first {rows} rows and {columns} columns of {short(corner.linear)} "
        f"({corner.shape[0]} x {corner.shape[1]}, {format_name(corner.format)}): "
        "blue weights are positive, orange ones negative or 0, darker ones larger; what is blank "
        f"was removed. Two of every aligned four are kept, n = {sum(counts)} groups."
    )
    total = sum(counts)
    table = Table(
        ("places kept", "groups", "share"),
        tuple((name, str(count), percent(count / total)) for name, count in pairs.items()),
    )
    picture = finish(figure, "pattern", _PATTERN, f"Two of every four of {total} groups are kept.")
    return Chart("pattern", _PATTERN, caption, table, picture)


def _pairs(kept: Any) -> dict[str, int]:
    """How many groups of four keep each of the six pairs of places."""
    names = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    groups = kept.reshape(kept.shape[0], -1, 4)
    return {f"{a}, {b}": int((groups[..., a] & groups[..., b]).sum().item()) for a, b in names}


def _draw_corner(axes: Any, weights: Any, kept: Any) -> None:
    import numpy as np

    values, mask = weights.numpy(), kept.numpy()
    strength = 0.45 + 0.55 * np.abs(values) / max(float(np.abs(values).max()), 1e-9)
    pixels = np.zeros((*values.shape, 4))
    pixels[values > 0, :3] = (0.0, 0.447, 0.698)
    pixels[values <= 0, :3] = (0.835, 0.369, 0.0)
    pixels[..., 3] = np.where(mask, strength, 0.0)
    axes.imshow(pixels, interpolation="nearest", extent=(0, mask.shape[1], mask.shape[0], 0))
    axes.set_xticks(range(0, mask.shape[1] + 1, 8))
    axes.set_yticks(range(0, mask.shape[0] + 1, 8))
    axes.grid(True, color=GRID)
    axes.set_xlabel("column (input)")
    axes.set_ylabel("row (output)")
