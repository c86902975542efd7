"""Which models the report puts side by side, and what it says of those that it leaves out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from halfweave.report.documents import document_path
from halfweave.report.gather import gather
from halfweave.report.quality_charts import pareto_chart
from support.command import Command
from support.measured import save_measured
from support.tiny import edit_json


def twin(model: Path, place: Path) -> Path:
    """The same model again, in a directory of the same name."""
    return Path(shutil.copytree(model, place / "twin" / model.name))


def only_last(directory: Path, kind: str = "offline", **changes: Any) -> None:
    """Of the models that were measured together leave the last, and change it."""

    def change(document: dict[str, Any]) -> None:
        document["models"] = [{**document["models"][-1], **changes}]

    edit_json(document_path(directory, kind), change)


def names(main: Path, *others: Path) -> tuple[list[str], str]:
    chart = pareto_chart(gather(main), [gather(other) for other in others])
    assert chart.table is not None
    return [row[1] for row in chart.table.rows], chart.caption


@pytest.mark.parametrize("kind", ["offline", "eval"])
def test_what_was_measured_is_shown_beside_a_model_that_was_not(
    kind: str, pruned: Path, tmp_path: Path
) -> None:
    other = twin(pruned, tmp_path)
    save_measured(other, kind)
    labels, caption = names(pruned, other)
    assert len(labels) > 1
    assert "n = " in caption


def test_a_model_whose_speed_was_not_measured_is_named(pruned: Path, tmp_path: Path) -> None:
    other = twin(pruned, tmp_path)
    save_measured(other, "offline")
    save_measured(pruned, "eval")
    _, caption = names(pruned, other)
    assert f"Speed of {pruned.name} was not measured; it is left out." in caption


def test_models_of_one_name_and_size_are_all_shown(pruned: Path, tmp_path: Path) -> None:
    save_measured(pruned, "offline")
    only_last(pruned, digest="ab" * 32)
    others = [twin(pruned, tmp_path / place) for place in ("seed", "again")]
    only_last(others[0], digest="cd" * 32)
    labels, caption = names(pruned, *others)
    assert labels == [f"{labels[0][:-4]} (1)", f"{labels[0][:-4]} (2)"]  # the third is the first
    assert caption.count("are from another run") == 2


def test_a_parent_that_was_evaluated_itself_is_shown_once(
    halfweave: Command, tiny_model: Path, pruned: Path, tmp_path: Path
) -> None:
    dense, text = Path(shutil.copytree(tiny_model, tmp_path / "parent")), tmp_path / "text.txt"
    text.write_text("Two foxes keep every fourth weight. " * 80)
    flags = ("--text", text, "--window", 64, "--max-windows", 2)
    assert halfweave("eval", pruned, "--against", dense, *flags).code == 0
    assert halfweave("eval", dense, *flags).code == 0
    labels, _ = names(pruned, dense)
    assert len(labels) == 2
    assert labels.count("dense") == 1


def test_perplexities_of_another_number_of_windows_are_not_compared(
    pruned: Path, tmp_path: Path
) -> None:
    save_measured(pruned, "offline")
    other = twin(pruned, tmp_path)
    edit_json(document_path(other, "offline"), lambda found: found["text"].update(tokens=511))
    before = names(pruned)[0]
    labels, caption = names(pruned, other)
    assert labels == before
    assert "was measured on another text and is left out" in caption
