"""The quality table: its rows and keys, its page, and one row run for real on a tiny model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import quality
import quality_measure
from quality_cache import entry
from quality_page import to_markdown
from quality_rows import (
    COLUMNS,
    HEADLINES,
    Column,
    Row,
    all_rows,
    chosen,
    curve_rows,
    start_of,
)

# One long paragraph whose last word was there before: a thing to guess for last_word.py as well.
TEXT = "Two foxes keep every fourth weight and nobody minds the lazy zero, or the riddles. " * 80


def test_the_headline_comes_first_and_no_row_twice() -> None:
    rows = all_rows(30)
    first = [row.label for row in rows[:4]]
    assert first == ["sparsegpt:2:4:16", "admm:2:4:16", "sparsegpt:2:4:4", "admm:2:4:4"]
    assert len(set(rows)) == len(rows)
    assert len({(row.label, row.seed) for row in rows}) == len(rows)


def test_all_columns_have_all_methods_and_recoveries() -> None:
    for column in COLUMNS:
        ways = {(row.method, row.recover) for row in all_rows(30) if row.column == column}
        wanda = set() if column.pattern == "dense" else {("wanda", "none")}
        trained = {("sparsegpt", "distill")} if column in HEADLINES else set()
        hour = {("admm", "blocks+distill")} if column == HEADLINES[1] else set()
        assert ways == wanda | trained | hour | {
            ("magnitude", "none"),
            ("sparsegpt", "none"),
            ("admm", "none"),
            ("admm", "blocks"),
            ("admm", "distill"),
        }


def test_both_methods_are_trained_equally_long_and_asides_shorter() -> None:
    trained = [row for row in all_rows(30) if row.recover == "distill"]
    assert {row.minutes for row in trained if row.column in HEADLINES} == {30}
    assert {row.minutes for row in trained if row.column not in HEADLINES} == {7.5}
    assert {row.minutes for row in all_rows(30) if "distill" not in row.recover} == {0}


def test_the_best_of_an_hour_has_flags_of_its_own_and_words_of_every_run() -> None:
    runs = [row for row in all_rows(30) if row.recover == "blocks+distill"]
    assert [(row.seed, row.minutes, row.asks_words) for row in runs] == [
        (seed, 28, True) for seed in (0, 1, 2)
    ]
    hour = quality_measure.prune_flags(runs[0], SETTINGS)
    plain = quality_measure.prune_flags(Row("admm", HEADLINES[1]), SETTINGS)
    changed = {name: value for name, value in hour.items() if plain.get(name) != value}
    assert changed == {
        "calib-windows": 256,
        "recover": "blocks+distill",
        "recover-minutes": 28,
        "block-epochs": 1,
        "recover-rate": 2e-3,
        "recover-ce": 1,
    }


def test_rows_are_chosen_by_label_and_seed() -> None:
    rows = all_rows(30)
    assert [row.seed for row in chosen(rows, ["admm:2:4:4"], (0, 1, 2))] == [0, 1, 2]
    recovered = chosen(rows, ["admm:2:4:4:*"], (0,))
    assert {row.label for row in recovered} == {
        "admm:2:4:4:blocks",
        "admm:2:4:4:blocks+distill",
        "admm:2:4:4:distill",
    }
    assert [row.max_ppl_ratio for row in chosen(rows, ["*:budget"], (0,))] == [1.15]
    assert chosen(rows, [], (0, 1, 2)) == rows


def test_the_curve_begins_with_the_row_that_does_not_recover() -> None:
    rows = curve_rows("admm:2:4:4:distill", [0, 5])
    assert [(row.label, row.minutes) for row in rows] == [
        ("admm:2:4:4", 0),
        ("admm:2:4:4:distill", 5),
    ]
    with pytest.raises(ValueError, match="no distilled row"):
        curve_rows("admm:2:4:4", [5])


def test_figures_of_another_key_are_never_read(tmp_path: Path) -> None:
    kept = entry(tmp_path, "row", "eval", {"windows": 8})
    kept.write({"ppl": 2.0})
    assert kept.read() == {"ppl": 2.0}
    assert entry(tmp_path, "row", "eval", {"windows": 9}).read() is None
    forged = entry(tmp_path, "row", "eval", {"windows": 9})
    kept.path.rename(forged.path)
    with pytest.raises(ValueError, match="another key"):
        forged.read()


SETTINGS = quality_measure.Settings(
    *(Path("model"), Path("text"), Path("work")),
    **{"windows": 128, "length": 1024, "eval_windows": 32, "last_word": 1000},
    **{"recover_minutes": 30.0, "keep": False},  # type: ignore[arg-type]
    **{"model_sha": "a", "calib_sha": "b", "eval_sha": "c"},
)
ROW = Row("admm", HEADLINES[1], recover="distill", minutes=30.0)


@pytest.mark.parametrize(
    "change",
    [
        {"windows": 64},
        {"length": 512},
        {"model_sha": "other"},
        {"calib_sha": "other"},
        {"eval_sha": "other"},
        {"eval_windows": 16},
    ],
)
def test_other_settings_are_other_figures(change: dict[str, Any]) -> None:
    before, after = (
        quality_measure.files_of(ROW, s) for s in (SETTINGS, replace(SETTINGS, **change))
    )
    assert before.scores.path != after.scores.path
    made_anew = not change.keys() & {"eval_sha", "eval_windows"}
    assert (before.checkpoint != after.checkpoint) == made_anew


@pytest.mark.parametrize(
    "change", [{"minutes": 60.0}, {"recover": "blocks"}, {"seed": 1}, {"max_ppl_ratio": 1.15}]
)
def test_another_recipe_is_another_checkpoint(change: dict[str, Any]) -> None:
    before, after = (
        quality_measure.files_of(row, SETTINGS) for row in (ROW, replace(ROW, **change))
    )
    assert before.checkpoint != after.checkpoint
    assert before.scores.path != after.scores.path


def figures(method: str, seed: int | None, ppl: float, **more: Any) -> dict[str, Any]:
    run = {"model": "M", "method": method, "pattern": "2:4", "bits": 4, "group": 64, "seed": seed}
    run |= {"recover": "none", "recover_minutes": 0.0, "max_ppl_ratio": None, "ppl": ppl}
    run |= {"kl": 1.0, "agreement": 0.5, "minutes": 2.0, "peak_rss_gib": 1.0, "bytes": 2**20}
    run |= {"against_ppl": 10.0, "hardware": "a machine"}
    return {**run, "date": "2026-01-01", **more}


def document(rows: list[dict[str, Any]], missing: list[dict[str, Any]]) -> dict[str, Any]:
    parent = figures("dense", None, 10.0, pattern="dense", bits=16, bytes=4 * 2**20)
    return {
        "eval": {"text_sha256": "ab", "tokens": 1023, "window": 1024},
        "calibration": {"windows": 2, "length": 32},
        **{"recover_minutes": 30.0, "versions": {}, "command": "c"},
        **{"date": "2026-01-02", "rows": [parent, *rows], "missing": missing},
    }


def unmeasured(method: str, seed: int, **more: Any) -> dict[str, Any]:
    run = figures(method, seed, 0.0, **more)
    return {key: run[key] for key in run if key not in ("ppl", "kl", "agreement", "minutes")}


def test_the_page_gives_median_spread_ratios_and_the_number_of_runs() -> None:
    rows = [figures("admm", seed, ppl) for seed, ppl in enumerate((30.0, 20.0, 25.0))]
    page = to_markdown(document([*rows, figures("sparsegpt", 0, 50.0)], []))
    assert "| admm |  | 3 of 3 | 25.00 (20.00..30.00) | 2.50x | 0.500 |" in page
    assert "| sparsegpt |  | 1 of 1 | 50.00 | 5.00x | 1.000 |" in page
    assert "**4 of 4 planned runs are measured**" in page


def test_the_page_names_what_is_not_measured() -> None:
    missing = [unmeasured("admm", 1), unmeasured("wanda", 0)]
    page = to_markdown(document([figures("admm", 0, 30.0)], missing))
    assert "| admm |  | 1 of 2 | 30.00 | 3.00x |  |" in page
    assert "| wanda |  | 0 of 1 | not yet measured |" in page
    assert "**1 of 3 planned runs are measured**" in page


def test_minutes_of_recovery_are_shown_where_they_were_timed() -> None:
    page = to_markdown(document([figures("admm", 0, 30.0, recovery_minutes=1.54)], []))
    assert "| 2.0 [1.5] | 1.00 | A |" in page


def test_a_run_is_shown_with_the_machine_it_was_measured_on() -> None:
    runs = [figures("admm", 0, 30.0), figures("admm", 1, 31.0, hardware="another machine")]
    page = to_markdown(document([*runs, figures("wanda", 0, 99.0, hardware="another machine")], []))
    assert "Machines: A is a machine; B is another machine." in page
    assert [line[-8:] for line in page.splitlines() if line.startswith("| admm")] == ["| A, B |"]
    assert [line[-5:] for line in page.splitlines() if line.startswith("| wanda")] == ["| B |"]


def test_quality_budgets_have_a_table_of_their_own() -> None:
    mixed = {"pattern": "mixed", "bits": None, "max_ppl_ratio": 1.15}
    budget = figures("admm", 0, 11.0, bytes=2 * 2**20, **mixed)
    page = to_markdown(document([budget], []))
    assert "| admm | 1.15x | 1 of 1 | 11.00 | 1.10x | 1.000 | 2.0 | 0.50x | 2.0 | A |" in page
    assert "| admm |  | 1 of 1" not in page
    missing = [unmeasured("admm", 0, **mixed)]
    page = to_markdown(document([figures("admm", 0, 30.0)], missing))
    assert "| admm | 1.15x | 0 of 1 | not yet measured |" in page


def test_a_distilled_row_starts_from_floats_where_there_is_a_mask() -> None:
    joint, rounded = (Row("admm", Column(p, 4), "distill", 5.0) for p in ("2:4", "dense"))
    assert start_of(joint) == Row("admm", Column("2:4", 16))
    assert start_of(rounded) == Row("admm", Column("dense", 4))


@pytest.fixture
def bench(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs quality.py on the tiny model: two windows of 16 tokens, windows of 64 to evaluate."""
    (tmp_path / "calib.wiki.txt").write_text(TEXT)
    (tmp_path / "eval.wiki.txt").write_text(TEXT.replace(" and", ";"))
    real = quality_measure.run

    def run(arguments: list[Any]) -> tuple[float, int, str]:
        short = ["--window", "64"] if "eval" in map(str, arguments) else []
        return real([*arguments, *short])

    monkeypatch.setattr(quality_measure, "run", run)

    def call(*more: str) -> None:
        paths = ["--model", str(tiny_model), "--text", str(tmp_path), "--work"]
        paths += [str(tmp_path / "work"), "--results", str(tmp_path / "results")]
        sizes = ["--windows", "2", "--length", "16", "--eval-windows", "2", "--last-word", "2"]
        monkeypatch.setattr(sys, "argv", ["quality.py", *paths, *sizes, *more])
        quality.main()

    return call


def test_a_row_is_measured_once_and_its_checkpoint_dropped(
    bench: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench("--rows", "sparsegpt:2:4:4", "--seeds", "0")
    written = json.loads((tmp_path / "results" / "quality.json").read_text())
    dense, row = written["rows"]
    assert row["method"] == "sparsegpt"
    assert row["ppl"] > 0
    assert row["bytes"] < dense["bytes"]
    assert row["last_word_items"] == dense["last_word_items"] == 2
    assert len(written["missing"]) == len(all_rows(30)) - 1
    assert "| sparsegpt |  | 1 of 3 |" in (tmp_path / "results" / "quality.md").read_text()
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]

    monkeypatch.setattr(quality_measure, "run", lambda _: pytest.fail("measured again"))
    shutil.rmtree(tmp_path / "results")
    bench("--rows", "sparsegpt:2:4:4", "--seeds", "0")
    assert json.loads((tmp_path / "results" / "quality.json").read_text()) == written


def test_what_is_published_is_known_on_another_machine(
    bench: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "results" / "quality.json"
    bench("--rows", "sparsegpt:2:4:4", "--seeds", "0")
    published = json.loads(page.read_text())
    published["rows"][1] |= {"hardware": "another machine", "date": "2026-01-01"}
    page.write_text(json.dumps(published))
    shutil.rmtree(tmp_path / "work")

    asked: list[list[Any]] = []
    monkeypatch.setattr(quality_measure, "run", lambda command: asked.append(command))
    bench("--rows", "sparsegpt:2:4:4", "--seeds", "0")
    assert not asked
    assert json.loads(page.read_text())["rows"] == published["rows"]

    # Under another protocol the published run counts for nothing, and is measured.
    with pytest.raises(TypeError, match="NoneType"):
        bench("--rows", "sparsegpt:2:4:4", "--seeds", "0", "--eval-windows", "1")
    assert asked


def test_a_row_that_fails_is_named_and_the_next_one_is_measured(
    bench: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measure(row: Row, *_: object) -> None:
        asked.append(row.label)
        if row.method == "admm":
            raise quality_measure.RowFailedError("exit code 1")

    monkeypatch.setattr(quality, "measure", measure)
    monkeypatch.setattr(quality, "measure_dense", lambda _: None)
    with pytest.raises(SystemExit, match=r"^failed: admm:2:4:16$"):
        bench("--rows", "*:2:4:16", "--seeds", "0")
    assert asked == ["sparsegpt:2:4:16", "admm:2:4:16", "magnitude:2:4:16", "wanda:2:4:16"]
