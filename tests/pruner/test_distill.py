"""Recovery of whole checkpoints: it helps, keeps masks and formats, and survives mishaps."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from halfweave.errors import (
    CapacityError,
    CheckpointError,
    HalfweaveError,
    RefusedError,
    UsageError,
)
from halfweave.files import disk_full_as_error
from halfweave.kernels.formats import Dense, Int4, Int8, PackedLinear, Sparse24, Sparse24Int4
from halfweave.kernels.schema import LinearFormat, QuantizationConfig
from halfweave.pruner.budget.check import BudgetCheck
from halfweave.pruner.card import budget_section
from halfweave.pruner.recover.distill import distill
from halfweave.pruner.recover.settings import Distillation, DistillProgress
from halfweave.pruner.recover.state import STATE_FILE
from halfweave.pruner.source import Source
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.eval import evaluate
from halfweave.runtime.model import Model, load_model
from safetensors.torch import load_file, save_file
from support.pruning import TEXT, everything, set_weight
from support.tiny import edit_json, pack_directory, write_manifest

WORDS = TEXT.read_text()
STEP = {"length": 32, "batch_tokens": 64, "micro_tokens": 32}
STEPS = 8
SMALL = {
    **STEP,
    "tokens": 64 * STEPS,
    "held_out": 4,
    "hidden_blocks": 2,
    "hidden_weight": 1.0,
    "learning_rate": 0.02,
    "scale_rate": 1e-3,
    "warmup_steps": 4,
    "save_minutes": 0.0,
    "precision": "float32",
}


def settings(**changes: object) -> Distillation:
    return Distillation(**{**SMALL, **changes})  # type: ignore[arg-type]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


@pytest.fixture(scope="module")
def mixed_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a different format in each linear, and one with a bare zero pattern."""
    directory = tmp_path_factory.mktemp("mixed") / "mixed"
    pack_directory(tiny_model, directory, "sparse24_int4")
    dense = load_file(tiny_model / "model.safetensors")
    tensors = load_file(directory / "model.safetensors")
    checkpoint = Checkpoint.open(directory)
    entries: dict[str, LinearFormat] = {}
    for index, name in enumerate(sorted(checkpoint.linears)):
        packed = in_format(index % 6, checkpoint.linear(name), dense[f"{name}.weight"])
        for suffix in ("values", "meta", "scale"):
            del tensors[f"{name}.{suffix}"]
        tensors.update({f"{name}.{suffix}": t for suffix, t in packed.tensors().items()})
        if not isinstance(packed, Dense):
            grouped = isinstance(packed, Int4 | Sparse24Int4)
            entries[name] = LinearFormat(packed.kind, packed.shape, 32 if grouped else None)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    block = QuantizationConfig(entries).to_json()
    edit_json(directory / "config.json", lambda config: config.update(quantization_config=block))
    (directory / "halfweave.json").unlink()
    write_manifest(directory)
    return directory


def in_format(which: int, sparse: PackedLinear, dense: torch.Tensor) -> PackedLinear:
    assert isinstance(sparse, Sparse24Int4)
    if which == 0:
        return sparse
    if which == 1:
        return Sparse24.from_dense(sparse.unpack(torch.bfloat16))
    if which == 2:
        return Dense(sparse.unpack(torch.bfloat16))
    if which == 3:
        return Dense(dense)
    if which == 4:
        return Int8.from_dense(dense)
    codes = torch.randint(-8, 8, sparse.shape, generator=torch.Generator().manual_seed(5))
    return Int4.from_codes(codes, sparse.scale, 32)


def nats(model: Path, parent: Path) -> float:
    """KL from the parent on this text, by the runtime and not by the trainer's own measure."""
    loaded: list[Model] = [load_model(path) for path in (model, parent)]
    result = evaluate(loaded[0], WORDS, window=64, against=loaded[1])
    assert result.kl is not None
    return result.kl


def test_held_out_kl_falls_and_the_runtime_agrees(
    tiny_model: Path, packed_model: Path, out: Path
) -> None:
    told: list[DistillProgress] = []
    chosen = settings(tokens=64 * 40)
    result = distill(
        packed_model, Source.open(tiny_model), out, WORDS, chosen, progress=told.append
    )
    assert not result.rolled_back
    assert result.after < 0.8 * result.before
    assert result.tokens == 64 * 40
    assert nats(out, tiny_model) < 0.9 * nats(packed_model, tiny_model)
    assert [point.tokens for point in result.curve][-1] == result.tokens
    assert result.curve[-1].kl == result.after
    assert [note.tokens for note in told] == list(range(64, 64 * 41, 64))
    measured = [note.held_out for note in told if note.held_out is not None]
    assert measured == [point.kl for point in result.curve[:-1]]
    assert len(measured) == chosen.curve_points


def test_masks_formats_and_names_stay_and_only_numbers_change(
    tiny_model: Path, mixed_model: Path, out: Path
) -> None:
    """Every format at once, in one checkpoint that loads afterwards."""
    result = distill(mixed_model, Source.open(tiny_model), out, WORDS, settings())
    assert not result.rolled_back
    before, after = Checkpoint.open(mixed_model), Checkpoint.open(out)
    assert after.linears == before.linears
    assert after.names() == before.names()
    names = [name for name in before.names() if name.endswith("proj.weight")]
    linears = {name.removesuffix(".weight") for name in names} | set(before.linears)
    assert len(linears) == 14
    for name in linears:
        old, new = before.linear(name), after.linear(name)
        assert type(old) is type(new)
        assert not torch.equal(old.unpack(), new.unpack()), name
        assert not new.unpack()[old.unpack() == 0].any() or not isinstance(old, Dense)
        if isinstance(old, Sparse24 | Sparse24Int4):
            assert torch.equal(old.meta, new.tensors()["meta"])
    for name in before.names():
        assert before.tensor(name).dtype == after.tensor(name).dtype
    for name in ("model.embed_tokens.weight",):
        assert torch.equal(before.tensor(name), after.tensor(name))
    gain = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(before.tensor(gain), after.tensor(gain))
    assert nats(out, tiny_model) < nats(mixed_model, tiny_model)


def test_the_measured_end_is_what_was_written(
    tiny_model: Path, mixed_model: Path, out: Path, tmp_path: Path
) -> None:
    """Training on starts at exactly the KL where the stored model was measured."""
    first = distill(mixed_model, Source.open(tiny_model), out, WORDS, settings())
    second = tmp_path / "second"
    second.mkdir()
    again = distill(out, Source.open(tiny_model), second, WORDS, settings())
    assert again.before == first.after


def test_the_manifest_tells_what_was_done_and_holds_no_times(
    tiny_model: Path, packed_model: Path, out: Path
) -> None:
    result = distill(packed_model, Source.open(tiny_model), out, WORDS, settings(ce=0.1))
    document = json.loads((out / "halfweave.json").read_text())
    recovery = document["provenance"]["recovery"]
    assert recovery["held_out_kl"] == {"before": result.before, "after": result.after}
    assert recovery["tokens"] == 64 * STEPS
    assert recovery["settings"]["ce"] == 0.1
    assert [point["tokens"] for point in recovery["curve"]] == [128, 192, 320, 384, 512]
    assert "minutes" not in json.dumps(document)
    assert str(out) not in json.dumps(document)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in packed_model.iterdir()
    )


@pytest.mark.parametrize(("rate", "error"), [(0.02, None), (30.0, 0.5)])
def test_layer_errors_are_forgotten_only_where_weights_changed(
    rate: float,
    error: float | None,
    tiny_model: Path,
    packed_model: Path,
    out: Path,
    copy_of: Callable[[Path], Path],
) -> None:
    student, name = copy_of(packed_model), "model.layers.1.mlp.up_proj"
    errors = dict.fromkeys(("relative_error", "held_out_error", "baseline_error"), 0.5)
    entry = {"format": "sparse24_int4", "method": "sparsegpt", **errors}
    edit_json(student / "halfweave.json", lambda d: d.update(linears={name: entry}))
    distill(student, Source.open(tiny_model), out, WORDS, settings(learning_rate=rate))
    manifest = json.loads((out / "halfweave.json").read_text())
    assert manifest["linears"] == {name: {**entry, **dict.fromkeys(errors, error)}}


@pytest.mark.parametrize(("rate", "kept"), [(0.02, False), (30.0, True)])
def test_the_outcome_of_a_budget_is_told_only_of_the_weights_it_was_measured_on(
    rate: float,
    kept: bool,
    tiny_model: Path,
    packed_model: Path,
    out: Path,
    copy_of: Callable[[Path], Path],
) -> None:
    student = copy_of(packed_model)
    found = BudgetCheck(1.15, 0.01, 0.5, met=True)
    outcome = {"base": {}, "budget": asdict(found)}
    edit_json(student / "halfweave.json", lambda d: d.update(provenance=outcome))
    (student / "README.md").write_text("# model\n" + budget_section(found) + "\n## Mine\n\nwords\n")
    distill(student, Source.open(tiny_model), out, WORDS, settings(learning_rate=rate))
    provenance = json.loads((out / "halfweave.json").read_text())["provenance"]
    card = (out / "README.md").read_text()
    assert provenance.keys() == {"base", "recovery"} | ({"budget"} if kept else set())
    assert ("nothing was fitted to" in card) == ("## Budget" in card) == kept
    assert card.startswith("# model\n\n## ")
    assert card.index("\n## Mine\n\nwords\n") < card.index("\n## Recovery\n")


def test_same_seed_same_bytes_other_seed_other_bytes(
    tiny_model: Path, packed_model: Path, tmp_path: Path
) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        distill(packed_model, Source.open(tiny_model), tmp_path / name, WORDS, settings(seed=seed))
        found.append(everything(tmp_path / name))
    assert found[0] == found[1]
    assert found[0]["model.safetensors"] != found[2]["model.safetensors"]


def test_passes_of_another_size_take_the_same_steps(
    tiny_model: Path, packed_model: Path, tmp_path: Path
) -> None:
    results = []
    for micro in (32, 64):
        (tmp_path / str(micro)).mkdir()
        chosen = settings(micro_tokens=micro)
        results.append(
            distill(
                packed_model, Source.open(tiny_model), tmp_path / str(micro), WORDS, chosen
            ).after
        )
    assert results[0] == pytest.approx(results[1], rel=0.02)


def test_training_that_does_not_help_is_rolled_back(
    tiny_model: Path, packed_model: Path, out: Path
) -> None:
    result = distill(
        packed_model, Source.open(tiny_model), out, WORDS, settings(learning_rate=30.0)
    )
    assert result.rolled_back
    assert result.after == result.before < result.curve[-1].kl
    old, new = everything(packed_model), everything(out)
    for name in old.keys() - {"halfweave.json", "README.md"}:
        if name.endswith(".safetensors"):
            assert load_equal(old[name], new[name])
        else:
            assert old[name] == new[name]
    assert json.loads(new["halfweave.json"])["provenance"]["recovery"]["rolled_back"] is True
    load_model(out)


def load_equal(one: bytes, other: bytes) -> bool:
    from safetensors.torch import load

    a, b = load(one), load(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def interrupted(student: Path, parent: Path, out: Path, step: int, chosen: Distillation) -> None:
    """Leave a run behind that an exception stopped after `step` steps."""

    def stop(note: DistillProgress) -> None:
        if note.tokens == step * 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(student, Source.open(parent), out, WORDS, chosen, progress=stop)


@pytest.mark.parametrize("step", [1, 5, STEPS])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    step: int, tiny_model: Path, mixed_model: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = distill(mixed_model, Source.open(tiny_model), whole, WORDS, settings())
    interrupted(mixed_model, tiny_model, broken, step, settings())
    with pytest.raises(CheckpointError):
        Checkpoint.open(broken)
    steps: list[int] = []
    result = distill(
        mixed_model,
        Source.open(tiny_model),
        broken,
        WORDS,
        settings(),
        resume=True,
        progress=lambda note: steps.append(note.tokens // 64),
    )
    assert steps == list(range(step + 1, STEPS + 1))
    assert everything(broken) == everything(whole)
    assert [point.kl for point in result.curve] == [point.kl for point in expected.curve]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from halfweave.pruner.recover.distill import distill
from halfweave.pruner.recover.settings import Distillation
from halfweave.pruner.source import Source

torch.set_num_threads(1)
student, parent, out, text = map(Path, sys.argv[1:5])

def kill(note):
    if note.tokens == 64 * 5:
        os.kill(os.getpid(), signal.SIGKILL)

settings = Distillation(**eval(sys.argv[5]))
distill(student, Source.open(parent), out, text.read_text(), settings, progress=kill)
"""


def test_a_killed_process_goes_on_to_the_same_bytes(
    tiny_model: Path, packed_model: Path, out: Path, tmp_path: Path
) -> None:
    paths = [str(path) for path in (packed_model, tiny_model, out, TEXT)]
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, *paths, repr(SMALL)], capture_output=True, timeout=120
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr[-2000:]
    (out / f".{STATE_FILE}.abc.tmp").write_bytes(b"half")  # a kill in the middle of a save
    distill(packed_model, Source.open(tiny_model), out, WORDS, settings(), resume=True)
    whole = tmp_path / "whole"
    whole.mkdir()
    distill(packed_model, Source.open(tiny_model), whole, WORDS, settings())
    assert everything(out) == everything(whole)


def test_a_state_of_another_run_is_refused_and_a_damaged_one_named(
    tiny_model: Path, packed_model: Path, out: Path
) -> None:
    interrupted(packed_model, tiny_model, out, 3, settings())
    with pytest.raises(RefusedError, match="settings changed"):
        distill(packed_model, Source.open(tiny_model), out, WORDS, settings(seed=9), resume=True)
    with pytest.raises(RefusedError, match="text changed"):
        distill(packed_model, Source.open(tiny_model), out, WORDS + "!", settings(), resume=True)
    state = out / STATE_FILE
    state.write_bytes(state.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"halfweave-distill"):
        distill(packed_model, Source.open(tiny_model), out, WORDS, settings(), resume=True)
    distill(packed_model, Source.open(tiny_model), out, WORDS, settings())
    assert not state.exists()


def test_minutes_are_turned_into_a_number_of_steps_once(
    tiny_model: Path, packed_model: Path, out: Path, tmp_path: Path
) -> None:
    timed = distill(
        packed_model,
        Source.open(tiny_model),
        out,
        WORDS,
        settings(tokens=0, minutes=0.01, curve_points=0),
    )
    assert timed.steps >= 4
    again = tmp_path / "again"
    again.mkdir()
    counted = settings(tokens=timed.tokens, curve_points=0)
    distill(packed_model, Source.open(tiny_model), again, WORDS, counted)
    assert everything(again) == everything(out)


def test_a_loss_that_is_not_finite_names_the_step_and_leaves_no_checkpoint(
    tiny_model: Path, packed_model: Path, out: Path
) -> None:
    wild = settings(learning_rate=1e30, gain_rate=1e30)
    with pytest.raises(HalfweaveError, match=r"loss of step \d+ is not finite") as caught:
        distill(packed_model, Source.open(tiny_model), out, WORDS, wild)
    assert "learning rate below 1e+30" in str(caught.value.hint)
    assert not (out / "halfweave.json").exists()


def test_a_student_that_is_not_finite_to_begin_with_is_named_as_such(
    tiny_model: Path, packed_model: Path, out: Path, copy_of: Callable[[Path], Path]
) -> None:
    student = copy_of(packed_model)
    set_weight(student, "model.norm.weight", lambda gains: gains.fill_(float("nan")))
    (student / "halfweave.json").unlink()
    write_manifest(student)
    with pytest.raises(HalfweaveError, match="not finite even untrained"):
        distill(student, Source.open(tiny_model), out, WORDS, settings())


def test_a_full_disk_loses_nothing(
    tiny_model: Path, packed_model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(packed_model, tiny_model, out, 5, settings())
    state = (out / STATE_FILE).read_bytes()

    def full(path: Path, write: object) -> None:
        with disk_full_as_error(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("halfweave.pruner.tensors.write_atomically", full)
        with pytest.raises(CapacityError, match="disk is full"):
            distill(packed_model, Source.open(tiny_model), out, WORDS, settings(), resume=True)
    assert (out / STATE_FILE).read_bytes() == state
    distill(packed_model, Source.open(tiny_model), out, WORDS, settings(), resume=True)
    whole = tmp_path / "whole"
    whole.mkdir()
    distill(packed_model, Source.open(tiny_model), whole, WORDS, settings())
    assert everything(out) == everything(whole)


def test_what_cannot_work_is_refused_before_anything_is_trained(
    tiny_model: Path, packed_model: Path, out: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="8 tokens; 4 held-out"):
        distill(packed_model, Source.open(tiny_model), out, "too short", settings())
    with pytest.raises(RefusedError, match="is an input"):
        distill(packed_model, Source.open(tiny_model), packed_model, WORDS, settings())
    with pytest.raises(RefusedError, match="was not made by halfweave"):
        distill(tiny_model, Source.open(tiny_model), out, WORDS, settings())
    assert not list(out.iterdir())


def test_windows_are_no_longer_than_the_model_s_context() -> None:
    fitted = Distillation(length=512, batch_tokens=1024).fitted(300)
    assert (fitted.length, fitted.batch_tokens) == (300, 900)
    for context in (512, 4096, None):
        assert Distillation(length=512).fitted(context) == Distillation(length=512)


def test_a_parent_that_is_not_the_one_is_refused(
    tiny_model: Path, packed_model: Path, out: Path, copy_of: Callable[[Path], Path]
) -> None:
    student = copy_of(packed_model)
    base = {"base": {"sha256": {"config.json": "0" * 64}}}
    edit_json(student / "halfweave.json", lambda document: document.update(provenance=base))
    with pytest.raises(RefusedError, match="was not pruned from"):
        distill(student, Source.open(tiny_model), out, WORDS, settings())


def test_an_untied_head_is_used_and_stays(tmp_path: Path, out: Path) -> None:
    from support.tiny import Tiny, save_tiny

    parent = save_tiny(tmp_path / "untied", Tiny(tied=False))
    student = pack_directory(parent, tmp_path / "packed-untied", "sparse24")
    result = distill(student, Source.open(parent), out, WORDS, settings())
    assert result.after < result.before
    before, after = Checkpoint.open(student), Checkpoint.open(out)
    assert torch.equal(before.tensor("lm_head.weight"), after.tensor("lm_head.weight"))
    assert nats(out, parent) < nats(student, parent)
