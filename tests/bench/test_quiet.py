"""A busy machine is told from one whose load average lags, and threads keep to their cores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from halfweave.bench import quiet
from halfweave.bench.quiet import check_quiet, others_at_work, pinned
from halfweave.errors import RefusedError
from halfweave.kernels.cpu.cores import one_cpu_a_core
from halfweave.runtime.hardware import this_machine

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize(
    ("load", "shares", "busy"),
    [
        (0.1, {0: 0.0, 1: 0.05}, False),
        (3.0, {0: 0.0, 1: 0.05}, False),  # what has just ended
        (0.1, {0: 0.9, 1: 0.0}, True),  # what has just begun
        (1.0, {0: 0.2, 1: 0.0}, True),  # what comes and goes
        (0.3, None, False),
        (0.8, None, True),
    ],
)
def test_load_and_a_look_together_say_whether_the_machine_is_busy(
    load: float, shares: dict[int, float] | None, busy: bool
) -> None:
    machine = replace(this_machine(), load=load)
    if not busy:
        assert check_quiet(machine, shares) == []
        return
    with pytest.raises(RefusedError, match="the machine is busy") as caught:
        check_quiet(machine, shares)
    assert caught.value.exit_code == 3
    assert "--even-if-busy" in str(caught.value.hint)
    (note,) = check_quiet(machine, shares, even_if_busy=True)
    assert note.startswith("the machine was busy")


def test_a_look_counts_the_ticks_of_each_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Columns: user nice system idle iowait irq softirq steal guest guest_nice."""
    stat = tmp_path / "proc" / "stat"
    stat.parent.mkdir()
    stat.write_text(
        "cpu 9 9 9 9\ncpu0 10 0 5 100 5 0 0 0 7 0\ncpu1 0 0 0 100 0 0 0 0 0 0\nintr 5\n"
    )

    def later(seconds: float) -> None:
        stat.write_text("cpu 9 9\ncpu0 20 10 5 170 5 0 0 10 9 0\ncpu1 0 0 0 200 0 0 0 0 0 0\n")

    monkeypatch.setattr(quiet.time, "sleep", later)
    assert others_at_work(root=tmp_path) == pytest.approx({0: 0.3, 1: 0.0})
    assert others_at_work(root=tmp_path / "none") is None


@linux
def test_a_process_that_works_is_seen() -> None:
    code = "while True: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            shares = others_at_work(1.0)
        finally:
            process.kill()
    assert shares is not None
    assert sum(shares.values()) > 0.5


@linux
def test_all_threads_keep_to_one_cpu_a_core_until_the_end() -> None:
    before = os.sched_getaffinity(0)
    cores = one_cpu_a_core()
    masks: dict[str, set[int]] = {}
    go, done = threading.Event(), threading.Event()

    def work() -> None:
        go.wait()
        masks["older"] = os.sched_getaffinity(0)
        done.wait()
        masks["after"] = os.sched_getaffinity(0)

    thread = threading.Thread(target=work)
    thread.start()
    busiest = dict.fromkeys(cores, 0.0) | {cores[-1]: 1.0}
    with pinned(1, busiest) as cpus:
        assert len(cpus) == 1
        assert len(cores) == 1 or cpus != [cores[-1]]
        assert os.sched_getaffinity(0) == set(cpus)
        go.set()
        started = threading.Thread(target=lambda: masks.update(new=os.sched_getaffinity(0)))
        started.start()
        started.join()
    done.set()
    thread.join()
    assert masks["new"] == set(cpus)
    assert os.sched_getaffinity(0) == masks["after"] == before


@linux
def test_more_threads_than_cores_are_left_alone() -> None:
    before = os.sched_getaffinity(0)
    with pinned(1000) as cpus:
        assert cpus == []
        assert os.sched_getaffinity(0) == before
