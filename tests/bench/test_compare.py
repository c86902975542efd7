"""Two measurements of the same thing do not differ; a planted slow-down is found."""

from __future__ import annotations

import copy
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from halfweave.bench.compare import NO_CHANGE, compare
from halfweave.bench.document import read_document
from halfweave.errors import RefusedError, UsageError
from support.command import Command, assert_error

Document = dict[str, Any]
HARDWARE = {"cpu": "a", "cores": 2, "threads": 2, "memory_bytes": 1, "load": 0.1, "gpu": None}


def about(kind: str, repetitions: int) -> Document:
    return {
        "schema_version": 2,
        "kind": kind,
        "hardware": dict(HARDWARE),
        "model": {"path": "x", "name": "x", "digest": "d"},
        "plan": {"repetitions": repetitions, "prompt_tokens": 64},
    }


def noise(dice: np.random.Generator, count: int) -> list[float]:
    """Of a shared machine: 2 % from repetition to repetition, and now and then a neighbour."""
    values = np.exp(dice.normal(0, 0.02, count))
    return list(values * np.where(dice.random(count) < 0.08, 1.3, 1.0))


def wander(dice: np.random.Generator, turns: int) -> list[float]:
    """How slow a shared machine is in each turn: up to 1.5 times, and 5 % from one to the next."""
    return list(np.exp(dice.uniform(-0.2, 0.2) + np.cumsum(dice.normal(0, 0.05, turns))))


def offline(
    dice: np.random.Generator,
    slower: float = 1.0,
    repetitions: int = 7,
    machine: Sequence[float] | None = None,
) -> Document:
    """Dense and pruned, two batches; times of the pruned one are `slower` times as long.

    `machine` is how slow all of it is, by turn.
    """
    turns = [1.0] * repetitions if machine is None else machine
    models = []
    for name, factor in (("dense", 1.0), ("sparse", slower)):

        def times(base: float, factor: float = factor) -> list[float]:
            own = noise(dice, repetitions)
            return [base * factor * turn * each for turn, each in zip(turns, own, strict=True)]

        gaps, prefill, ttft = times(10.0), times(300.0), times(310.0)
        batches = [
            {
                "batch": batch,
                "samples": [
                    {"prefill_s": a, "decode_s": b, "decode_tokens": 100}
                    for a, b in zip(times(0.3), times(1.0), strict=True)
                ],
            }
            for batch in (1, 2, 4, 8, 16)
        ]
        samples = [
            {"gaps_ms": [g, g], "gap_tokens": [1, 1], "prefill_ms": p, "ttft_ms": t}
            for g, p, t in zip(gaps, prefill, ttft, strict=True)
        ]
        measured = {"samples": samples, "batches": batches, "is_baseline": name == "dense"}
        models.append({"name": name, "digest": name, **measured})
    return {**about("offline", repetitions), "models": models}


def kernel(
    dice: np.random.Generator,
    slower: float = 1.0,
    repetitions: int = 11,
    machine: Sequence[float] | None = None,
    elsewhere: float = 0.0,
) -> Document:
    """Products of a few tokens come to lie `elsewhere` in every run, others a quarter as much."""
    turns = [1.0] * repetitions if machine is None else machine
    state, rows = dice.normal(0, elsewhere / 5), []
    for n in (64, 128, 256):
        for m in (1, 2, 4, 8, 16, 32, 64, 128, 512):
            own = float(np.exp(state + dice.normal(0, elsewhere if m < 16 else elsewhere / 4)))
            ours, theirs = (
                [
                    n * m * factor * turn * each
                    for turn, each in zip(turns, noise(dice, repetitions), strict=True)
                ]
                for factor in (slower * own, 1.2)
            )
            row = {"format": "sparse24_int4", "N": n, "K": 64, "M": m, "samples_us": ours}
            rows.append({**row, "others": {"int4": {"samples_us": theirs}}})
    return {**about("kernel", repetitions), "rows": rows}


def serve(
    dice: np.random.Generator,
    slower: float = 1.0,
    repetitions: int = 7,
    machine: Sequence[float] | None = None,
) -> Document:
    """Two loads on a dense and a pruned model."""
    turns = [1.0] * repetitions if machine is None else machine
    points = []
    for rate, (name, factor) in itertools.product((1.0, 2.0), (("dense", 1.0), ("sparse", slower))):
        rounds = [
            factor * turn * each for turn, each in zip(turns, noise(dice, repetitions), strict=True)
        ]
        samples = [
            {
                "repetition": repetition,
                "outcome": "completed",
                "ttft_ms": 50 * own * dice.lognormal(0, 0.2),
                "tpot_ms": 10 * own * dice.lognormal(0, 0.02),
                "e2e_ms": 700 * own * dice.lognormal(0, 0.05),
            }
            for repetition, own in enumerate(rounds)
            for _ in range(32)
        ]
        samples.append({"repetition": 0, "outcome": "refused", "ttft_ms": None})
        points.append({"model": name, "mode": "open", "rate": rate, "samples": samples})
    models = [
        {"name": name, "digest": name, "is_baseline": name == "dense"}
        for name in ("dense", "sparse")
    ]
    return {**about("serve", repetitions), "models": models, "points": points}


MAKERS = pytest.mark.parametrize(
    ("make", "turns"), [(offline, 7), (kernel, 11), (serve, 13)], ids=["offline", "kernel", "serve"]
)


@MAKERS
def test_two_runs_of_the_same_thing_do_not_differ_in_nine_of_ten_repeats(
    make: Any, turns: int
) -> None:
    """Although all of the machine is 30 % slower in the second, and drifts in both.

    And where the pruned model alone is 10 % slower, that is found in as many.
    """
    same, slow = [], []
    for dice in map(np.random.default_rng, range(50)):
        first = make(dice, 1.0, turns, wander(dice, turns))
        machine = [1.3 * turn for turn in wander(dice, turns)]
        same.append(compare(first, make(dice, 1.0, turns, machine)).verdict)
        slow.append(compare(first, make(dice, 1.1, turns, machine)).verdict)
    assert same.count(NO_CHANGE) >= 45
    assert slow.count("slower") >= 45
    dice = np.random.default_rng(0)
    quick = compare(make(dice, 1.0, turns), make(dice, 0.8, turns, [1.3] * turns))
    assert (quick.verdict, quick.relative) == ("faster", True)


@MAKERS
def test_without_a_baseline_in_both_times_decide(make: Any, turns: int) -> None:
    dice = np.random.default_rng(4)
    first, slow = make(dice, 1.0, turns), make(dice, 1.25, turns)
    for alone in (without_baseline(first), without_baseline(slow)):
        assert compare(alone, alone).verdict == NO_CHANGE
        assert not compare(alone, alone).relative
    for one, other in ((without_baseline(first), slow), (first, without_baseline(slow))):
        found = compare(one, other)
        assert (found.verdict, found.relative) == ("slower", False)
        assert all(each.decides and not each.relative for each in found.changes)


def without_baseline(document: Document) -> Document:
    """As it is written where nothing dense was measured in turns with it."""
    alone = copy.deepcopy(document)
    for model in alone.get("models", ()):
        model["is_baseline"] = False
    for row in alone.get("rows", ()):
        del row["others"]
    return alone


def test_times_are_marked_but_do_not_decide_where_there_are_ratios() -> None:
    """A machine that became another one moves times, not what they are relative to."""
    dice = np.random.default_rng(3)
    moved = compare(offline(dice), offline(dice, machine=[1.5] * 7))
    assert moved.verdict == NO_CHANGE
    assert {each.name for each in moved.changes if each.main and each.relative} == {
        "sparse: decode, to dense",
        "sparse: prefill, to dense",
    }
    slower = [each for each in moved.changes if each.verdict == "slower"]
    assert len(slower) == 26
    assert not any(each.decides or each.relative for each in slower)


def test_a_ratio_is_of_the_same_turn() -> None:
    """A turn in which the whole machine was five times as slow is a turn like the others."""
    quiet = np.random.default_rng(5)
    first, second = offline(quiet), offline(quiet, machine=[1, 5, 1, 5, 1, 5, 1])
    (decode,) = [
        each for each in compare(first, second).changes if each.name == "sparse: decode, to dense"
    ]
    assert decode.shift.ratio == pytest.approx(1.0, abs=0.03)
    assert decode.shift.high / decode.shift.low < 1.5
    dense, sparse = (m["samples"] for m in first["models"])
    ratios = [d["gaps_ms"][0] / s["gaps_ms"][0] for d, s in zip(dense, sparse, strict=True)]
    assert decode.first == pytest.approx(statistics.median(ratios))


def test_rounds_are_paired_by_their_number() -> None:
    """A round in which nothing was answered is missing on one side, and shifts no other one."""
    dice = np.random.default_rng(6)
    first = serve(dice, machine=[1, 2, 3, 4, 5, 6, 7])
    holed = copy.deepcopy(first)
    for sample in holed["points"][0]["samples"]:
        if sample["repetition"] == 2:
            sample.update(outcome="failed", ttft_ms=None, tpot_ms=None, e2e_ms=None)
    ratio = next(each for each in compare(first, holed).changes if each.relative)
    assert ratio.name == "sparse, 1 req/s: E2E, to dense"
    assert ratio.repetitions == (7, 6)
    assert ratio.shift.ratio == pytest.approx(1.0, abs=0.05)


def test_requests_that_were_lost_are_told_of() -> None:
    dice = np.random.default_rng(6)
    first = serve(dice)
    for point in first["points"]:
        point["samples"] = [each for each in point["samples"] if each["outcome"] == "completed"]
    assert not any("answered" in note for note in compare(first, first).notes)
    second = copy.deepcopy(first)
    for sample in second["points"][1]["samples"][:31]:  # but one of the first round
        sample.update(outcome="refused", ttft_ms=None, tpot_ms=None, e2e_ms=None)
    (note,) = [note for note in compare(first, second).notes if "answered" in note]
    assert note.startswith("B: sparse, 1 req/s: 193 of 224 requests were answered")


def test_some_products_that_came_to_lie_elsewhere_are_no_change_of_all() -> None:
    """Repetitions within a run agree on it, so they alone would be sure."""
    dice = np.random.default_rng(7)
    first, second = kernel(dice), kernel(dice)
    for document in (first, second):
        document["rows"] = document["rows"][:4]
    for row in second["rows"][:3]:
        row["samples_us"] = [1.15 * each for each in row["samples_us"]]
    found = compare(first, second)
    assert found.verdict == NO_CHANGE
    assert sum(each.verdict == "slower" and each.relative for each in found.changes) == 3


def test_products_that_lie_elsewhere_in_every_run_are_no_change() -> None:
    """As measured on a shared machine: 8 % for few tokens, 2 % for more, 1.6 % for all alike."""
    same, slow = [], []
    for dice in map(np.random.default_rng, range(50)):
        first = kernel(dice, elsewhere=0.08)
        same.append(compare(first, kernel(dice, elsewhere=0.08)).verdict)
        slow.append(compare(first, kernel(dice, 1.1, elsewhere=0.08)).verdict)
    assert same.count(NO_CHANGE) >= 45
    assert slow.count("slower") >= 40


def test_five_repetitions_suffice_for_the_main_quantities() -> None:
    dice = np.random.default_rng(2)
    found = compare(offline(dice, 1.0, 5), offline(dice, 2.0, 5))
    slower = {change.name for change in found.changes if change.verdict == "slower"}
    main = {"sparse: decode, to dense", "sparse: prefill, to dense"}
    assert slower == main | {"sparse: decode", "sparse: prefill"}
    assert any("nothing can be found in the details, which are 11" in n for n in found.notes)


def test_a_consistent_change_below_the_floor_is_none() -> None:
    first = offline(np.random.default_rng(1))
    for model in first["models"]:
        model["samples"] = [copy.deepcopy(model["samples"][0]) for _ in range(7)]
    second = copy.deepcopy(first)
    for sample in second["models"][1]["samples"]:
        sample["gaps_ms"] = [1.02 * gap for gap in sample["gaps_ms"]]
    assert compare(first, second).verdict == NO_CHANGE
    found = compare(first, second, floor=0.01)
    assert found.verdict == "slower"
    change, absolute = [each for each in found.changes if each.verdict == "slower"]
    assert (change.name, absolute.name) == ("sparse: decode, to dense", "sparse: decode")
    assert change.shift.ratio == pytest.approx(1 / 1.02)


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("hardware", "cpu", "b", "hardware cpu a and b"),
        ("plan", "prompt_tokens", 65, "plan prompt_tokens 64 and 65"),
        ("model", "digest", "e", "model x and x, by their files"),
    ],
)
def test_measurements_of_different_things_are_not_compared(
    part: str, name: str, value: object, said: str
) -> None:
    first = offline(np.random.default_rng(1))
    other = copy.deepcopy(first)
    other[part][name] = value
    with pytest.raises(RefusedError, match=said) as caught:
        compare(first, other)
    assert caught.value.exit_code == 3
    found = compare(first, other, even_if_different=True)
    assert any(said in note for note in found.notes)


@pytest.mark.parametrize("make", [offline, serve])
def test_ratios_to_different_baselines_are_not_compared(make: Any) -> None:
    first = make(np.random.default_rng(1))
    other = copy.deepcopy(first)
    other["models"][0].update(name="another", digest="another")
    for point in other.get("points", ()):
        point["model"] = point["model"].replace("dense", "another")
    with pytest.raises(RefusedError, match="dense baseline, by its files"):
        compare(first, other)


def test_another_load_or_number_of_repetitions_is_the_same_thing() -> None:
    dice = np.random.default_rng(1)
    first, second = offline(dice), offline(dice, repetitions=9)
    second["hardware"]["load"] = 0.4
    assert compare(first, second).changes[0].repetitions == (7, 9)


def test_a_busy_machine_is_told_of() -> None:
    dice = np.random.default_rng(1)
    first, second = offline(dice), offline(dice)
    assert not any("busy" in note for note in compare(first, second).notes)
    second["notes"] = ["the machine was busy before the run: load 3"]
    assert any(note.startswith("B: the machine was busy") for note in compare(first, second).notes)


def test_other_cores_are_told_of() -> None:
    dice = np.random.default_rng(1)
    first, second = offline(dice), offline(dice)
    first["notes"], second["notes"] = (["threads were kept to CPUs 0"] for _ in range(2))
    assert not any("CPUs" in note for note in compare(first, second).notes)
    second["notes"] = ["threads were kept to CPUs 1"]
    assert any("CPUs 0, B: threads were kept to CPUs 1" in n for n in compare(first, second).notes)


def test_different_kinds_are_never_compared() -> None:
    dice = np.random.default_rng(1)
    with pytest.raises(RefusedError, match="kind offline and kernel"):
        compare(offline(dice), kernel(dice), even_if_different=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.update(hardware=[1]),
        lambda d: d.update(plan="x"),
        lambda d: d.update(notes=7),
        lambda d: d.update(models=[]),
        lambda d: d["models"][0].pop("name"),
        lambda d: d["models"][1].update(samples=[]),
        lambda d: d["models"][1]["samples"][0].update(prefill_ms=math.nan),
        lambda d: d["models"][1]["samples"][0].update(gaps_ms="x"),
        lambda d: d["models"][1]["samples"][0].update(gaps_ms=[0, 0]),
        lambda d: d["models"][1]["batches"][0]["samples"][0].update(decode_s=1e-320),
    ],
)
def test_whatever_is_damaged_is_one_error(spoil: Any) -> None:
    first = offline(np.random.default_rng(1))
    damaged = copy.deepcopy(first)
    spoil(damaged)
    for pair in ((first, damaged), (damaged, first)):
        with pytest.raises((UsageError, RefusedError)):
            compare(*pair)


def test_damaged_documents_are_refused(tmp_path: Path) -> None:
    first = offline(np.random.default_rng(1))
    damaged = copy.deepcopy(first)
    damaged["models"][0]["samples"][0]["prefill_ms"] = 0
    with pytest.raises(UsageError, match="not as it was written"):
        compare(first, damaged)
    for content in ("{}", '{"schema_version": 1, "kind": "offline"}', "[]", "no json"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UsageError):
            read_document(tmp_path / "x.json")


# ---- the command


def test_compare_prints_changes_and_ends_with_a_json_line(
    halfweave: Command, tmp_path: Path
) -> None:
    dice, paths = np.random.default_rng(3), []
    for number, slower in enumerate((1.0, 1.0, 1.3)):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(offline(dice, slower)))
    same = halfweave("bench", "--compare", paths[0], paths[1])
    assert same.code == 0
    *table, last = same.out.splitlines()
    assert table[-1] == "no significant change"
    assert any(line.startswith("judged by ratios to the dense baseline") for line in table)
    assert json.loads(last)["verdict"] == "no significant change"
    assert all(len(line) <= 100 for line in table)
    slow = halfweave("bench", "--compare", paths[0], paths[2], "--json").document
    assert slow["verdict"] == "slower"
    assert len(slow["changes"]) == 39
    hostile = json.loads(paths[0].read_text())
    for at, model in enumerate(hostile["models"]):
        model["name"] = f"\ud800 \x1b[31m{at}"
    paths[1].write_text(json.dumps(hostile))
    strange = halfweave("bench", "--compare", paths[1], paths[1])
    assert strange.code == 0 and "\x1b" not in strange.out
    assert json.loads(strange.out.splitlines()[-1])["changes"][0]["name"].startswith("\\ud800")
    ran = halfweave("bench", "--compare", paths[0], tmp_path / "none.json")
    assert_error(ran, 2, "none.json is missing")
