"""Chart of whole models: tokens a second of several requests side by side, dense beside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .chart import DASH, Chart, Table, measured_on, number, spread, whiskers
from .documents import BatchSpeed, ModelSpeed, OfflineDocument, Spread
from .gather import Found, command
from .theme import axes_grid, finish, format_name, from_zero, short, styles

_TITLE = "Requests side by side"
_LEAST_APART = 0.05  # of an axis, so that numbers below it do not touch

_Of = Callable[[BatchSpeed], Spread | float | None]


@dataclass(frozen=True)
class _Line:
    """One model, its batches in order."""

    label: str
    is_baseline: bool
    batches: Sequence[BatchSpeed]


def batch_chart(main: Found) -> Chart:
    """Prefill and decode against the batch."""
    document = main.offline
    lines = [] if document is None else _lines(document.models)
    if document is None or not any(line.batches for line in lines):
        absent = main.missing.get("offline", "not measured: the document has no batches")
        return Chart("batches", _TITLE, absent=absent, command=command("offline", main))
    figure, (prefill, decode) = axes_grid(1, 2, (5.2, 3.8))
    _draw(prefill, lines, lambda each: each.prefill_tokens_per_s, "prefill, tokens/s")
    handles = _draw(decode, lines, lambda each: each.decode_tokens_per_s, "decode, tokens/s")
    figure.legend(
        handles,
        [line.label for line in lines],
        loc="outside lower center",
        ncols=min(len(lines), 4),
        frameon=False,
    )
    caption = (
        "Tokens of all requests together a second, of prompts and of answers while all are being "
        f"written; the models took turns. Bars span the least and the greatest of "
        f"{_repetitions(document)}. {measured_on(document)}"
    )
    told = f"{len(lines)} models, batches {', '.join(map(str, _sizes(lines)))}."
    picture = finish(figure, "batches", _TITLE, told)
    return Chart("batches", _TITLE, caption, _table(lines), picture)


def _lines(models: Sequence[ModelSpeed]) -> list[_Line]:
    """By their formats, or by their names where several have the same."""
    kinds = [
        "dense" if model.is_baseline else " and ".join(map(format_name, model.kernels)) or "dense"
        for model in models
    ]
    shared = {kind for kind, count in Counter(kinds).items() if count > 1}
    return [
        _Line(
            short(model.name if kind in shared and not model.is_baseline else kind),
            model.is_baseline,
            sorted(model.batches, key=lambda each: each.batch),
        )
        for model, kind in zip(models, kinds, strict=True)
    ]


def _draw(axes: Any, lines: Sequence[_Line], of: _Of, title: str) -> list[Any]:
    """One quantity of all models; gives what the legend shows."""
    looks, handles = styles([line.label for line in lines]), []
    for line in lines:
        found = [(each.batch, _spread(of(each))) for each in line.batches]
        known = [(batch, speed) for batch, speed in found if speed is not None]
        handles.append(
            axes.errorbar(
                [batch for batch, _ in known],
                [speed.median for _, speed in known],
                yerr=whiskers([speed for _, speed in known]),
                color=looks[line.label].color,
                marker=looks[line.label].marker,
                markersize=5,
                capsize=3,
                linewidth=1.5,
            )
        )
    axes.set_xlabel("requests at once")
    axes.set_ylabel(title)
    from_zero(axes)
    axes.set_xticks(_apart(_sizes(lines)))
    return handles


def _sizes(lines: Sequence[_Line]) -> list[int]:
    return sorted({each.batch for line in lines for each in line.batches})


def _apart(sizes: Sequence[int]) -> list[int]:
    """0 and the sizes, the largest first, without those too near to the one above."""
    shown = [sizes[-1]]
    for size in reversed(sizes[:-1]):
        if min(shown[-1] - size, size) >= _LEAST_APART * sizes[-1]:
            shown.append(size)
    return sorted({0, *shown})


def _spread(value: Spread | float | None) -> Spread | None:
    """A figure that came without its spread has none."""
    return Spread(median=value, low=value, high=value) if isinstance(value, float) else value


def _repetitions(document: OfflineDocument) -> str:
    counts = {len(each.samples) for model in document.models for each in model.batches}
    known = sorted(counts - {0})
    return f"n = {' or '.join(map(str, known))}" if known else "an unknown number of repetitions"


def _table(lines: Sequence[_Line]) -> Table:
    baseline = next((line.batches for line in lines if line.is_baseline), ())
    dense = {each.batch: _spread(each.decode_tokens_per_s) for each in baseline}
    rows = []
    for line in lines:
        for each in line.batches:
            prefill, decode = _spread(each.prefill_tokens_per_s), _spread(each.decode_tokens_per_s)
            rows.append(
                (
                    line.label,
                    str(each.batch),
                    spread(prefill),
                    spread(decode),
                    _ratio(decode, dense.get(each.batch)),
                    str(len(each.samples) or DASH),
                )
            )
    header = ("model", "batch", "prefill, tokens/s", "decode, tokens/s", "decode / dense", "n")
    return Table(header, tuple(rows))


def _ratio(own: Spread | None, dense: Spread | None) -> str:
    if own is None or dense is None or not dense.median:
        return DASH
    return f"{number(own.median / dense.median, 2)}x"
