"""Cases that Triton interprets, which it decides once in a process: they get one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_interpreted(cases: Path, least: int) -> None:
    """Run a file of tests; fails unless all pass and there are at least so many."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert ran.stdout.count(".") >= least
