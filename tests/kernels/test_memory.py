"""Memory that is left, from files as the kernel writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from halfweave.kernels.device import available_memory_bytes, cpu_model, whole_memory_bytes

GIB = 2**30
COMPUTER = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MEMINFO = {"proc/meminfo": f"MemTotal: {16 * 2**20} kB\nMemAvailable: {8 * 2**20} kB"}
GROUP = "sys/fs/cgroup/"
OWN = {"proc/self/cgroup": "0::/a/b"}


def limit(group: str, most: str, used: int, cached: int = 0) -> dict[str, str]:
    return {
        f"{GROUP}{group}memory.max": most,
        f"{GROUP}{group}memory.current": str(used),
        f"{GROUP}{group}memory.stat": f"anon {used - cached}\ninactive_file {cached}",
    }


OLD = {
    "proc/self/cgroup": "9:memory:/job",
    f"{GROUP}memory/job/memory.limit_in_bytes": str(4 * GIB),
    f"{GROUP}memory/job/memory.usage_in_bytes": str(3 * GIB),
    f"{GROUP}memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}",
    f"{GROUP}memory/memory.limit_in_bytes": "9223372036854771712",
    f"{GROUP}memory/memory.usage_in_bytes": str(9 * GIB),
}


@pytest.mark.parametrize(
    ("files", "left", "whole"),
    [
        ({}, 8 * GIB, COMPUTER),
        ({**OWN, **limit("a/b/", "max", GIB)}, 8 * GIB, COMPUTER),
        ({**OWN, **limit("a/b/", str(4 * GIB), 3 * GIB, GIB)}, 2 * GIB, 4 * GIB),
        ({**OWN, **limit("a/", str(4 * GIB), 3 * GIB)}, GIB, 4 * GIB),  # of a group above
        ({**OWN, **limit("", str(2 * GIB), 3 * GIB)}, 0, 2 * GIB),  # the path is the host's
        ({**OWN, **limit("a/b/", str(99 * GIB), GIB)}, 8 * GIB, COMPUTER),
        (OLD, 2 * GIB, 4 * GIB),
    ],
)
def test_the_least_of_what_limits_counts(
    tmp_path: Path, files: dict[str, str], left: int, whole: int
) -> None:
    for name, text in {**MEMINFO, **files}.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert available_memory_bytes(root=tmp_path) == left
    assert whole_memory_bytes(tmp_path) == whole


def test_a_system_that_says_nothing_is_not_guessed(tmp_path: Path) -> None:
    assert available_memory_bytes(root=tmp_path) is None
    assert whole_memory_bytes(tmp_path) == COMPUTER


def test_a_processor_is_told_by_its_numbers_too(tmp_path: Path) -> None:
    assert cpu_model(tmp_path)
    (tmp_path / "proc").mkdir()
    one = "processor : 0\ncpu family : 25\nmodel : 17\nmodel name : AMD EPYC\n"
    (tmp_path / "proc/cpuinfo").write_text(f"{one}\n{one.replace('17', '1')}")
    cpu_model.cache_clear()
    assert cpu_model(tmp_path) == "AMD EPYC (family 25, model 17)"
    (tmp_path / "proc/cpuinfo").write_text("model name : A board\n")
    cpu_model.cache_clear()
    assert cpu_model(tmp_path) == "A board"
    cpu_model.cache_clear()


def test_this_machine_has_some() -> None:
    left = available_memory_bytes()
    whole = whole_memory_bytes()
    assert left is not None and 0 < left < whole
