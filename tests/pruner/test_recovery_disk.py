"""Recovery is refused where the disk has no room for it, before anything is lost."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path

import pytest
from halfweave.errors import CapacityError
from halfweave.pruner.oneshot import Progress
from halfweave.pruner.pipeline import plan_prune, prune
from halfweave.pruner.recover.settings import DistillProgress
from halfweave.pruner.recovery import Recovery, plan_recover, recover
from halfweave.runtime.checkpoint import Checkpoint
from support.pruning import TEXT, everything, recipe


@pytest.fixture(scope="module")
def floats(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("floats") / "floats"
    prune(tiny_model, directory, recipe())
    return directory


def asked(bits: int) -> Recovery:
    return Recovery(calib=str(TEXT), tokens=4096, bits=bits, group=32, precision="float32")


@pytest.mark.parametrize("bits", [16, 4])
def test_the_plan_counts_all_that_a_recovery_writes(
    bits: int, tiny_model: Path, floats: Path, tmp_path: Path
) -> None:
    out, seen = tmp_path / "out", [0]

    def look(_: Progress | DistillProgress) -> None:
        seen.append(sum(file.stat().st_size for file in out.rglob("*.safetensors")))

    paths = (floats, tiny_model, out)
    plan = plan_recover(*paths, asked(bits))
    recover(*paths, asked(bits), progress=look)
    kept = sum(prod(linear.shape) for linear in plan_prune(tiny_model, recipe()).linears) // 2
    state = 2 * 3 * 4 * kept  # latents and two moments, and those before while they are replaced
    model = Checkpoint.open(floats).weight_bytes
    if bits == 16:
        assert plan.disk_bytes == model + state
    else:  # the training before and its rounding lie beside the output, and moments to go on with
        assert model < max(seen) <= plan.disk_bytes - state


@pytest.mark.parametrize("bits", [16, 4])
def test_a_recovery_without_room_leaves_the_model_it_was_to_replace(
    bits: int, tiny_model: Path, floats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prune(tiny_model, out, recipe())
    before = everything(out)
    held = sum(map(len, before.values()))  # counts as free: it is to be removed
    least = plan_recover(floats, tiny_model, out, asked(bits)).disk_bytes - held
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=least - 1))
    with pytest.raises(CapacityError, match=rf"{least - 1} are free .* {held} used in it already"):
        recover(floats, tiny_model, out, asked(bits), overwrite=True)
    assert everything(out) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=least))
    recover(floats, tiny_model, out, asked(bits), overwrite=True)
    assert Checkpoint.open(out).manifest != Checkpoint.open(floats).manifest
