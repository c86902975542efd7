"""Two measurements of the same thing do not differ; a planted slow-down is found."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from halfweave.bench.compare import NO_CHANGE, compare
from halfweave.bench.document import read_document
from halfweave.bench.significance import holm, least_p, rank_p, shift
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


def offline(dice: np.random.Generator, slower: float = 1.0, repetitions: int = 7) -> Document:
    """Two models and five batches; times of the second one are `slower` times as long."""
    drift = float(np.exp(dice.normal(0, 0.01)))  # of the whole run
    models = []
    for name, factor in (("dense", drift), ("sparse", drift * slower)):

        def times(base: float, factor: float = factor) -> list[float]:
            return [base * factor * each for each in noise(dice, repetitions)]

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
        models.append({"name": name, "digest": name, "samples": samples, "batches": batches})
    return {**about("offline", repetitions), "models": models}


def kernel(dice: np.random.Generator, slower: float = 1.0, moved: float = 0.2) -> Document:
    """On a machine that is up to `moved` slower or faster in each run, for all products alike."""
    machine, rows = float(np.exp(dice.uniform(-moved, moved))), []
    for n in (64, 128, 256):
        for m in (1, 2, 4, 8, 16, 32, 64, 128, 512):
            ours, theirs = (
                [n * m * machine * factor * each for each in noise(dice, 11)]
                for factor in (slower, 1.2)
            )
            row = {"format": "sparse24_int4", "N": n, "K": 64, "M": m, "samples_us": ours}
            rows.append({**row, "others": {"int4": {"samples_us": theirs}}})
    return {**about("kernel", 11), "rows": rows}


def serve(dice: np.random.Generator, slower: float = 1.0, repetitions: int = 7) -> Document:
    points = []
    for rate in (1.0, 2.0):
        samples = [
            {
                "repetition": repetition,
                "outcome": "completed",
                "ttft_ms": 50 * slower * own * dice.lognormal(0, 0.2),
                "tpot_ms": 10 * slower * own * dice.lognormal(0, 0.02),
                "e2e_ms": 700 * slower * own * dice.lognormal(0, 0.05),
            }
            for repetition, own in enumerate(noise(dice, repetitions))
            for _ in range(32)
        ]
        samples.append({"repetition": 0, "outcome": "refused", "ttft_ms": None})
        points.append({"model": "x", "mode": "open", "rate": rate, "samples": samples})
    return {**about("serve", repetitions), "points": points}


@pytest.mark.parametrize("make", [offline, kernel, serve])
def test_two_runs_of_the_same_thing_do_not_differ_in_nine_of_ten_repeats(make: Any) -> None:
    """And a run that is 10 % slower is found to be, in as many."""
    same = [
        compare(make(dice), make(dice)).verdict for dice in map(np.random.default_rng, range(50))
    ]
    assert same.count(NO_CHANGE) >= 48
    slow = [
        compare(make(dice), make(dice, slower=1.10)).verdict
        for dice in map(np.random.default_rng, range(50))
    ]
    assert slow.count("slower") >= 45
    quick = compare(make(np.random.default_rng(0)), make(np.random.default_rng(1), slower=0.8))
    assert quick.verdict == "faster"


def test_details_are_marked_but_do_not_decide() -> None:
    """A machine that became another one moves times, not what they are relative to."""
    dice = np.random.default_rng(3)
    found = compare(kernel(dice, moved=0), {**kernel(dice, slower=1.3, moved=0)})
    assert found.verdict == "slower"
    slow_machine = kernel(dice, moved=0)
    for row in slow_machine["rows"]:
        for samples in (row["samples_us"], row["others"]["int4"]["samples_us"]):
            samples[:] = [1.3 * each for each in samples]
    moved = compare(kernel(dice, moved=0), slow_machine)
    assert moved.verdict == NO_CHANGE
    assert {each.name for each in moved.changes if each.main} == {"all products, to dense int4"}
    assert any(each.verdict == "slower" for each in moved.changes if not each.main)


def test_without_dense_int4_beside_times_decide() -> None:
    dice = np.random.default_rng(4)
    both = kernel(dice, moved=0), kernel(dice, slower=1.2, moved=0)
    for document in both:
        for row in document["rows"]:
            del row["others"]
    assert compare(*both).verdict == "slower"


def test_five_repetitions_suffice_for_the_main_quantities() -> None:
    dice = np.random.default_rng(2)
    found = compare(offline(dice, 1.0, 5), offline(dice, 2.0, 5))
    slower = {change.name for change in found.changes if change.verdict == "slower"}
    assert slower == {"sparse: decode", "sparse: prefill"}
    assert any("nothing can be found in the details, which are 22" in n for n in found.notes)


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
    (change,) = [each for each in found.changes if each.verdict == "slower"]
    assert change.name == "sparse: decode"
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


# ---- the statistics


def test_p_is_the_share_of_all_ways_to_deal_out_the_ranks() -> None:
    """Five below five: 2 of 252 ways; scipy.stats.mannwhitneyu says the same of the others."""
    low, high = [1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0]
    assert rank_p(low, high) == pytest.approx(2 / 252) == least_p(5, 5)
    assert rank_p(high, low) == pytest.approx(2 / 252)
    assert rank_p([1.0, 3.0, 5.0, 7.0], [2.0, 4.0, 6.0, 8.0, 9.0]) == pytest.approx(0.4126984)
    assert rank_p(low, low) == 1.0  # ties
    assert rank_p([1.0], [2.0]) == 1.0


def test_a_floor_is_tested_for_not_cut_off() -> None:
    """Apart, but not surely by more than the floor: the values overlap when it is taken away."""
    first, second = [1.0, 1.01, 1.02, 1.03], [1.04, 1.05, 1.06, 1.07]
    assert shift(first, second).p == pytest.approx(least_p(4, 4))
    assert shift(first, second, 0.03).p > 0.2
    assert shift(first, second, 0.05).p == 1.0
    assert shift(second, first, 0.03).p == pytest.approx(shift(first, second, 0.03).p)


def test_the_shift_is_the_median_ratio_and_lies_in_its_interval() -> None:
    found = shift([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    assert found.ratio == pytest.approx(2.0)
    dice = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        a, b = dice.lognormal(0, 0.1, 7), 1.2 * dice.lognormal(0, 0.1, 7)
        each = shift(list(a), list(b))
        inside += each.low <= 1.2 <= each.high
        assert each.low <= each.ratio <= each.high
    assert inside >= 184  # 95 % of 200, less three times the spread of that


def test_holm_rejects_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


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
    assert json.loads(last)["verdict"] == "no significant change"
    assert all(len(line) <= 100 for line in table)
    slow = halfweave("bench", "--compare", paths[0], paths[2], "--json").document
    assert slow["verdict"] == "slower"
    assert len(slow["changes"]) == 26
    ran = halfweave("bench", "--compare", paths[0], tmp_path / "none.json")
    assert_error(ran, 2, "none.json is missing")
