"""A worker that is running: asked a line, answers a line."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

# Some engines' threads wait for more work by spinning, on the cores of whoever is measured next.
_REST_S = 0.4


class Process:
    """One script of this folder in the environment of its engine, loaded and waiting."""

    def __init__(self, python: Path, script: Path, model: str, threads: int) -> None:
        """Start it, and wait until it is ready.

        Raises:
            RuntimeError: it ended instead, with what it said last.
        """
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115, open as long as the process
        self._process = subprocess.Popen(
            [str(python), str(script), model, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        ready = self._answer()
        self.version, self.load_s = str(ready["version"]), float(ready["load_s"])

    def ask(self, **request: object) -> dict[str, Any]:
        """Its answer, after a rest; raises RuntimeError if it ended."""
        time.sleep(_REST_S)
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._said.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            raise RuntimeError(self._said.read().strip().rpartition("\n")[2] or "it ended")
        found: dict[str, Any] = json.loads(line)
        return found
