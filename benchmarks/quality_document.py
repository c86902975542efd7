"""The quality table as a JSON document, from the figures on the disk. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

from quality_cache import Entry
from quality_measure import (
    Files,
    Settings,
    dense_words,
    files_of,
    prune_flags,
    weight_bytes,
)
from quality_rows import GROUP, Column, Row, all_rows, curve_rows


def to_document(settings: Settings) -> dict[str, Any] | None:
    """The page's JSON twin: all planned rows, with figures or as missing."""
    from halfweave.runtime.hardware import this_machine, versions

    planned = all_rows(settings.recover_minutes)
    known = [(row, files_of(row, settings)) for row in planned]
    measured = [(row, files) for row, files in known if files.scores.read() is not None]
    if not measured:
        return None
    scores = measured[0][1].scores.read() or {}
    return {
        **protocol(settings),
        "eval": {key: scores[key] for key in ("text_sha256", "tokens", "window")},
        "hardware": this_machine().line,
        "versions": versions(),
        "date": date.today().isoformat(),
        "rows": [
            dense_figures(scores, settings),
            *(row_figures(row, files, settings) for row, files in measured),
        ],
        "missing": [identity(row, settings) for row, files in known if files.scores.read() is None],
    }


def protocol(settings: Settings) -> dict[str, Any]:
    """What all runs of a document have in common; runs of another protocol are never mixed in."""
    return {
        "command": settings.command,
        "model_digest": settings.model_sha,
        "eval_sha256": settings.eval_sha,
        "calibration": {
            "text_sha256": settings.calib_sha,
            "windows": settings.windows,
            "length": settings.length,
        },
        "recover_minutes": settings.recover_minutes,
    }


def identity(row: Row, settings: Settings) -> dict[str, Any]:
    """What tells a row from the others."""
    return {
        "model": settings.model.name,
        "method": row.method,
        "pattern": row.column.pattern,
        "bits": row.column.bits or None,
        "group": GROUP if row.column.bits == 4 else None,
        "recover": row.recover,
        "recover_minutes": row.minutes,
        "max_ppl_ratio": row.max_ppl_ratio,
        "seed": None if row.method == "dense" else row.seed,
    }


def row_figures(row: Row, files: Files, settings: Settings) -> dict[str, Any]:
    """One measured row of the JSON."""
    scores, pruned = files.scores.read() or {}, files.pruned.read() or {}
    windows = prune_flags(row, settings)["calib-windows"]
    return {
        **identity(row, settings),
        "calib_tokens": 0 if row.method == "magnitude" else windows * settings.length,
        **{key: scores[key] for key in ("ppl", "kl", "agreement", "against_ppl")},
        **pruned,
        **word_figures(files.words),
    }


def dense_figures(scores: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The dense model as a row, its perplexity from the same pass as a pruned one's."""
    return {
        **identity(Row("dense", Column("dense", 16)), settings),
        "calib_tokens": 0,
        **{"ppl": scores["against_ppl"], "kl": 0.0, "agreement": 1.0},
        **{"minutes": 0.0, "peak_rss_gib": None, "bytes": weight_bytes(settings.model)},
        **word_figures(dense_words(settings)),
    }


def word_figures(words: Entry | None) -> dict[str, Any]:
    """The last-word figures under the JSON's names; empty if there are none."""
    figures = words.read() if words is not None else None
    if figures is None:
        return {}
    return {
        "last_word_accuracy": figures["accuracy"],
        "last_word_standard_error": figures["standard_error"],
        "last_word_items": figures["items"],
        "last_word_ppl": figures["word_ppl"],
    }


def to_curve(label: str, minutes: Sequence[float], settings: Settings) -> list[dict[str, float]]:
    """Perplexity over minutes of recovery, as far as measured."""
    points = []
    for row in curve_rows(label, minutes):
        scores = files_of(row, settings).scores.read()
        if scores is not None:
            points.append({"minutes": row.minutes, "ppl": scores["ppl"]})
    return points
