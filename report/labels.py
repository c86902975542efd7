"""Words beside what they name, in place of a legend, and never one upon another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .theme import INK

# Where a label may stand, seen from its point: an offset in points, and how it is aligned.
_PLACES = (
    (8, 6, "left", "bottom"),
    (8, -6, "left", "top"),
    (-8, 6, "right", "bottom"),
    (-8, -6, "right", "top"),
    (0, 11, "center", "bottom"),
    (0, -11, "center", "top"),
    (16, 18, "left", "bottom"),
    (16, -18, "left", "top"),
    (-16, 18, "right", "bottom"),
    (-16, -18, "right", "top"),
)
_MARK_PX = 7.0  # half the side of what a marker covers
_GAP_PT = 13.0


@dataclass(frozen=True)
class Label:
    """A word for the point (x, y) of a chart."""

    x: float
    y: float
    text: str
    color: str = INK


def point_labels(axes: Any, labels: Sequence[Label], taken: Sequence[tuple[float, float]]) -> None:
    """Name points. `taken` are all points of the chart that no word may cover.

    The chart's limits must be final.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    covered = [_around(axes.transData.transform(point)) for point in taken]
    for label in labels:
        best: Any = None
        for x, y, horizontal, vertical in _PLACES:
            text = axes.annotate(
                label.text,
                (label.x, label.y),
                xytext=(x, y),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                color=label.color,
                fontweight="bold",
                annotation_clip=False,
            )
            text.set_in_layout(False)
            box = text.get_window_extent(renderer)
            clashes = sum(_overlap(box, other) for other in covered) + _outside(box, frame)
            if best is None or clashes < best[0]:
                if best is not None:
                    best[1].remove()
                best = (clashes, text, box)
            else:
                text.remove()
            if best[0] == 0:
                break
        covered.append(best[2])


def end_labels(axes: Any, labels: Sequence[Label]) -> None:
    """Name lines at their right ends, pushed apart where they end close to each other.

    The chart's limits must be final, and leave room on the right.
    """
    axes.figure.draw_without_rendering()
    pixels = axes.figure.dpi / 72
    last = -1e9
    for label in sorted(labels, key=lambda label: label.y):
        at = axes.transData.transform((label.x, label.y))[1] / pixels
        wanted = max(at, last + _GAP_PT)
        last = wanted
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(9, wanted - at),
            textcoords="offset points",
            ha="left",
            va="center",
            color=label.color,
            fontweight="bold",
            annotation_clip=False,
        ).set_in_layout(False)


def _around(point: Any) -> Any:
    from matplotlib.transforms import Bbox

    x, y = point
    return Bbox([[x - _MARK_PX, y - _MARK_PX], [x + _MARK_PX, y + _MARK_PX]])


def _overlap(one: Any, other: Any) -> float:
    """Area that two boxes share, in square pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(width, 0) * max(height, 0))


def _outside(box: Any, frame: Any) -> float:
    """Area of a box that is not in the frame."""
    return float(box.width * box.height) - _overlap(box, frame)
