"""Which linear gives up bytes next: the best trade of loss for bytes, all along the way.

Every linear has options of (bytes, loss). On the lower convex hull of each, the steps from its
largest option to its smallest cost more and more loss per byte saved. Taking all linears' steps
in order of that price gives a path on which every point has the least total loss of all choices of
no more bytes than its own: the relaxed knapsack, solved for every budget at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """One way to store a linear. `loss` is predicted, in nats per token, 0 for the dense weight.

    `error` is the layer's relative error on held-out inputs.
    """

    format: str
    bytes: int
    loss: float
    error: float = 0.0


@dataclass(frozen=True)
class Step:
    """One linear goes from one format to a smaller one."""

    linear: str
    before: Option
    after: Option

    @property
    def saved(self) -> int:
        """Bytes; above 0."""
        return self.before.bytes - self.after.bytes

    @property
    def cost(self) -> float:
        """Additional loss; at least 0."""
        return self.after.loss - self.before.loss

    @property
    def price(self) -> float:
        """Loss per byte saved."""
        return self.cost / self.saved


@dataclass(frozen=True)
class Path:
    """From everything at its best to everything at its smallest.

    Point `i` is what the first `i` of `steps` lead to; `bytes` falls and `loss` rises with `i`.
    """

    start: Mapping[str, Option]
    steps: tuple[Step, ...]
    bytes: tuple[int, ...]
    loss: tuple[float, ...]

    def chosen(self, point: int) -> dict[str, Option]:
        """The option of every linear at a point."""
        chosen = dict(self.start)
        chosen.update({step.linear: step.after for step in self.steps[:point]})
        return chosen


def find_path(options: Mapping[str, Sequence[Option]]) -> Path:
    """The path of least loss. Ties go by name, so equal inputs give equal paths."""
    hulls = {name: lower_hull(those) for name, those in sorted(options.items())}
    steps = sorted(
        (step for name, hull in hulls.items() for step in _steps(name, hull)),
        key=lambda step: (step.price, step.linear, -step.before.bytes),
    )
    start = {name: hull[0] for name, hull in hulls.items()}
    sizes = [sum(option.bytes for option in start.values())]
    losses = [sum(option.loss for option in start.values())]
    for step in steps:
        sizes.append(sizes[-1] - step.saved)
        losses.append(losses[-1] + step.cost)
    return Path(start, tuple(steps), tuple(sizes), tuple(losses))


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options that are best at some price, by falling bytes and rising loss."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda each: (-each.bytes, each.loss, each.format)):
        if hull and option.bytes == hull[-1].bytes:
            continue
        while hull and option.loss <= hull[-1].loss:
            hull.pop()
        while len(hull) > 1 and _price(hull[-1], option) <= _price(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def within(path: Path, limit: int) -> dict[str, Option] | None:
    """Options of at most `limit` bytes in all: the path's first point that fits, then filled up.

    What the last step saved too much is spent on undoing earlier-priced steps that still fit, the
    dearest first. None when even the last point is too large.
    """
    point = next((i for i, size in enumerate(path.bytes) if size <= limit), None)
    if point is None:
        return None
    chosen, left = path.chosen(point), limit - path.bytes[point]
    for step in reversed(path.steps[:point]):
        if chosen[step.linear] == step.after and step.saved <= left:
            chosen[step.linear] = step.before
            left -= step.saved
    return chosen


def _steps(name: str, hull: Sequence[Option]) -> Iterator[Step]:
    for before, after in pairwise(hull):
        yield Step(name, before, after)


def _price(before: Option, after: Option) -> float:
    return (after.loss - before.loss) / (before.bytes - after.bytes)
