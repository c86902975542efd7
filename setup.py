"""Builds the CPU kernels beside the package: one plain shared library, for every Python.

It has no Python and no torch in it, so it needs g++ (or any C++17 compiler, by $CXX) and nothing
else. Each instruction set is one file with flags of its own; what is best is chosen when it runs,
so the library works on every machine of its architecture. Without a compiler the installation goes
on without it, and says so: everything then works in torch, slower.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("kernels/cpu/native")
NAME = "halfweave.kernels.cpu.libhalfweave_cpu"
COMMON = shlex.split(
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -pthread -fno-math-errno -fno-trapping-math"
    " -Wall -Wextra -Werror=return-type"
)
X86_LEVELS = {
    "level_avx2": shlex.split("-mavx2 -mfma -mf16c"),
    # GCC's own headers of AVX-512 warn of what they leave unset on purpose.
    "level_avx512": shlex.split(
        "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"
        " -Wno-maybe-uninitialized -Wno-uninitialized"
    ),
}


class BuildNative(build_ext):
    """Compiles and links the library; a failure is told, and is no failure of the installation."""

    def get_ext_filename(self, fullname: str) -> str:
        """No tag of a Python version: the library knows of none."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile every source with its flags, side by side, then link."""
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        objects = Path(self.build_temp).absolute()
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
                made = list(workers.map(lambda s: compile_one(Path(s), objects), ext.sources))
            run([*compiler(), "-shared", "-pthread", "-o", str(target), *made])
        except (OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)
            print(
                f"warning: halfweave's CPU kernels were not built ({error}); "
                "everything works without them, slower. They need g++.",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self) -> None:
        """As usual, for a library that there is."""
        built = Path(self.build_lib)
        self.extensions = [
            each for each in self.extensions if (built / self.get_ext_filename(each.name)).exists()
        ]
        super().copy_extensions_to_source()


class PlatformWheel(bdist_wheel):
    """One wheel for all Pythons of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Neither a Python version nor an ABI."""
        return ("py3", "none", super().get_tag()[2])


def compiler() -> list[str]:
    """The C++ compiler, and the flags of all files; the user's come last, so that they prevail."""
    return [
        *shlex.split(os.environ.get("CXX", "g++")),
        *COMMON,
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]


def compile_one(source: Path, objects: Path) -> str:
    """The object file of one source."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = X86_LEVELS.get(source.stem, []) if x86 else []
    target = objects / f"{source.stem}.o"
    run([*compiler(), *flags, "-c", str(source), "-o", str(target)])
    return str(target)


def run(command: list[str]) -> None:
    """Run a command; what it prints is shown."""
    subprocess.run(command, check=True)


setup(
    ext_modules=[Extension(NAME, sorted(str(source) for source in NATIVE.glob("*.cpp")))],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
