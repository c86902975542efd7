"""What users install: the source archive builds, and the wheel from it holds all that it needs."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def build(kind: str, source: Path, out: Path) -> Path:
    """Run the build backend as pip does; the archive it made."""
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    ran = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return out / ran.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive of a clean checkout, unpacked."""
    folder = tmp_path_factory.mktemp("packaging")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    checkout = folder / "checkout"
    for name in filter(lambda name: (ROOT / name).is_file(), tracked):
        target = checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    archive = build("build_sdist", checkout, folder)
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    return next((folder / "unpacked").iterdir())


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", sources, tmp_path_factory.mktemp("wheel"))


def test_the_source_archive_has_every_source_of_the_kernels(sources: Path) -> None:
    native = Path("kernels/cpu/native")
    wanted = {path.name for path in (ROOT / native).iterdir()}
    assert {path.name for path in (sources / native).iterdir()} == wanted


def test_the_wheel_is_one_for_every_python_of_a_platform(wheel: Path) -> None:
    assert wheel.name.startswith("halfweave-")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")


def test_the_wheel_has_the_package_its_data_and_the_library_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "halfweave/__init__.py",
        "halfweave/py.typed",
        "halfweave/server/app.py",
        "halfweave/pruner/data/calibration.txt",
        "halfweave/server/playground.html",
        "halfweave/report/page.html",
        "halfweave/kernels/cpu/library.py",
        "halfweave/kernels/cpu/libhalfweave_cpu.so",
    ):
        assert needed in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"halfweave"}
    assert not [name for name in names if "/tests/" in name or name.endswith((".cpp", ".hpp"))]


def test_what_the_wheel_installs_runs_its_kernels(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "site")
    code = (
        "import halfweave\n"
        "from halfweave.kernels.cpu.library import library\n"
        "print(halfweave.__file__); print(library().level)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    where, level = ran.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert level in ("avx512_vnni", "avx2", "portable")


def test_without_a_compiler_the_installation_goes_on_and_says_so(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    command = [sys.executable, "-c", BUILD, "build_wheel", str(tmp_path)]
    ran = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "CPU kernels were not built" in ran.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "halfweave/kernels/cpu/library.py" in names
