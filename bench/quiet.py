"""A machine to measure on: is anybody else at work, and which cores are ours.

The load average says what happened a minute ago, and counts what the caller has just finished. So a
short look at the cores themselves comes with it, where the system allows one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import RefusedError
from ..kernels.cpu.cores import one_cpu_a_core
from ..runtime.hardware import Hardware

BUSY = "the machine was busy"
KEPT = "threads were kept to"
_LOOK_S = 0.5
_BUSY_CORES = 0.5  # as `Hardware.busy`: over half a core is taken
_STILL_BUSY = 0.1  # cores; less than that is a machine at rest whose load average lags behind
_IDLE = (3, 4)  # columns of /proc/stat that are no work: idle, iowait
_COUNTED = 8  # up to steal; guests are in user already


def others_at_work(seconds: float = _LOOK_S, root: Path = Path("/")) -> dict[int, float] | None:
    """The share of each CPU that others take while this thread sleeps for `seconds`.

    What a hypervisor takes away counts too. None where the system does not say.
    """
    before = _ticks(root)
    time.sleep(seconds)
    after = _ticks(root)
    if not before or before.keys() != after.keys():
        return None
    shares = {}
    for cpu, (work, total) in after.items():
        passed = total - before[cpu][1]
        shares[cpu] = (work - before[cpu][0]) / passed if passed else 0.0
    return shares


def _ticks(root: Path) -> dict[int, tuple[int, int]]:
    """Ticks of work, and of everything, by CPU."""
    try:
        lines = (root / "proc/stat").read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for name, *columns in (line.split() for line in lines if line.startswith("cpu")):
        if name != "cpu":
            counts = [int(each) for each in columns[:_COUNTED]]
            idle = sum(counts[i] for i in _IDLE)
            found[int(name[3:])] = (sum(counts) - idle, sum(counts))
    return found


def check_quiet(
    machine: Hardware, shares: Mapping[int, float] | None, even_if_busy: bool = False
) -> list[str]:
    """Refuse to measure while others work; `shares` are those of `others_at_work`.

    Returns what the reader of the numbers has to know.

    Raises:
        RefusedError: others take more than half a core, and that was not allowed.
    """
    taken = None if shares is None else sum(shares.values())
    if taken is None:
        busy, now = machine.busy, ""
    else:
        busy = taken > _BUSY_CORES or (machine.busy and taken > _STILL_BUSY)
        now = f", of which others take {taken:.1f} now"
    said = f"load {machine.load:.1f} on {machine.cores} cores{now}"
    if not busy:
        return []
    if not even_if_busy:
        raise RefusedError(
            f"the machine is busy, and would measure the other work too: {said}",
            "wait until it is idle, or add --even-if-busy",
        )
    return [f"{BUSY} before the run: {said}"]


@contextmanager
def pinned(threads: int, shares: Mapping[int, float] | None = None) -> Iterator[list[int]]:
    """Keep all threads of this process to one CPU each of as many cores, the idlest first.

    Gives the CPUs: none where the system cannot, or where there are fewer cores than threads.
    Threads that are started inside keep to them too; at the end the old CPUs are allowed again.
    """
    cpus = sorted(one_cpu_a_core(), key=lambda cpu: (round((shares or {}).get(cpu, 0), 1), -cpu))
    chosen = sorted(cpus[:threads])
    if not hasattr(os, "sched_setaffinity") or len(chosen) < threads:
        yield []
        return
    before = os.sched_getaffinity(0)
    _allow(set(chosen))
    try:
        yield chosen
    finally:
        _allow(before)


def _allow(cpus: set[int]) -> None:
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):  # a thread that has just ended
            os.sched_setaffinity(int(task), cpus)
