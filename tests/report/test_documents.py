"""Documents are read if they are what they say, and refused with the way on if not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from halfweave.errors import CheckpointError, HalfweaveError, RefusedError
from halfweave.report.documents import (
    KINDS,
    document_path,
    read_document,
    write_document,
)
from halfweave.report.gather import gather
from support.measured import DOCUMENTS, save_measured
from support.tiny import edit_json


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_is_written_and_read_with_fields_of_tomorrow(
    tmp_path: Path, tiny_model: Path, kind: str
) -> None:
    content = DOCUMENTS[kind](tiny_model)
    path = tmp_path / "measured" / f"{kind}.json"
    written = write_document(path, content)
    assert read_document(path) == written
    assert written.kind == kind
    assert json.loads(path.read_text()) == content


WRONG: list[tuple[str, Callable[[dict[str, Any]], Any], type[HalfweaveError], str]] = [
    ("eval", lambda d: d.update(schema_version=1), RefusedError, "schema version 1 is not 2"),
    ("eval", lambda d: d.update(kind="<b>"), CheckpointError, "is none of eval, kernel"),
    ("eval", lambda d: d["result"].pop("ppl"), CheckpointError, "result.ppl: "),
    ("kernel", lambda d: d["rows"][3]["us"].update(low=-1), CheckpointError, "rows.3.us.low: "),
    ("kernel", lambda d: d["rows"][0].update(N=[]), CheckpointError, "rows.0.N: "),
    ("offline", lambda d: d.update(models=7), CheckpointError, "models: "),
    ("serve", lambda d: d["points"][0].update(mode="x"), CheckpointError, "points.0.mode: "),
    ("offline", lambda d: d["models"][0].update(weight_bytes=10**400), CheckpointError, "weight_b"),
    ("offline", lambda d: d["models"][0].update(ppl=1e300), CheckpointError, "models.0.ppl: "),
    ("serve", lambda d: d["model"].update(name="x" * 5000), CheckpointError, "model.name: "),
]


@pytest.mark.parametrize(("kind", "spoil", "error", "message"), WRONG)
def test_what_is_not_as_specified_is_refused_by_field(
    tmp_path: Path,
    tiny_model: Path,
    kind: str,
    spoil: Callable[[dict[str, Any]], Any],
    error: type[HalfweaveError],
    message: str,
) -> None:
    content = DOCUMENTS[kind](tiny_model)
    spoil(content)
    path = tmp_path / "document.json"
    path.write_text(json.dumps(content))
    with pytest.raises(error, match=message) as caught:
        read_document(path)
    assert len(str(caught.value)) < 400


def test_what_was_measured_of_another_model_is_not_shown(
    pruned: Path,
) -> None:
    save_measured(pruned)
    assert set(gather(pruned).documents) == set(KINDS)
    edit_json(pruned / "halfweave.json", lambda manifest: manifest["recipe"].update(seed=7))
    found = gather(pruned)
    assert not found.documents
    assert all("another model that was here" in why for why in found.missing.values())


def test_a_damaged_document_spoils_no_other(pruned: Path) -> None:
    save_measured(pruned)
    document_path(pruned, "serve").write_text("{")
    document_path(pruned, "kernel").write_bytes(document_path(pruned, "eval").read_bytes())
    found = gather(pruned)
    assert set(found.documents) == {"eval", "offline"}
    assert "is not JSON" in found.missing["serve"]
    assert "holds a document of kind eval" in found.missing["kernel"]
