"""Pruning on Ray: the same model, whoever solves its linears, and whoever dies meanwhile.

One Ray of two workers for the whole file: it takes its time to start.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from halfweave.errors import HalfweaveError, RefusedError, UsageError
from halfweave.pruner import ray_tasks
from halfweave.pruner.pipeline import prune
from halfweave.pruner.ray_tasks import OnRay, on_ray
from halfweave.runtime.checkpoint import Checkpoint
from support.pruning import TEXT, everything, recipe
from support.tiny import Tiny, save_tiny

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason='needs Ray: pip install "halfweave[ray]"'
)
pytestmark = [needs_ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray with two CPUs that is there already."""
    import ray

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=2**27
    )
    yield str(started.address_info["gcs_address"])
    ray.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture
def tasks(cluster: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnRay]:
    """What a run uses, on the cluster of this file; it does not end it."""
    import ray

    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with on_ray(cluster) as found:
        yield found


def same_masks(one: Path, other: Path) -> bool:
    first, second = Checkpoint.open(one), Checkpoint.open(other)
    return all(
        torch.equal(first.linear(name).unpack() != 0, second.linear(name).unpack() != 0)
        for name in first.linears
    )


@pytest.mark.parametrize("changes", [{}, {"bits": 4, "group": 32, "calib_windows": 16}])
def test_the_bytes_are_those_of_a_run_without_ray(
    changes: dict[str, object], tasks: OnRay, tiny_model: Path, tmp_path: Path
) -> None:
    assert tasks.workers == 2
    prune(tiny_model, tmp_path / "here", recipe(**changes))
    prune(tiny_model, tmp_path / "there", recipe(**changes), ray="auto")
    assert everything(tmp_path / "here") == everything(tmp_path / "there")


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_rows_parted_among_workers_are_those_of_one(
    method: str, tasks: OnRay, tiny_model: Path, tmp_path: Path
) -> None:
    """Products of fewer rows may round otherwise; masks are the same, errors to five digits."""
    here = prune(tiny_model, tmp_path / "here", recipe(method=method))
    there = prune(tiny_model, tmp_path / "there", recipe(method=method), ray="auto")
    assert same_masks(tmp_path / "here", tmp_path / "there")
    for name, record in here.linears.items():
        assert there.linears[name].relative_error == pytest.approx(record.relative_error, rel=1e-5)


def test_a_task_whose_worker_dies_is_done_again(tasks: OnRay, tmp_path: Path) -> None:
    def kill_once(marker: str, value: int) -> int:
        if not os.path.exists(marker):
            open(marker, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return value + 1

    assert tasks.submit(kill_once, str(tmp_path / "marker"), 41)() == 42
    assert (tmp_path / "marker").exists()


def test_a_worker_killed_in_the_middle_of_a_block_changes_nothing(
    tasks: OnRay, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", Tiny(hidden=96, intermediate=192))
    asked = recipe(bits=4, group=32)
    prune(model, tmp_path / "here", asked)
    killed = []

    def kill(step: object) -> None:
        if not killed and getattr(step, "done", 0) == 4:
            busy = tasks.submit(os.getpid)()
            os.kill(busy, signal.SIGKILL)
            killed.append(busy)

    prune(model, tmp_path / "there", asked, ray="auto", progress=kill)
    assert len(killed) == 1
    assert everything(tmp_path / "here") == everything(tmp_path / "there")


def test_errors_come_back_as_they_were(tasks: OnRay) -> None:
    def refuse() -> None:
        raise RefusedError("a word of its own", "and a hint")

    with pytest.raises(RefusedError, match="a word of its own") as caught:
        tasks.submit(refuse)()
    assert caught.value.hint == "and a hint"


def test_a_task_that_kills_every_worker_ends_the_run_with_a_word(tasks: OnRay) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(HalfweaveError, match="Ray could not do a task") as caught:
        tasks.submit(die)()
    assert "--resume" in str(caught.value.hint)


def test_workers_of_another_version_are_refused(
    cluster: str, tasks: OnRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_tasks, "__version__", "0.0.0")
    with pytest.raises(RefusedError, match="would compute something else"), on_ray(cluster):
        pass


def test_no_ray_and_no_gpu_beside_one(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no Ray at"):
        prune(tiny_model, tmp_path / "out", recipe(), ray="127.0.0.1:1")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("model-*"))


def test_the_command_starts_workers_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = "from halfweave.cli import main; main()"
    flags = ["--calib", str(TEXT), "--calib-windows", "4", "--calib-length", "32"]
    for out, more in (("here", []), ("there", ["--ray", "local"])):
        done = subprocess.run(
            [sys.executable, "-c", program, "prune", tiny_model, tmp_path / out, *flags, *more],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert everything(tmp_path / "here") == everything(tmp_path / "there")
