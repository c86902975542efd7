"""Whether two measurements of the same thing differ, and by how much.

Repetitions are what is sampled, never tokens or requests, which depend on each other. A change
counts if it is beyond chance (significance.py) and beyond a floor, because two runs on one machine
differ by a little that repetitions within a run do not show. The test is of the floor itself, so
that among many quantities none gets over it by chance.

What was measured beside its baseline, in turns, is judged by its ratio to that, turn by turn. Times
and speeds by themselves decide only where a document has no such ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import RefusedError, UsageError
from .across import LEAST_PARTS, shift_across
from .metrics import Metric, load, metrics
from .quiet import BUSY, KEPT
from .significance import ALPHA, Shift, holm, least_p, shift, variance_inflation

NO_CHANGE = "no significant change"
FLOOR = 0.03
# Of hardware what may differ between two runs on one machine; of a plan what changes no quantity.
_MAY_DIFFER = {"hardware": ("load",), "plan": ("repetitions", "seed")}


@dataclass(frozen=True)
class Change:
    """One quantity in both documents: medians, and the second over the first.

    `relative` ones are ratios to the baseline of the same turn. `p` is corrected for all tests of
    its family; `verdict` is faster, slower or "no significant change".
    """

    name: str
    unit: str
    main: bool
    relative: bool
    first: float
    second: float
    repetitions: tuple[int, int]
    shift: Shift
    p: float
    verdict: str
    decides: bool


@dataclass(frozen=True)
class Comparison:
    """All changes, and one word for those that decide: faster, slower, mixed or `NO_CHANGE`.

    `relative` is whether these are ratios to the baseline of the same turn.
    """

    verdict: str
    relative: bool
    floor: float
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As it is printed."""
        return {"kind": "compare", "alpha": ALPHA, **asdict(self)}


def compare(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    floor: float = FLOOR,
    even_if_different: bool = False,
) -> Comparison:
    """Compare two documents; changes of less than the share `floor` count as none.

    Raises:
        RefusedError: they are not of the same thing, and that was not allowed.
        UsageError: they have nothing in common, or are not as described.
    """
    try:
        differences = _differences(first, second)
        notes = [*differences, *_busy_notes(first, second), *_lost_notes(first, second)]
        ours, theirs = metrics(first), {metric.name: metric for metric in metrics(second)}
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UsageError(f"a measurement is not as it was written: {error!r}"[:300]) from error
    if differences and (not even_if_different or first["kind"] != second["kind"]):
        raise RefusedError(
            f"these measurements are not of the same thing: {'; '.join(differences)}",
            None if first["kind"] != second["kind"] else "--even-if-different compares them",
        )
    pairs = [
        (metric, theirs[metric.name])
        for metric in ours
        if metric.name in theirs and metric.parts.keys() == theirs[metric.name].parts.keys()
    ]
    if not pairs:
        raise UsageError("these measurements have no quantity in common")
    relative = any(metric.relative and metric.decides for metric, _ in pairs)
    changes = _changes(pairs, floor, relative)
    deciding = [change for change in changes if change.decides]
    notes += _power_notes(deciding)
    if left := len(ours) + len(theirs) - 2 * len(pairs):
        notes.append(f"{left} quantities are in one of the two only")
    return Comparison(_overall(deciding), relative, floor, tuple(changes), tuple(notes))


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What makes two documents measurements of different things, in words."""
    if first["kind"] != second["kind"]:
        return [f"kind {first['kind']} and {second['kind']}"]
    found = []
    for part in ("hardware", "plan"):
        a, b = first.get(part) or {}, second.get(part) or {}
        ignored = _MAY_DIFFER[part]
        for name in sorted((a.keys() | b.keys()) - set(ignored)):
            if a.get(name) != b.get(name):
                found.append(f"{part} {name} {_short(a.get(name))} and {_short(b.get(name))}")
    a, b = first.get("model") or {}, second.get("model") or {}
    if a.get("digest") != b.get("digest"):
        found.append(f"model {_short(a.get('name'))} and {_short(b.get('name'))}, by their files")
    ours, theirs = _digests(first), _digests(second)
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] != theirs[name]:
            found.append(f"{_short(name)}, by its files")
    return found


def _digests(document: Mapping[str, Any]) -> dict[str, Any]:
    """Of all models that were measured together; the baseline is one whatever its name."""
    return {
        "dense baseline" if each.get("is_baseline") else f"model {each.get('name')}": each.get(
            "digest"
        )
        for each in document.get("models") or ()
    }


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _changes(pairs: list[tuple[Metric, Metric]], floor: float, relative: bool) -> list[Change]:
    """Of all pairs; p is corrected apart for each form, and in it for what matters most."""
    found: dict[int, Change] = {}
    for form in (True, False):
        of_form = [(i, *pair) for i, pair in enumerate(pairs) if pair[0].relative == form]
        inflation = variance_inflation([each.values for _, *pair in of_form for each in pair])
        for main in (True, False):
            family = [member for member in of_form if member[1].main == main]
            shifts = [_shift(ours, theirs, floor, inflation) for _, ours, theirs in family]
            ps = holm([each.p for each in shifts])
            for (index, ours, theirs), each, p in zip(family, shifts, ps, strict=True):
                found[index] = _change(ours, theirs, each, p, ours.decides and form == relative)
    return [found[index] for index in range(len(pairs))]


def _shift(ours: Metric, theirs: Metric, floor: float, inflation: float) -> Shift:
    """Over the repetitions; of what has parts, over these too: it must be beyond chance in both."""
    found = shift(ours.values, theirs.values, floor, inflation)
    if len(ours.parts) < LEAST_PARTS:
        return found
    names = list(ours.parts)
    across = shift_across(
        [ours.parts[name] for name in names], [theirs.parts[name] for name in names], floor
    )
    return replace(across, p=max(across.p, found.p))


def _change(ours: Metric, theirs: Metric, found: Shift, p: float, decides: bool) -> Change:
    return Change(
        ours.name,
        ours.unit,
        ours.main,
        ours.relative,
        statistics.median(ours.values),
        statistics.median(theirs.values),
        (len(ours.values), len(theirs.values)),
        found,
        p,
        _verdict(found, p, ours.more_is_better),
        decides,
    )


def _verdict(found: Shift, p: float, more_is_better: bool) -> str:
    if p > ALPHA:
        return NO_CHANGE
    return "faster" if (found.ratio > 1) == more_is_better else "slower"


def _overall(changes: list[Change]) -> str:
    found = {change.verdict for change in changes} - {NO_CHANGE}
    if not found:
        return NO_CHANGE
    return found.pop() if len(found) == 1 else "mixed"


def _busy_notes(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What of the machine may be the difference: others at work, or other cores."""
    kept = [
        [str(note) for note in each.get("notes") or () if str(note).startswith(KEPT)]
        for each in (first, second)
    ]
    moved = [f"A: {kept[0][0]}, B: {kept[1][0]}"] if all(kept) and kept[0] != kept[1] else []
    return moved + [
        f"{name}: {note}; what differs may be that"
        for name, document in (("A", first), ("B", second))
        for note in document.get("notes") or ()
        if str(note).startswith(BUSY)
    ]


def _lost_notes(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Loads of which not all requests were answered: times are of the others, who had the room."""
    notes = []
    for name, document in (("A", first), ("B", second)):
        for point in document.get("points") or ():
            outcomes = [sample["outcome"] for sample in point["samples"]]
            answered = outcomes.count("completed")
            if answered < len(outcomes):
                notes.append(
                    f"{name}: {_short(point['model'])}, {load(point)}: {answered} of "
                    f"{len(outcomes)} requests were answered, and only these have times"
                )
    return notes


def _power_notes(changes: list[Change]) -> list[str]:
    notes = []
    for main, title in ((True, "the main quantities"), (False, "the details")):
        family = [change for change in changes if change.main == main]
        if family and min(least_p(*each.repetitions) for each in family) * len(family) > ALPHA:
            notes.append(
                f"with so few repetitions nothing can be found in {title}, which are "
                f"{len(family)}: measure with more --repetitions"
            )
    return notes
