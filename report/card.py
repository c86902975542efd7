"""The model card's measured figures: what the documents beside the model say, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import find_directory, write_text
from ..pruner.card import with_measured
from .chart import MIB, number, percent, spread
from .documents import EvalDocument, Metric, ModelSpeed, OfflineDocument
from .gather import read_documents

CARD = "README.md"
_NOT_MEASURED = "not measured"


def update_card(path: str | Path) -> bool:
    """Put what was measured into the model card of a directory; says whether there is such a card.

    The card of a directory that halfweave did not prune is left alone.

    Raises:
        OSError: the card cannot be read or written.
    """
    directory = find_directory(path)
    card = directory / CARD
    if not card.is_file():
        return False
    documents, _ = read_documents(directory)
    quality, speed = documents.get("eval"), documents.get("offline")
    quality = quality if isinstance(quality, EvalDocument) else None
    speed = speed if isinstance(speed, OfflineDocument) else None
    try:
        before = card.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False  # not ours
    after = with_measured(
        before, _perplexity(quality), _speed(speed), _section(directory, quality, speed)
    )
    if after != before:
        write_text(card, after)
    return after != before or "\n| perplexity | " in before


def _perplexity(document: EvalDocument | None) -> str:
    if document is None or document.result.ppl is None:
        return _NOT_MEASURED
    result = document.result
    dense = "" if result.against_ppl is None else f" (dense: {result.against_ppl:.2f})"
    return f"{result.ppl:.2f}{dense}, n = {result.tokens} tokens of {_cell(document.text)}"


def _speed(document: OfflineDocument | None) -> str:
    if document is None or not document.models:
        return _NOT_MEASURED
    told = ", ".join(
        f"{_cell(model.name)}: {spread(model.decode_tokens_per_s)}" for model in document.models
    )
    return f"decoded tokens/s, median (least-greatest): {told}; {_cell(document.hardware.line)}"


def _section(directory: Path, quality: EvalDocument | None, speed: OfflineDocument | None) -> str:
    parts = []
    if quality is not None:
        parts += [*_quality_rows(directory, quality), "", _made_by(quality), ""]
    if speed is not None:
        parts += [*_speed_rows(speed.models), "", _made_by(speed), ""]
    return "\n".join(parts)


def _quality_rows(directory: Path, document: EvalDocument) -> list[str]:
    """Before and after, the dense parent first; a dash where it was not measured."""
    result = document.result
    rows = [
        ("perplexity", number(result.against_ppl, 2), number(result.ppl, 2)),
        ("KL from dense, nats/token", "-", number(result.kl, 4)),
        ("same next token as dense", "-", percent(result.agreement)),
    ]
    for task, figures in document.tasks.items():
        before = document.against_tasks.get(task, {})
        rows += [
            (f"{task}, {metric}, n = {figures.get('n')}", _metric(before.get(metric)), _metric(now))
            for metric, now in figures.items()
            if isinstance(now, Metric)
        ]
    name = "dense" if document.against is None else document.against.name
    return _markdown(("", name, directory.resolve().name), rows)


def _metric(figure: Metric | int | None) -> str:
    if not isinstance(figure, Metric) or figure.value is None:
        return "-"
    error = "" if figure.stderr is None else f" (standard error {figure.stderr:.4f})"
    return f"{figure.value:.4f}{error}"


def _speed_rows(models: Sequence[ModelSpeed]) -> list[str]:
    header = ("", "weights, MiB", "perplexity", "prefill, tokens/s", "decode, tokens/s", "n")
    rows = [
        (
            model.name,
            number(model.weight_bytes / MIB),
            number(model.ppl, 2),
            spread(model.prefill_tokens_per_s),
            spread(model.decode_tokens_per_s),
            str(len(model.samples)),
        )
        for model in models
    ]
    return _markdown(header, rows)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [
        "| " + " | ".join(cell if cell == "---" else _cell(cell) for cell in line) + " |"
        for line in lines
    ]


def _made_by(document: EvalDocument | OfflineDocument) -> str:
    command = " ".join(document.command).replace("`", "'")
    return (
        f"{document.created[:10]}, {_cell(document.hardware.line)}: "
        f"`{' '.join(command.split()) or 'unknown command'}`"
    )


def _cell(text: str) -> str:
    """Text that stays in its cell: no line ends, no bars, no markup."""
    line = " ".join(text.split())
    for char in "\\|`*_[]":
        line = line.replace(char, f"\\{char}")
    return line.replace("<", "&lt;").replace(">", "&gt;")
