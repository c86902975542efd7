"""A module in a process of its own, for work that has to be ended when it takes too long.

Neither a thread nor one endless operation inside it can be stopped; a process can. It answers one
line of JSON with another (child_side.py), is kept for the next one, and replaced after it had to be
ended. Knows nothing of what is asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from ..errors import NoProcessError


class ChildEnded(Exception):  # noqa: N818 - names what happened, not a fault of this program
    """The process died instead of answering; `too_long` if its processor time had run out."""

    def __init__(self, too_long: bool) -> None:
        super().__init__("took too long" if too_long else "died")
        self.too_long = too_long


class Child:
    """One module, ready to be asked from any thread."""

    def __init__(self, module: str, setup: Mapping[str, Any]) -> None:
        """`module` is one of this package, run as a program; `setup` is the first line it reads."""
        self._module, self._setup = f"{__package__}.{module}", dict(setup)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._finalizer: weakref.finalize[[subprocess.Popen[str]], Child] | None = None

    def ask(self, line: str) -> dict[str, str]:
        """The answer to a line of JSON.

        Raises:
            ChildEnded: there is none; the next call starts a new process.
            NoProcessError: no process can be started.
        """
        with self._lock:
            return self._ask(line)

    def _ask(self, line: str) -> dict[str, str]:
        if self._child is None or self._child.poll() is not None:
            self._end()  # of one that died between two questions
            self._child = self._started()
        child = self._child
        try:
            _write(child, line)
            answer = child.stdout.readline() if child.stdout else ""
        except BrokenPipeError:
            answer = ""
        except BaseException:  # its answer would be taken for that to the next question
            self._end()
            raise
        if not answer.endswith("\n"):
            self._end()
            raise ChildEnded(child.returncode == -signal.SIGPROF)
        reply: dict[str, str] = json.loads(answer)
        return reply

    def _end(self) -> None:
        """Stop the process. What would stop it later must go too, or it would keep it for ever."""
        self._child = None
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None

    def _started(self) -> subprocess.Popen[str]:
        # -P: the working directory must not shadow modules that it imports. A session of its own:
        # Ctrl-C is for this process to handle; the child ends when its input does.
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                start_new_session=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as error:
            raise NoProcessError(f"no process could be started: {error.strerror}") from error
        self._finalizer = weakref.finalize(self, _stop, child)
        _write(child, json.dumps(self._setup, default=str))
        return child


def _write(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(line + "\n")
    child.stdin.flush()


def _stop(child: subprocess.Popen[str]) -> None:
    child.kill()  # no effect, on the exit code either, if it has ended by itself
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
