"""Runs of several steps, through `prune`: a budget, distillation, and recovery on its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from halfweave.errors import CheckpointError, RefusedError, UsageError
from halfweave.files import read_json
from halfweave.kernels.schema import JOURNAL_FILE
from halfweave.pruner.budget.choose import BudgetPlan
from halfweave.pruner.oneshot import Progress
from halfweave.pruner.pipeline import plan_prune, prune
from halfweave.pruner.recipe import Recipe
from halfweave.pruner.recover import run as run_module
from halfweave.pruner.recover.settings import DistillProgress, DistillResult
from halfweave.pruner.recover.state import STATE_FILE
from halfweave.pruner.recovery import Recovery, plan_recover, recover
from halfweave.pruner.source import Source, token_ids
from halfweave.pruner.steps import ProgressEvent
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.eval import evaluate
from halfweave.runtime.model import load_model
from support.pruning import TEXT, everything, recipe, set_weight
from support.tiny import Tiny, edit_json, save_tiny

TOKENS = 4096
HELPER = Path(__file__).parents[1] / "support" / "kill_every_write.py"
DISTILL = {"recover": "distill", "recover_tokens": TOKENS}
BUDGET = {"calib_windows": 16, "max_ppl_ratio": 1.5}


@pytest.fixture(scope="module")
def distilled(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distilled") / "out"
    prune(tiny_model, out, recipe(bits=4, group=32, **DISTILL))
    return out


def nats(model: Path, parent: Path) -> float:
    result = evaluate(load_model(model), TEXT.read_text(), window=64, against=load_model(parent))
    assert result.kl is not None
    return result.kl


def test_distillation_brings_the_model_nearer_to_its_parent_and_keeps_its_form(
    tiny_model: Path, distilled: Path, tmp_path: Path
) -> None:
    prune(tiny_model, tmp_path / "plain", recipe(bits=4, group=32))
    assert nats(distilled, tiny_model) < nats(tmp_path / "plain", tiny_model)
    trained, plain = Checkpoint.open(distilled), Checkpoint.open(tmp_path / "plain")
    assert trained.linears == plain.linears
    manifest = read_json(distilled / "halfweave.json")
    record = manifest["provenance"]["recovery"]
    assert DistillResult.of_record(distilled, record).tokens == TOKENS
    assert manifest["recipe"]["recover_tokens"] == TOKENS
    assert manifest["recipe"]["recover"] == "distill"
    names = {path.name for path in distilled.iterdir()}
    assert not [name for name in names if name.startswith(".")]


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("blocks", [False, True])
def test_recovery_on_its_own_gives_the_same_weights(
    tiny_model: Path, tmp_path: Path, bits: int, blocks: bool
) -> None:
    asked = {"recover": "blocks+distill" if blocks else "distill", "recover_tokens": TOKENS}
    how = {"precision": "float32", "rate": 2e-3, "ce": 0.3}  # auto is timed, and may differ
    whole = recipe(bits=bits, group=32, **asked, **{f"recover_{k}": v for k, v in how.items()})
    prune(tiny_model, tmp_path / "whole", whole)
    prune(tiny_model, tmp_path / "first", recipe(recover="blocks" if blocks else "none"))
    recovery = Recovery(str(TEXT), tokens=TOKENS, bits=bits, group=32, **how)  # type: ignore
    result = recover(tmp_path / "first", tiny_model, tmp_path / "out", recovery)
    assert result.path == tmp_path / "out"
    assert not result.rolled_back
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_what_is_trained_again_says_so_and_keeps_its_own_recipe(
    tiny_model: Path, distilled: Path, tmp_path: Path
) -> None:
    again = Recovery(str(TEXT), tokens=1024, precision="float32")
    recover(distilled, tiny_model, tmp_path / "out", again)
    first, second = (read_json(path / "halfweave.json") for path in (distilled, tmp_path / "out"))
    assert second["recipe"] == first["recipe"]
    record = second["provenance"]["recovery"]
    assert record["tokens"] == 1024
    assert record["student"] == first["provenance"]["recovery"]


def test_a_dry_run_refuses_a_text_too_short_to_round_by(tiny_model: Path, tmp_path: Path) -> None:
    prune(tiny_model, tmp_path / "pruned", recipe())
    many = {"calib_windows": 160, "calib_length": 256}  # 10 of which judge: 2816 tokens
    edit_json(
        tmp_path / "pruned" / "halfweave.json", lambda manifest: manifest["recipe"].update(many)
    )
    words = TEXT.read_text()
    count = len(token_ids(Source.open(tiny_model), words))
    (tmp_path / "short.txt").write_text(words[: len(words) * 2500 // count])
    asked = Recovery(str(tmp_path / "short.txt"), tokens=TOKENS, bits=4, group=32)
    paths = (tmp_path / "pruned", tiny_model, tmp_path / "out")
    for run in (plan_recover, recover):
        with pytest.raises(UsageError, match="beside 10 that judge"):
            run(*paths, asked)
    plan_recover(*paths, replace(asked, bits=16))


def test_recovery_is_timed_apart_from_pruning(tiny_model: Path, tmp_path: Path) -> None:
    plain = prune(tiny_model, tmp_path / "plain", recipe())
    assert plain.recovery_seconds == 0
    tuned = prune(tiny_model, tmp_path / "tuned", recipe(recover="blocks"))
    assert tuned.recovery_seconds is not None
    assert 0 < tuned.recovery_seconds < tuned.seconds
    both = recipe(recover="blocks+distill", recover_tokens=TOKENS)
    trained = prune(tiny_model, tmp_path / "trained", both)
    assert trained.recovery is not None and trained.recovery.minutes is not None
    assert trained.recovery_seconds is not None
    assert 60 * trained.recovery.minutes < trained.recovery_seconds < trained.seconds


@pytest.mark.parametrize(("pattern", "bits"), [("2:4", 16), ("2:4", 4), ("dense", 4)])
def test_the_plan_counts_every_model_that_lies_on_the_disk(
    tiny_model: Path, tmp_path: Path, pattern: str, bits: int
) -> None:
    out, seen = tmp_path / "out", [0]

    def look(_: object) -> None:
        models = (path for path in out.rglob("model*.safetensors"))
        seen.append(sum(path.stat().st_size for path in models))

    chosen = recipe(pattern=pattern, bits=bits, group=32, **DISTILL)
    prune(tiny_model, out, chosen, progress=look)
    plan = plan_prune(tiny_model, chosen)
    kept = sum(prod(linear.shape) for linear in plan.linears) // (2 if pattern == "2:4" else 1)
    state = 2 * 3 * 4 * kept  # of the training, which is no model
    parted = (pattern, bits) == ("2:4", 4)
    assert parted or plan.scratch_bytes == plan.output_bytes + state
    assert plan.output_bytes < max(seen) <= plan.output_bytes + plan.scratch_bytes - state


def test_the_recipe_of_a_timed_run_gives_its_bytes_again(tiny_model: Path, tmp_path: Path) -> None:
    timed = recipe(bits=4, group=32, recover="distill", recover_minutes=0.02)
    result = prune(tiny_model, tmp_path / "timed", timed)
    assert result.recovery is not None
    again = Recipe.read(tmp_path / "timed" / "halfweave.json")
    assert again.recover_tokens == result.recovery.tokens > 0
    prune(tiny_model, tmp_path / "again", again)
    for shard in (tmp_path / "timed").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes()


def test_recovery_goes_on_after_an_interrupt_and_only_if_asked_to(
    tiny_model: Path, tmp_path: Path
) -> None:
    prune(tiny_model, tmp_path / "plain", recipe())
    arguments = (tmp_path / "plain", tiny_model, tmp_path / "out")
    chosen = Recovery(calib=str(TEXT), tokens=TOKENS, bits=4, group=32)

    def stop(step: Progress | DistillProgress) -> None:
        if isinstance(step, Progress) and step.done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(*arguments, chosen, progress=stop)
    with pytest.raises(CheckpointError, match="incomplete"):
        Checkpoint.open(tmp_path / "out")
    with pytest.raises(RefusedError, match="an unfinished run"):
        recover(*arguments, chosen)
    with pytest.raises(RefusedError, match="cannot resume"):
        recover(*arguments, replace(chosen, tokens=2048), resume=True)
    seen: list[Progress | DistillProgress] = []
    recover(*arguments, chosen, resume=True, progress=seen.append)
    assert isinstance(seen[0], Progress)  # the training before the rounding was done
    recover(*arguments[:2], tmp_path / "whole", chosen)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_recovery_is_not_resumed_with_another_thread_count(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Not even before the second training has saved a state that says under which it began."""
    prune(tiny_model, tmp_path / "plain", recipe())
    arguments = (tmp_path / "plain", tiny_model, tmp_path / "out")
    chosen = Recovery(calib=str(TEXT), tokens=TOKENS, bits=4, group=32)
    seen: list[Progress | DistillProgress] = []

    def stop(step: Progress | DistillProgress) -> None:
        if isinstance(step, DistillProgress) and seen and isinstance(seen[-1], Progress):
            raise KeyboardInterrupt
        seen.append(step)

    with pytest.raises(KeyboardInterrupt):
        recover(*arguments, chosen, progress=stop)
    torch.set_num_threads(2)
    try:
        with pytest.raises(RefusedError, match="cannot resume: threads changed"):
            recover(*arguments, chosen, resume=True)
    finally:
        torch.set_num_threads(1)
    began = json.loads((tmp_path / "out" / JOURNAL_FILE).read_text().strip().splitlines()[0])["key"]
    made = read_json(tmp_path / "plain" / "halfweave.json")["provenance"]
    for name in ("halfweave", "torch", "transformers", "device", "threads", "base"):
        assert began[name] == made[name]


def stopped_in_training(model: Path, out: Path, chosen: Recipe) -> None:
    """Leave a run behind that has saved a state of its training, as a timed one does at once."""

    def stop(step: ProgressEvent) -> None:
        if isinstance(step, DistillProgress) and (out / STATE_FILE).exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, out, chosen, progress=stop)


@pytest.mark.parametrize("changes", [{}, DISTILL])
def test_overwriting_leaves_nothing_of_an_unfinished_training(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    stopped_in_training(tiny_model, out, recipe(recover="distill", recover_minutes=5.0))
    prune(tiny_model, out, recipe(**changes), overwrite=True)
    prune(tiny_model, tmp_path / "fresh", recipe(**changes))
    assert everything(out) == everything(tmp_path / "fresh")


@pytest.mark.parametrize("alone", [False, True])
def test_a_kill_after_the_manifest_leaves_no_state_in_the_finished_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    out, real = tmp_path / "out", run_module.write_checkpoint
    prune(tiny_model, tmp_path / "plain", recipe())

    def run(resume: bool) -> None:
        if alone:
            chosen = Recovery(calib=str(TEXT), tokens=TOKENS)
            recover(tmp_path / "plain", tiny_model, out, chosen, resume=resume)
        else:
            prune(tiny_model, out, recipe(**DISTILL), resume=resume)

    def killed(*arguments: Any) -> None:
        real(*arguments)
        (out / STATE_FILE).write_bytes(b"of a training that takes longer than this one")
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "write_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run(resume=False)
    monkeypatch.undo()
    run(resume=True)
    assert (out / "halfweave.json").exists()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_recovery_that_is_refused_leaves_the_model_it_was_to_replace(
    tiny_model: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    plain, out, other = tmp_path / "plain", tmp_path / "out", copy_of(tiny_model)
    for directory in (plain, out):
        prune(tiny_model, directory, recipe())
    before = everything(out)
    set_weight(other, "model.norm.weight", lambda w: w.add_(1))
    chosen = Recovery(calib=str(TEXT), tokens=TOKENS)
    with pytest.raises(RefusedError, match="was not pruned from"):
        recover(plain, other, out, chosen, overwrite=True)
    with pytest.raises(UsageError, match="--resume goes on with what --overwrite removes"):
        recover(plain, tiny_model, out, chosen, resume=True, overwrite=True)
    edit_json(plain / "halfweave.json", lambda file: file["recipe"].update(calib_length=10**6))
    with pytest.raises(UsageError, match="the calibration text has"):
        recover(plain, tiny_model, out, replace(chosen, bits=4), overwrite=True)
    with pytest.raises(UsageError, match="1024 tokens are one step"):
        recover(plain, tiny_model, out, replace(chosen, bits=4, tokens=1024), overwrite=True)
    shard = plain / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        recover(plain, tiny_model, out, chosen, overwrite=True)
    assert everything(out) == before


def test_recovery_refuses_what_is_no_pruned_model_or_is_its_own_input(
    tiny_model: Path, distilled: Path, tmp_path: Path
) -> None:
    chosen, before = Recovery(calib=str(TEXT)), everything(distilled)
    with pytest.raises(RefusedError, match="the input is never modified"):
        recover(distilled, tiny_model, distilled, chosen, overwrite=True)
    with pytest.raises(RefusedError, match="the input is never modified"):
        recover(distilled, tiny_model, tiny_model, chosen, overwrite=True)
    with pytest.raises(RefusedError, match="not made by halfweave"):
        recover(tiny_model, tiny_model, tmp_path / "out", chosen)
    with pytest.raises(RefusedError, match="its linears are sparse24_int4"):
        recover(distilled, tiny_model, tmp_path / "out", replace(chosen, bits=4))
    assert everything(distilled) == before
    assert not (tmp_path / "out").exists()


def test_a_budget_tells_its_plan_first_and_its_outcome_is_in_the_manifest(
    tiny_model: Path, tmp_path: Path
) -> None:
    events: list[ProgressEvent] = []
    chosen = recipe(**BUDGET)
    result = prune(tiny_model, tmp_path / "out", chosen, progress=events.append)
    kinds = [type(event) for event in events]
    assert kinds.index(BudgetPlan) < kinds.index(Progress)
    assert result.budget is not None
    assert result.budget.met == (result.budget.ratio <= chosen.max_ppl_ratio)
    manifest = read_json(tmp_path / "out" / "halfweave.json")
    assert manifest["provenance"]["budget"]["ratio"] == result.budget.ratio
    plan = next(event for event in events if isinstance(event, BudgetPlan))
    assert manifest["recipe"]["choices"] == dict(plan.choices)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{result.budget.ratio:.3f} x the dense perplexity" in card
    assert "mixed formats" in card
    assert load_model(tmp_path / "out").name == "out"


def test_a_budget_of_bytes_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    result = prune(tiny_model, tmp_path / "out", recipe(calib_windows=16, target_bytes=0.9))
    assert result.budget is not None
    assert result.budget.share_of_bytes <= 0.9


def test_a_budget_together_with_distillation_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="budget"):
        prune(tiny_model, tmp_path / "out", recipe(**BUDGET, **DISTILL))
    assert not (tmp_path / "out").exists()


def test_a_text_too_short_to_distill_on_is_refused_before_anything_is_pruned(
    tiny_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:600])
    seen: list[ProgressEvent] = []
    short = recipe(**DISTILL, calib=str(text))
    with pytest.raises(UsageError, match="held-out windows"):
        prune(tiny_model, tmp_path / "out", short, progress=seen.append)
    assert not seen


@pytest.mark.timeout(1600)  # some twenty processes, one behind the other
@pytest.mark.parametrize("which", ["distill", "budget"])
def test_a_kill_before_any_write_of_any_step_resumes_to_the_same_bytes(
    tmp_path: Path, which: str
) -> None:
    tiny = Tiny(layers=1, hidden=16, intermediate=32, heads=2)
    model = save_tiny(tmp_path / "model", tiny)
    result = subprocess.run(
        [sys.executable, str(HELPER), str(model), str(tmp_path), which],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.split()[-1]) >= 20
