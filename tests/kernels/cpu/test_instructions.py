"""A machine without AVX must never come upon an instruction of it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from support.cpu_levels import NATIVE

# As setup.py builds them, but for what is inlined by choice: that must not be what it hangs on.
FLAGS = ["-std=c++17", "-O0", "-fPIC"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
OF_THE_COMPILER = "DW.ref.__gxx_personality_v0"


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64")
    or not (shutil.which("g++") and shutil.which("nm")),
    reason="takes an x86 machine, g++ and nm",
)
@pytest.mark.parametrize(
    ("file", "lanes", "flags"),
    [("level_avx2", "Avx2", AVX2), ("level_avx512", "Avx512Vnni", [*AVX2, *AVX512])],
)
def test_a_level_defines_no_function_that_other_files_may_use(
    file: str, lanes: str, flags: list[str], tmp_path: Path
) -> None:
    """Of what several files define the linker keeps one, for all: it could be this one."""
    made = tmp_path / "level.o"
    source = NATIVE / f"{file}.cpp"
    subprocess.run(["g++", *FLAGS, *flags, "-c", str(source), "-o", str(made)], check=True)
    listed = subprocess.run(["nm", "-C", str(made)], check=True, capture_output=True, text=True)
    symbols = [line.split(maxsplit=2)[1:] for line in listed.stdout.splitlines() if line[0] != " "]
    shared = [name for kind, name in symbols if kind in "WVu" and name != OF_THE_COMPILER]
    assert any(lanes in name for name in shared)
    assert [name for name in shared if lanes not in name] == []
