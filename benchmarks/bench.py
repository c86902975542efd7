"""Everything that can be measured here, on a real model, in a quarter of an hour: `make bench`.

Prunes SmolLM2-135M-Instruct by SparseGPT and a short calibration to 2:4, 2:4+int4 and int4; then
quality of each, the products of one, all four models in turns, a server under load, and the report.
Models that are there already in --work are used again. Quality is that of a few calibration tokens:
docs/results/quality.md has that of many, and of our own method.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HALFWEAVE = Path(sys.executable).parent / "halfweave"
QUICK = ("--method", "sparsegpt", "--calib-windows", "16", "--calib-length", "256")
GROUP = ("--bits", "4", "--group", "64")
# Directory and flags of each model that is made.
VARIANTS = {
    "2-4": (),
    "2-4-int4": GROUP,
    "int4": ("--pattern", "dense", *GROUP),
}
REPORTED = "2-4-int4"
TEXT = ("--window", "512", "--max-windows", "8")
PRODUCTS = ("--tokens", "1", "--tokens", "4", "--tokens", "16", "--tokens", "64")
ALONE = ("--batch", "1", "--batch", "8", "--repetitions", "5")
RATES = ("--rate", "1", "--rate", "2", "--rate", "4", "--concurrency", "8")
LOADS = (*RATES, "--requests", "12", "--repetitions", "5")


@dataclass
class Run:
    """One run: where models are, what flags bench gets, and how long each step took."""

    dense: Path
    work: Path
    busy: tuple[str, ...]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announce a step and take its time."""
        print(f"\n== {len(self.seconds) + 1}. {title}", flush=True)
        started = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - started

    def halfweave(self, *arguments: str | Path) -> None:
        """Run one command, shown as typed, without the document of all samples that ends it.

        Raises:
            SystemExit: with the command's exit code, if that is not 0.
        """
        words = list(map(str, arguments))
        print(f"$ halfweave {shlex.join(shown(word) for word in words)}", flush=True)
        with subprocess.Popen([HALFWEAVE, *words], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith('{"schema_version"'):
                    print(line, end="", flush=True)
        if process.returncode:
            raise SystemExit(process.returncode)

    def path(self, variant: str) -> Path:
        return self.work / variant


def shown(word: str) -> str:
    """A path as short as it can be typed from here."""
    return os.path.relpath(word) if os.path.isabs(word) else word


def prune(run: Run) -> None:
    for name, flags in VARIANTS.items():
        with run.step(f"Prune to {name}"):
            out = run.path(name)
            if (out / "halfweave.json").exists():
                print(f"{shown(str(out))} is there already and is used again")
                continue
            resume = ["--resume"] if out.exists() else []
            run.halfweave("prune", run.dense, out, *QUICK, *flags, *resume)


def measure(run: Run) -> None:
    dense = ("--against", run.dense)
    for name in VARIANTS:
        with run.step(f"Quality of {name}"):
            run.halfweave("eval", run.path(name), *dense, *TEXT)
    model = run.path(REPORTED)
    others = [word for name in VARIANTS if name != REPORTED for word in named(run, name)]
    with run.step("The four models in turns"):
        run.halfweave("bench", model, "offline", *dense, *others, *TEXT, *ALONE, *run.busy)
    with run.step(f"Products of {REPORTED}"):
        run.halfweave("bench", model, "kernel", *dense, *PRODUCTS, *run.busy)
    with run.step(f"{REPORTED} served under load"):
        run.halfweave("bench", model, "serve", *LOADS, *run.busy)


def named(run: Run, name: str) -> tuple[str, str]:
    return "--against", str(run.path(name))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="the dense model")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "bench")
    parser.add_argument("--even-if-busy", action="store_true", help="others may be at work")
    arguments = parser.parse_args()

    arguments.work.mkdir(parents=True, exist_ok=True)
    busy = ("--even-if-busy",) if arguments.even_if_busy else ()
    run = Run(arguments.model, arguments.work, busy)
    started = time.monotonic()
    prune(run)
    measure(run)
    with run.step("The report"):
        others = [word for name in VARIANTS if name != REPORTED for word in ("--with", name)]
        folders = [str(run.path(word)) if word in VARIANTS else word for word in others]
        run.halfweave("report", run.path(REPORTED), *folders)
    print(f"\n{'step':<36}{'seconds':>8}")
    for title, seconds in run.seconds.items():
        print(f"{title:<36}{seconds:>8.0f}")
    print(f"{'all':<36}{time.monotonic() - started:>8.0f}")
    print(f"\n{shown(str(run.path(REPORTED) / 'report.html'))} shows it all")


if __name__ == "__main__":
    main()
