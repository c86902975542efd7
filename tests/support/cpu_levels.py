"""The instruction sets that the CPU kernels are tested with here: those of this machine, and
AVX-512 VNNI by emulation where the machine lacks it.

`HALFWEAVE_KERNELS_UNDER_TEST` is the path of another build of the library to test, and
`HALFWEAVE_KERNELS_FLAGS` what the emulated one is compiled with besides (`make test-sanitize`).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
from halfweave.kernels.cpu.library import FILE, LEVELS, Library, load, open_level

THREADS = 2  # whatever torch has: work must be shared out for it to be shared out wrongly
UNDER_TEST = Path(os.environ.get("HALFWEAVE_KERNELS_UNDER_TEST") or FILE)
EMULATED = "avx512_vnni emulated"
NATIVE = Path(__file__).parents[2] / "kernels" / "cpu" / "native"
SHIM = Path(__file__).parents[1] / "kernels" / "cpu" / "emulated_avx512.hpp"
SIMDE = Path("/usr/include/simde/x86/avx512.h")  # Debian's libsimde-dev


def native_levels() -> list[str]:
    """Levels of this machine, best first."""
    functions = load(UNDER_TEST)
    assert functions is not None, "the tests need the CPU kernels: install with a C++ compiler"
    return [level for level in LEVELS if functions.hw_level(level.encode())]


LEVELS_HERE = native_levels()
if LEVELS[0] not in LEVELS_HERE:
    LEVELS_HERE = [*LEVELS_HERE, EMULATED]


@cache
def at_level(name: str) -> Library:
    """The library at a level; skips the test where emulation is not to be had."""
    file, level = (_emulated(), LEVELS[0]) if name == EMULATED else (UNDER_TEST, name)
    functions = load(file)
    assert functions is not None
    return open_level(functions, level, THREADS)


def _emulated() -> Path:
    """A build of the library in which AVX-512 is spelt out in other instructions."""
    if not SIMDE.exists() or shutil.which("g++") is None:
        pytest.skip("emulating AVX-512 takes g++ and libsimde-dev")
    folder = Path(tempfile.mkdtemp(prefix="halfweave-emulated-"))
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wno-psabi", "-DHALFWEAVE_EMULATE_AVX512"]
    flags += shlex.split(os.environ.get("HALFWEAVE_KERNELS_FLAGS", ""))
    jobs = []
    for source in sorted(NATIVE.glob("*.cpp")):
        shim = ["-include", str(SHIM), f"-I{NATIVE}"] if source.stem == "level_avx512" else []
        target = ["-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        jobs.append(subprocess.Popen(["g++", *flags, *shim, *target]))
    assert all(job.wait() == 0 for job in jobs)
    library = folder / "libemulated.so"
    objects = [str(file) for file in folder.glob("*.o")]
    subprocess.run(["g++", *flags, "-shared", "-pthread", "-o", str(library), *objects], check=True)
    return library
