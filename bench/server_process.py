"""A server in a process of its own, as a user starts it, and what the system knows of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.request import urlopen

from ..errors import HalfweaveError

_COMMAND = (sys.executable, "-c", "from halfweave.cli import main; main()")
_END_S = 60.0


@dataclass(frozen=True)
class Footprint:
    """What a process holds at one moment."""

    rss_mib: float
    fds: int
    threads: int


@dataclass(frozen=True)
class ServerProcess:
    """A running server; the name of its model, and its process."""

    url: str
    model: str
    pid: int

    def footprint(self) -> Footprint:
        """From /proc, so only on Linux."""
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines()
        )
        return Footprint(
            rss_mib=int(status["VmRSS"].split()[0]) / 1024,
            fds=len(os.listdir(f"/proc/{self.pid}/fd")),
            threads=int(status["Threads"]),
        )

    def figure(self, name: str) -> float:
        """One of the server's own figures, over all labels."""
        with urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        wanted = f"halfweave_{name}"
        found = [line for line in lines if line.split("{")[0].split(" ")[0] == wanted]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)


@contextmanager
def server(model: str | Path, flags: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """`halfweave serve MODEL` on a free port until the block ends; it must stop with status 0.

    Raises:
        HalfweaveError: it did not start, or did not stop well; its last line says why.
    """
    command = [*_COMMAND, "serve", str(model), "--port", "0", "--json", *flags]
    with _ends_well(), tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=_environment())
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise HalfweaveError(
                    f"a server of {model} ended with status {process.wait()}: {_last(log)}"
                )
            said = json.loads(line)
            yield ServerProcess(said["url"], said["models"][0], process.pid)
            process.send_signal(signal.SIGTERM)
            status = process.wait(_END_S)
            if status != 0:
                raise HalfweaveError(f"the server ended with status {status}: {_last(log)}")
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@contextmanager
def _ends_well() -> Iterator[None]:
    """Let SIGTERM end this process as an exception does, so that no server is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _environment() -> dict[str, str]:
    """Without what would change `serve` behind our back: its flags, and keys that it would ask."""
    ours = ("HALFWEAVE_SERVE_", "HALFWEAVE_API_KEY")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def _last(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
    said = [line for line in lines if line.startswith("error: ")]
    return (said or lines)[-1].removeprefix("error: ")
