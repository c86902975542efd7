"""A run stopped by a kill, a full disk or a person goes on to the same bytes, or is refused."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from halfweave.errors import CapacityError, CheckpointError, RefusedError
from halfweave.pruner.journal import Journal, locked
from halfweave.pruner.oneshot import Progress
from halfweave.pruner.outdir import STEPS_DIRECTORY
from halfweave.pruner.pipeline import plan_prune, prune
from halfweave.pruner.recipe import Recipe
from halfweave.pruner.recover.state import STATE_FILE
from halfweave.runtime.checkpoint import Checkpoint
from support.pruning import everything, recipe, set_weight
from support.tiny import Tiny, save_tiny

Copy = Callable[[Path], Path]
HELPER = Path(__file__).parents[1] / "support" / "kill_every_write.py"


@pytest.mark.timeout(1600)  # some twenty processes, one behind the other
def test_row_13_a_kill_before_any_write_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", Tiny(layers=2, hidden=16, intermediate=32, heads=2))
    result = subprocess.run(
        [sys.executable, str(HELPER), str(model), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.split()[-1]) >= 15


def interrupted(model: Path, out: Path, chosen: Recipe) -> None:
    """Leave an unfinished run behind, stopped in the second block."""

    def stop(progress: Progress) -> None:
        if progress.done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, out, chosen, progress=stop)


def test_row_13_an_interrupted_run_must_be_resumed_and_can_be(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted(tiny_model, out, recipe())
    with pytest.raises(CheckpointError, match="incomplete"):
        Checkpoint.open(out)
    with pytest.raises(RefusedError, match="an unfinished run") as caught:
        prune(tiny_model, out, recipe())
    assert "--resume" in str(caught.value.hint)
    result = prune(tiny_model, out, recipe(), resume=True)
    assert result.resumed_blocks == 1
    assert result.recovery_seconds is None  # it cannot know of what the other process did
    prune(tiny_model, tmp_path / "whole", recipe())
    assert everything(out) == everything(tmp_path / "whole")


def test_row_13_half_a_journal_line_is_passed_over(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(tiny_model, out, recipe())
    journal = out / ".halfweave-journal.jsonl"
    whole = journal.read_bytes().splitlines(keepends=True)
    last_shard = max(i for i, line in enumerate(whole) if b"shard" in line)
    journal.write_bytes(b"".join(whole[:last_shard]) + whole[last_shard][:40])
    assert prune(tiny_model, out, recipe(), resume=True).resumed_blocks == 0
    prune(tiny_model, tmp_path / "whole", recipe())
    assert everything(out) == everything(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "key"),
    [({"seed": 9}, "recipe"), ({"method": "wanda"}, "recipe"), ({"calib_windows": 5}, "recipe")],
)
def test_row_14_a_changed_recipe_is_not_resumed(
    tiny_model: Path, tmp_path: Path, change: dict[str, object], key: str
) -> None:
    interrupted(tiny_model, tmp_path / "out", recipe())
    with pytest.raises(RefusedError, match=f"cannot resume: .*{key}"):
        prune(tiny_model, tmp_path / "out", recipe(**change), resume=True)


def test_row_14_changed_base_weights_are_not_resumed(
    tiny_model: Path, copy_of: Copy, tmp_path: Path
) -> None:
    model = copy_of(tiny_model)
    interrupted(model, tmp_path / "out", recipe())
    set_weight(model, "model.norm.weight", lambda w: w.add_(1))
    with pytest.raises(RefusedError, match="cannot resume: base changed"):
        prune(model, tmp_path / "out", recipe(), resume=True)


def test_row_14_another_thread_count_is_not_resumed(tiny_model: Path, tmp_path: Path) -> None:
    interrupted(tiny_model, tmp_path / "out", recipe())
    torch.set_num_threads(2)
    try:
        with pytest.raises(RefusedError, match="cannot resume: threads changed"):
            prune(tiny_model, tmp_path / "out", recipe(), resume=True)
    finally:
        torch.set_num_threads(1)


def test_a_damaged_finished_shard_stops_the_resume(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(tiny_model, out, recipe())
    shard = out / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors is damaged"):
        prune(tiny_model, out, recipe(), resume=True)


def test_row_15_the_second_of_two_runs_names_the_first(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(tiny_model, out, recipe())
    with locked(out), pytest.raises(RefusedError, match=f"by process {os.getpid()}"):
        prune(tiny_model, out, recipe(), resume=True)
    prune(tiny_model, out, recipe(), resume=True)


def test_row_12_a_disk_that_fills_up_leaves_a_run_that_resumes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = os.fsync

    def fsync(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    out = tmp_path / "out"
    with pytest.raises(CapacityError, match="the disk is full"):
        prune(tiny_model, out, recipe())
    assert not list(out.glob("*.tmp")) and not list(out.glob(".*.tmp"))
    monkeypatch.undo()
    prune(tiny_model, out, recipe(), resume=True)
    prune(tiny_model, tmp_path / "whole", recipe())
    assert everything(out) == everything(tmp_path / "whole")


@pytest.mark.parametrize("removed", [0, 1, 2, None])
def test_a_run_killed_while_it_overwrites_starts_anew(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int | None
) -> None:
    """The kill comes after `removed` files are gone, or (None) all, before the journal begins."""
    out = tmp_path / "out"
    interrupted(tiny_model, out, recipe())
    real, gone = os.unlink, 0

    def unlink(*arguments: Any, **options: Any) -> None:
        nonlocal gone
        if gone == removed:
            raise KeyboardInterrupt
        gone += (out / Path(arguments[0]).name).exists()
        real(*arguments, **options)

    def begin(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(Journal, "begin", begin)
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_model, out, recipe(), overwrite=True)
    monkeypatch.undo()
    with pytest.raises(RefusedError, match="an unfinished run"):
        prune(tiny_model, out, recipe())
    assert prune(tiny_model, out, recipe(), resume=True).resumed_blocks == 0
    prune(tiny_model, tmp_path / "whole", recipe())
    assert everything(out) == everything(tmp_path / "whole")


def test_a_run_killed_while_it_overwrites_may_be_resumed_as_another(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prune(tiny_model, out, recipe())
    (out / STATE_FILE).write_bytes(b"of a training long ago")

    def unlink(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_model, out, recipe(seed=1), overwrite=True)
    monkeypatch.undo()
    prune(tiny_model, out, recipe(seed=2), resume=True)
    prune(tiny_model, tmp_path / "whole", recipe(seed=2))
    assert everything(out) == everything(tmp_path / "whole")


def test_a_resumed_run_needs_room_only_for_what_is_left(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, chosen in (
        ("plain", recipe()),
        ("distilled", recipe(recover="distill", recover_tokens=1024)),
    ):
        out = tmp_path / name
        interrupted(tiny_model, out, chosen)
        held = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        plan = plan_prune(tiny_model, chosen)
        assert held > plan.output_bytes / 4
        least = plan.output_bytes + plan.scratch_bytes - held
        usage = shutil.disk_usage(tmp_path)
        for free in (least - 1, least):
            found = usage._replace(free=free)
            monkeypatch.setattr(shutil, "disk_usage", lambda _, found=found: found)
            if free < least:
                with pytest.raises(CapacityError, match="are free on the disk"):
                    prune(tiny_model, out, chosen, resume=True)
            else:
                assert prune(tiny_model, out, chosen, resume=True).resumed_blocks == 1
        monkeypatch.undo()


def test_what_a_killed_writer_left_in_a_step_takes_no_room(
    tiny_model: Path, tmp_path: Path
) -> None:
    out, chosen = tmp_path / "out", recipe(recover="distill", recover_tokens=1024)
    interrupted(tiny_model, out, chosen)
    half = out / STEPS_DIRECTORY / "pruned" / ".model-00003-of-00003.safetensors.x.tmp"
    half.write_bytes(b"half")
    seen: list[bool] = []
    prune(tiny_model, out, chosen, resume=True, progress=lambda _: seen.append(half.exists()))
    assert seen and not any(seen)
