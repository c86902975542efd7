"""What ends in codes: trained as floats, and again behind each part of the blocks that was rounded;
and what is told of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from halfweave.cli import tables
from halfweave.errors import UsageError
from halfweave.files import read_json, sha256_file, write_json
from halfweave.pruner.block import BlockPruner
from halfweave.pruner.calibrate import load_text
from halfweave.pruner.oneshot import OneShot, Progress, draw_sample
from halfweave.pruner.pipeline import prune
from halfweave.pruner.plan import make_plan
from halfweave.pruner.recover.distill import Link, distill, make_trainer
from halfweave.pruner.recover.settings import Distillation, DistillProgress, DistillResult
from halfweave.pruner.recover.state import load_moments
from halfweave.pruner.recover.windows import Windows
from halfweave.pruner.recovery import Recovery, recover
from halfweave.pruner.source import Source, Trained, token_ids
from halfweave.pruner.staged import Split
from halfweave.runtime.checkpoint import Checkpoint
from safetensors.torch import load_file, save_file
from support.pruning import TEXT, recipe

# The tiny model has two blocks, so two parts.
PARTS = Recovery(calib=str(TEXT), tokens=4096, bits=4, group=32, precision="float32")
ERRORS = ("relative_error", "held_out_error", "baseline_error")


@pytest.fixture(scope="module")
def floats(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, 2:4 with 16 bits."""
    directory = tmp_path_factory.mktemp("floats") / "floats"
    prune(tiny_model, directory, recipe())
    return directory


@pytest.mark.parametrize(("rate", "undone"), [(0.1, 0), (1e4, 2)])
def test_what_ends_in_codes_tells_of_all_trainings_and_roundings(
    rate: float,
    undone: int,
    tiny_model: Path,
    floats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("halfweave.pruner.staged._CODES_RATE", rate)
    told: list[Progress | DistillProgress] = []
    result = recover(floats, tiny_model, tmp_path / "out", PARTS, progress=told.append)
    manifest = read_json(tmp_path / "out" / "halfweave.json")
    record = manifest["provenance"]["recovery"]
    between = record["before_rounding"]
    first = between["before_rounding"]
    assert [each["steps"] for each in (first, between, record)] == [2, 1, 1]
    assert (result.tokens, result.steps, result.trainings) == (4096, 4, 3)
    assert result.before == first["held_out_kl"]["before"]
    assert result.after == record["held_out_kl"]["after"]
    ends = [each["held_out_kl"] for each in (first, between, record)]
    assert [each.before for each in result.roundings] == [end["after"] for end in ends[:2]]
    assert [each.after for each in result.roundings] == [end["before"] for end in ends[1:]]
    assert result.undone == undone and not result.rolled_back
    assert [point.tokens for point in result.curve] == [1024, 2048, 3072, 4096]
    training = [note for note in told if isinstance(note, DistillProgress)]
    assert result.minutes is not None
    assert result.minutes >= sum(training[at].minutes for at in (1, 2, 3))
    for entry in manifest["linears"].values():
        assert [entry[name] for name in ERRORS] == [None] * 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "calibration tokens, median | not measured |" in card
    assert "Trained on 4096 tokens" in card
    assert f"held-out text: {result.before:.4f} -> {result.after:.4f} nats" in card
    for rounding in result.roundings:
        assert f"from {rounding.before:.4f} to {rounding.after:.4f}" in card
    assert (f"Of 3 trainings {undone} did not help" in card) == bool(undone)
    assert "as they were" not in card and "those from before" not in card


def test_a_part_is_rounded_while_the_others_stay_as_they_are(
    tiny_model: Path, floats: Path, tmp_path: Path
) -> None:
    source = Trained.of(Source.open(tiny_model), Checkpoint.open(floats))
    codes = recipe(bits=4, group=32)
    plan = make_plan(source, codes)
    sample = draw_sample(source, load_text(str(TEXT)), codes)
    told: list[Progress] = []
    OneShot(source, tmp_path, codes, plan, sample, told.append, range(1, 2)).ensure()
    assert [step.done for step in told] == list(range(8, 15))
    assert told[-1].eta_seconds == 0
    before, after = Checkpoint.open(floats), Checkpoint.open(tmp_path)
    for name in after.linears:
        is_rounded = ".layers.1." in name
        assert after.linears[name].format == ("sparse24_int4" if is_rounded else "sparse24")
        if not is_rounded:
            pairs = before.linear(name).tensors(), after.linear(name).tensors()
            assert all(torch.equal(pairs[0][suffix], pairs[1][suffix]) for suffix in pairs[0])


def test_the_rounding_may_move_masks(tiny_model: Path, floats: Path, tmp_path: Path) -> None:
    recover(floats, tiny_model, tmp_path / "out", PARTS)
    before, after = Checkpoint.open(floats), Checkpoint.open(tmp_path / "out")
    metas = [(before.linear(n).tensors(), after.linear(n).tensors()) for n in after.linears]
    assert not all(torch.equal(old["meta"], new["meta"]) for old, new in metas)


@pytest.mark.parametrize("steps", [2, 4])  # as floats, or of all trainings
def test_a_stopped_run_goes_on_to_the_same_end_and_makes_up_no_time(
    tiny_model: Path, floats: Path, tmp_path: Path, steps: int
) -> None:
    told: list[DistillProgress] = []

    def stop(step: Progress | DistillProgress) -> None:
        if isinstance(step, DistillProgress):
            told.append(step)
        if len(told) == steps and (steps == 4 or isinstance(step, Progress)):
            raise KeyboardInterrupt

    whole = recover(floats, tiny_model, tmp_path / "whole", PARTS)
    with pytest.raises(KeyboardInterrupt):
        recover(floats, tiny_model, tmp_path / "out", PARTS, progress=stop)
    result = recover(floats, tiny_model, tmp_path / "out", PARTS, resume=True)
    assert result.minutes is None
    assert timeless(result) == timeless(whole)
    record = read_json(tmp_path / "out" / "halfweave.json")["provenance"]["recovery"]
    assert timeless(DistillResult.of_record(result.path, record)) == timeless(whole)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()


def test_a_training_goes_on_with_the_moments_and_windows_of_the_one_before(
    tiny_model: Path, floats: Path, tmp_path: Path
) -> None:
    source, words = Source.open(tiny_model), TEXT.read_text()

    def losses(student: Path, out: str, steps: int, link: Link) -> list[float]:
        (tmp_path / out).mkdir()
        chosen = Distillation(tokens=1024 * steps, held_out=2, precision="float32")
        told: list[DistillProgress] = []
        distill(student, source, tmp_path / out, words, chosen, link=link, progress=told.append)
        return [step.loss for step in told]

    whole = losses(floats, "whole", 3, Link())
    first = losses(floats, "first", 2, Link(goes_on=True))
    then = losses(tmp_path / "first", "then", 1, Link(tmp_path / "first"))
    assert first == whole[:2]
    assert then == pytest.approx(whole[2:], rel=1e-3)  # bf16 weights lie in between

    known = load_moments(tmp_path / "first")
    assert known is not None and known[1] == 2 and load_moments(tmp_path / "then") is None
    chosen = Distillation(tokens=1024, held_out=2, precision="float32")
    windows = Windows.cut(token_ids(source, words), chosen.length, chosen.held_out)
    opened = Checkpoint.open(tmp_path / "first"), None
    trainer, _ = make_trainer(source, opened, windows, chosen, 0)
    trainer.adopt(*known)
    found = trainer.moments()
    assert found.keys() == known[0].keys() and trainer.taken == 2
    assert all(torch.equal(found[name], moment) for name, moment in known[0].items())
    assert any(moment.any() for moment in found.values())


def test_a_training_of_codes_goes_on_from_a_saved_state_to_the_same_bytes(
    tiny_model: Path, floats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfweave.pruner.recover.run.Run._due", lambda _: True)  # save each step
    monkeypatch.setattr("halfweave.pruner.staged._CODES_RATE", 3.0)  # so that codes move
    chosen = replace(PARTS, tokens=1024 * 26)  # 3 steps behind the first part
    told: list[DistillProgress] = []

    def stop(step: Progress | DistillProgress) -> None:
        told.extend([step] if isinstance(step, DistillProgress) else [])
        if len(told) == 24:
            raise KeyboardInterrupt

    assert recover(floats, tiny_model, tmp_path / "whole", chosen).undone == 0
    with pytest.raises(KeyboardInterrupt):
        recover(floats, tiny_model, tmp_path / "out", chosen, progress=stop)
    assert (told[-1].tokens, told[-1].total_tokens) == (2048, 3072)
    recover(floats, tiny_model, tmp_path / "out", chosen, resume=True)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()


def trained(
    student: Path, parent: Path, out: Path, link: Link, rate: float = 1e-3
) -> DistillResult:
    """Two steps."""
    out.mkdir()
    asked = Distillation(tokens=2048, held_out=2, precision="float32", learning_rate=rate)
    return distill(student, Source.open(parent), out, TEXT.read_text(), asked, link=link)


def test_moments_go_on_where_a_trained_weight_was_stored_as_zero(
    tiny_model: Path, tmp_path: Path
) -> None:
    """As fp16 does with what is below 3e-8; the mask of a format without slots is smaller then."""
    prune(tiny_model, tmp_path / "half", recipe(pattern="50%"))
    first, name = tmp_path / "first", "model.layers.0.mlp.down_proj"
    trained(tmp_path / "half", tiny_model, first, Link(goes_on=True))
    file = Checkpoint.open(first).file_of(f"{name}.weight")
    tensors = load_file(file)
    row, column = tensors[f"{name}.weight"].nonzero()[0]
    tensors[f"{name}.weight"][row, column] = 0
    save_file(tensors, file, {"format": "pt"})
    manifest = read_json(first / "halfweave.json")
    manifest["files"][file.name]["sha256"] = sha256_file(file)
    write_json(first / "halfweave.json", manifest)
    result = trained(first, tiny_model, tmp_path / "then", Link(first))
    assert not result.rolled_back


def test_a_training_that_is_put_back_hands_on_the_moments_that_it_was_given(
    tiny_model: Path, floats: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    trained(floats, tiny_model, first, Link(goes_on=True))
    result = trained(first, tiny_model, second, Link(first, goes_on=True), rate=5.0)
    assert result.rolled_back
    given, handed = load_moments(first), load_moments(second)
    assert given is not None and handed is not None
    assert given[1] == handed[1] == 2
    assert all(torch.equal(handed[0][name], moment) for name, moment in given[0].items())


def test_what_rounds_a_trained_model_is_fitted_to_all_its_windows(
    tiny_model: Path, floats: Path
) -> None:
    codes = recipe(bits=4, group=32, calib_windows=64)
    plan = make_plan(Source.open(tiny_model), codes)
    dense = Source.open(tiny_model)
    for source, held_out in ((dense, 4), (Trained.of(dense, Checkpoint.open(floats)), 0)):
        assert BlockPruner(source, codes, plan, lambda *_: None).held_out == held_out


def timeless(result: DistillResult) -> DistillResult:
    curve = tuple(replace(point, minutes=None) for point in result.curve)
    return replace(result, path=Path(), minutes=None, curve=curve)


def test_one_step_cannot_be_parted(tiny_model: Path, floats: Path, tmp_path: Path) -> None:
    chosen = replace(PARTS, tokens=2047)
    with pytest.raises(UsageError, match="2047 tokens are one step of 1024") as caught:
        recover(floats, tiny_model, tmp_path / "out", chosen)
    assert "2048" in str(caught.value.hint)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_trainings_take_the_tokens_that_were_asked_for_and_no_more(parts: int) -> None:
    for steps in range(parts + 1, 80):
        shared = Split(Distillation(tokens=1024 * steps + 1023), parts)
        each = [shared.settings(number).tokens for number in range(parts + 1)]
        assert sum(each) == 1024 * steps
        assert min(each) >= 1024
        behind = 0.12 * (parts - 1) + 0.06
        assert abs(each[0] / sum(each) - (1 - behind)) <= parts / steps


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_tokens_of_a_timed_run_are_shared_out_as_the_clock_did(parts: int) -> None:
    timed = Split(Distillation(minutes=20.0), parts)
    assert timed.settings(0).minutes == pytest.approx(20 * (1 - 0.12 * (parts - 1) - 0.06))
    for steps in range(1, 80):
        later = [timed.settings(n, 1024 * steps).tokens for n in range(1, parts + 1)]
        again = Split(Distillation(tokens=1024 * steps + sum(later)), parts)
        assert [again.settings(n).tokens for n in range(parts + 1)] == [1024 * steps, *later]


def test_rates_fall_from_one_training_to_the_next() -> None:
    shared = Split(Distillation(tokens=1024 * 100, learning_rate=2.0, final_rate=0.1), 3)
    each = [shared.settings(number) for number in range(4)]
    begin = [one.learning_rate for one in each]
    end = [one.learning_rate * one.final_rate for one in each]
    assert begin == pytest.approx([2.0, 0.8, 0.6, 0.4])
    assert end == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert [one.code_share for one in each] == [1.0, 0.1, 0.1, 0.1]


def training(before: float, after: float, minutes: float | None) -> DistillResult:
    """One training of 2048 tokens, rolled back if it did not help."""
    return DistillResult(
        Path("out"), 2048, 2, before, min(before, after), int(after >= before), (), minutes
    )


def test_the_line_of_a_recovery_tells_all_of_it() -> None:
    plain = tables.recovery(training(0.8, 0.5, 1.5))
    kl = "KL from the dense model on held-out text"
    assert plain == f"2048 tokens in 1.5 min, {kl} 0.800 -> 0.500"
    undone = tables.recovery(training(0.8, 0.9, 1.5))
    assert undone.endswith("1.5 min, it did not help, the weights are those from before it")
    both = training(0.6, 0.7, 0.5).behind(training(0.8, 0.5, 1.5))
    assert tables.recovery(both).splitlines() == [
        f"4096 tokens in 2.0 min, {kl} 0.800 -> 0.600",
        "  rounding blocks to codes took it from 0.500 to 0.600",
        "  1 of 2 trainings did not help: undone",
    ]


def test_the_line_of_a_recovery_in_which_nothing_helped() -> None:
    result = training(0.9, 0.9, 0.5).behind(training(0.8, 0.8, None))
    assert result.rolled_back
    first, *others = tables.recovery(result).splitlines()
    assert "4096 tokens in an unknown time, " in first and first.endswith(" 0.800 -> 0.900")
    assert others == [
        "  rounding blocks to codes took it from 0.800 to 0.900",
        "  2 of 2 trainings did not help: undone",
    ]
