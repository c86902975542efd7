"""A server in a process of its own, as a user starts it, and what the system knows of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

HALFWEAVE = Path(sys.executable).with_name("halfweave")


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
def server(model: Path, flags: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """`halfweave serve MODEL` on a free port until the block ends; it must stop with status 0."""
    command = [str(HALFWEAVE), "serve", str(model), "--port", "0", "--json", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(command)} ended with status {process.wait()}")
        said = json.loads(line)
        yield ServerProcess(said["url"], said["models"][0], process.pid)
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        if status != 0:
            raise RuntimeError(f"the server ended with status {status}")
    finally:
        process.kill()
        process.wait()
