"""The verb eval, as a user types it: rows, a document that is kept, tasks, a plan."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from halfweave.report.documents import EvalDocument, read_document
from support.command import Command, assert_error
from support.harness import MISSING, REASON, write_tasks
from support.tiny import dense_model, pack_directory

TEXT = "Two foxes keep every fourth weight; nobody minds the lazy zero. " * 60
WINDOW = 64


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def packed(copy_of: Callable[[Path], Path], packed_model: Path) -> Path:
    return copy_of(packed_model)


def flags(text: Path) -> tuple[object, ...]:
    return ("--text", text, "--window", WINDOW)


def test_figures_are_kept_beside_the_model(
    halfweave: Command, packed: Path, tiny_model: Path, text: Path
) -> None:
    ran = halfweave("eval", packed, "--against", tiny_model, *flags(text))
    file = packed / "measured" / "eval.json"
    assert ran.err.splitlines()[-1] == f"kept in {file}"
    kept = read_document(file)
    assert isinstance(kept, EvalDocument)
    assert (kept.model.name, kept.against and kept.against.name) == (packed.name, "tiny")
    assert kept.command[:3] == ["halfweave", "eval", str(packed)]
    assert kept.result.tokens == kept.result.windows * (WINDOW - 1)
    assert f"{kept.result.ppl:.3f}" in ran.out
    assert any("rounds what is multiplied" in note for note in kept.notes)


def test_what_is_printed_as_json_is_what_is_kept(
    halfweave: Command, packed: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "figures.json"
    document = halfweave("eval", packed, *flags(text), "--out", out, "--json").document
    assert {"verb": "eval", **json.loads(out.read_text())} == document
    assert not (packed / "measured").exists()


def test_nothing_is_kept_if_that_is_asked(halfweave: Command, packed: Path, text: Path) -> None:
    ran = halfweave("eval", packed, *flags(text), "--no-save")
    assert ran.code == 0
    assert not (packed / "measured").exists()


def test_a_model_that_cannot_be_written_to_is_measured_all_the_same(
    halfweave: Command, packed: Path, text: Path
) -> None:
    (packed / "measured").write_text("in the way")
    ran = halfweave("eval", packed, *flags(text))
    assert ran.code == 0
    assert "not kept: " in ran.err
    assert ran.err.splitlines()[-1].startswith("next: the same command with --out FILE")


def test_a_dry_run_tells_the_windows_and_the_time_and_keeps_nothing(
    halfweave: Command, packed: Path, tiny_model: Path, text: Path
) -> None:
    whole = halfweave("eval", packed, *flags(text), "--no-save", "--json").document["result"]
    against = ("--against", tiny_model)
    ran = halfweave("eval", packed, *against, *flags(text), "--dry-run")
    assert f"plan: {whole['windows']} windows of 64 tokens, 2 models at a time" in ran.out
    assert re.search(r"about \d+s and \d+\.\d [MG]iB of memory here", ran.out)
    assert not (packed / "measured").exists()
    plan = halfweave("eval", packed, *flags(text), "--dry-run", "--json").document["plan"]
    assert (plan["windows"], plan["tokens"]) == (whole["windows"], whole["tokens"])


@pytest.mark.parametrize("kind", ["dense", "sparse24", "sparse24_int4"])
def test_perplexity_of_the_exact_path_is_that_of_transformers(
    halfweave: Command, tiny_model: Path, text: Path, tmp_path: Path, kind: str
) -> None:
    """Within 0.1 percent, on the same weights unpacked; the fast path's within 2 on this model."""
    packed = pack_directory(tiny_model, tmp_path / "packed", kind)
    exact, fast = (
        halfweave("eval", packed, *flags(text), "--no-save", "--dtype", dtype, "--json").document
        for dtype in ("float32", "auto")
    )
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(packed)(TEXT, add_special_tokens=False).input_ids
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    with torch.inference_mode():
        logits = dense_model(tmp_path / "packed-dense")(windows).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert exact["result"]["tokens"] == windows[:, 1:].numel()
    assert exact["result"]["ppl"] == pytest.approx(math.exp(loss.item()), rel=1e-3)
    assert fast["result"]["ppl"] == pytest.approx(math.exp(loss.item()), rel=2e-2)


def test_flags_of_tasks_need_tasks(halfweave: Command, packed: Path) -> None:
    assert_error(halfweave("eval", packed, "--limit", 3), 2, "go with --tasks")


@pytest.mark.skipif(bool(MISSING), reason=REASON)
def test_tasks_are_asked_of_both_models(
    halfweave: Command, packed: Path, tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    folder = write_tasks(tmp_path, tiny_model)
    tasks = ("--tasks", "riddles_choice,riddles_cloze", "--include-path", folder, "--limit", 3)
    ran = halfweave("eval", packed, "--against", tiny_model, *flags(text), *tasks)
    assert re.search(r"^question 1/12 tiny: loglikelihood \d+\.\d s eta \d+s$", ran.err, re.M)
    rows = [line.split() for line in ran.out.splitlines() if line.startswith("riddles_choice")]
    assert [row[1:3] for row in rows[:2]] == [["acc", "tiny"], ["acc", packed.name]]
    assert all(row[-1] == "3" for row in rows)
    assert all(len(line) <= 100 for line in ran.out.splitlines())
    kept = read_document(packed / "measured" / "eval.json")
    assert isinstance(kept, EvalDocument)
    assert set(kept.tasks) == set(kept.against_tasks) == {"riddles_choice", "riddles_cloze"}
    wrong = halfweave("eval", packed, "--tasks", "riddles_choise", "--include-path", folder)
    assert_error(wrong, 2, "no task 'riddles_choise'", "riddles_choice")


@pytest.mark.skipif(bool(MISSING), reason=REASON)
def test_a_task_that_fails_leaves_what_was_measured_before_it(
    halfweave: Command, packed: Path, tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    folder = write_tasks(tmp_path, tiny_model)
    broken = (folder / "choice.yaml").read_text().replace("{{begin}}", "{{1 / 0}}")
    (folder / "choice.yaml").write_text(broken)
    tasks = ("--tasks", "riddles_choice", "--include-path", folder)
    ran = halfweave("eval", packed, *flags(text), *tasks)
    assert (ran.code, "the task failed" in ran.err) == (1, True)
    kept = read_document(packed / "measured" / "eval.json")
    assert isinstance(kept, EvalDocument)
    assert (kept.result.tokens > 0, kept.tasks) == (True, {})
    assert any(note.startswith("the tasks were not finished: ") for note in kept.notes)
    whole = ("--tasks", "riddles_cloze", "--include-path", folder, "--limit", 3)
    assert halfweave("eval", packed, *flags(text), *whole).code == 0
    before = (packed / "measured" / "eval.json").read_bytes()
    assert halfweave("eval", packed, *flags(text), *tasks).code == 1
    assert (packed / "measured" / "eval.json").read_bytes() == before
