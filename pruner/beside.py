"""A directory that appears complete or not at all: built beside its place, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..errors import RefusedError
from ..files import make_directory, sync_directory, write_json
from ..kernels.shards import INDEX_FILE
from .source import SIDE_FILES


def refuse_taken(out: Path) -> None:
    """Raise RefusedError unless `out` is free, or an empty directory that can be replaced."""
    if out.is_dir() and out.samefile(Path.cwd()):
        raise RefusedError(f"{out} is the working directory", "name another one")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise RefusedError(f"{out} exists already", "name another directory, or remove this one")


@contextmanager
def built_beside(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when the block succeeds and vanishes otherwise."""
    out = out.resolve()  # what a link leads to can be replaced, the link cannot
    make_directory(out.parent)
    prefix, suffix = f".{out.name}.", ".incomplete"
    build = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=out.parent))
    try:
        yield build
        _sync_files(build)
        build.chmod(0o755)
        os.rename(build, out)
    except BaseException:
        shutil.rmtree(build, ignore_errors=True)
        raise
    sync_directory(out.parent)


def complete(build: Path, source: Path, weight_map: Mapping[str, str], nbytes: int) -> None:
    """Write the index of the shards, and copy what `source` has beside its weights."""
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(build / INDEX_FILE, index)
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, build / name)


def _sync_files(directory: Path) -> None:
    """Give every file to the disk before the directory gets its name."""
    for path in directory.iterdir():
        path.chmod(0o644)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_directory(directory)
