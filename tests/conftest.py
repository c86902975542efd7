"""Tiny models, made once for the whole run, and the command line in this process.

Tests that change a directory copy it first.
"""

from __future__ import annotations

import io
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from halfweave.cli import main
from halfweave.kernels.measured import OFF, VARIABLE
from support.command import QUICK, Command, Ran
from support.smollm2 import import_smollm2
from support.tiny import pack_directory, save_tiny

# Triton is there for Linux only; its kernels' tests are not even imported elsewhere.
if find_spec("triton") is None:
    collect_ignore_glob = ["kernels/cuda/*", "gpu/*", "runtime/test_gpu_decoder.py"]


# Files of few tests that take a minute or more. They begin: at the end one process would be left
# with them while the others have nothing to do.
LONG = (
    "bench/test_command.py",
    "benchmarks/test_peers.py",
    "benchmarks/test_quality.py",
    "benchmarks/test_scale.py",
    "benchmarks/test_soak.py",
    "kernels/cuda/test_aot.py",
    "kernels/cuda/test_plain.py",
    "kernels/cuda/test_plain_aot.py",
    "pruner/test_distill.py",
    "pruner/test_ray_tasks.py",
    "pruner/test_resume.py",
    "pruner/test_smollm2_cut.py",
    "pruner/test_steps.py",
    "pruner/test_wide.py",
    "server/test_ray.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, then those with the most tests."""
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (not item.path.as_posix().endswith(LONG), -counts[item.path]))


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and a busy machine loses much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell's background work ignores Ctrl-C, and so would all that tests start from there."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_dispatch_table() -> Iterator[None]:
    """What somebody once measured on this machine is no part of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, OFF)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense fp32 Llama with tied embeddings. Read-only."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def packed_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its linears as 2:4 + int4; `packed-dense` beside it. Read-only."""
    return pack_directory(tiny_model, tmp_path_factory.mktemp("packed") / "packed", "sparse24_int4")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, dense. Read-only; skips where its package is not installed."""
    return import_smollm2(tmp_path_factory.mktemp("smollm2") / "dense")


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a model directory, so that a test may spoil it."""

    def copy(directory: Path) -> Path:
        return Path(shutil.copytree(directory, tmp_path / f"copy-of-{directory.name}"))

    return copy


@pytest.fixture
def halfweave(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs one command line in this process."""

    def run(*arguments: object, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "argv", ["halfweave", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return Ran(int(exit_.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def pruned(halfweave: Command, tiny_model: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    assert halfweave("prune", tiny_model, out, *QUICK).code == 0
    return out
