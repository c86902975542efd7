"""Figures of earlier machines, taken from the JSON twin: what is published need not be run again.

The table takes longer than one machine may be at hand, so measuring always starts from
the committed page. Each run keeps the machine and the date that it was measured with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quality_cache import Entry
from quality_document import identity, protocol
from quality_measure import Settings, dense_words, files_of
from quality_rows import all_rows

Figures = Mapping[str, Any]

PRUNED = ("minutes", "recovery_minutes", "peak_rss_gib", "bytes", "date", "hardware")
SCORES = ("ppl", "kl", "agreement", "against_ppl")
WORDS = {
    "accuracy": "last_word_accuracy",
    "standard_error": "last_word_standard_error",
    "items": "last_word_items",
    "word_ppl": "last_word_ppl",
}


def adopt(document: Figures, settings: Settings) -> int:
    """Keep the document's runs as if they had been measured here; how many there were.

    Runs of another model, text or protocol are passed over, and nothing measured here is replaced.
    """
    asked = protocol(settings)
    if any(document.get(name) != value for name, value in asked.items()):
        return 0
    published = [dict(run) for run in document["rows"]]
    _adopt_words(published[0], dense_words(settings))
    adopted = 0
    for row in all_rows(settings.recover_minutes):
        key = identity(row, settings)
        run = next((r for r in published if key.items() <= r.items()), None)
        if run is None:
            continue
        files = files_of(row, settings)
        _fill(files.pruned, {name: run[name] for name in PRUNED if name in run})
        _fill(files.scores, {**{name: run[name] for name in SCORES}, **document["eval"]})
        _adopt_words(run, files.words)
        adopted += 1
    return adopted


def _adopt_words(run: Figures, words: Entry | None) -> None:
    if words is not None and WORDS["accuracy"] in run:
        _fill(words, {name: run[published] for name, published in WORDS.items()})


def _fill(entry: Entry, figures: Figures) -> None:
    if entry.read() is None:
        entry.write(figures)
