"""What one model takes to be loaded and run: seconds and memory, in a process of its own.

Run as a module it is that process; `measure_footprint` starts it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import HalfweaveError
from ..runtime.hardware import peak_memory_bytes
from ..runtime.model import LoadSettings, load_model


@dataclass(frozen=True)
class Footprint:
    """Seconds of `load_model`, and the most memory held until one request was answered.

    Measured once. The files may or may not be in the system's cache; what checks their hashes
    reads them first, so that with `verify` they are, if memory allows.
    """

    load_s: float
    peak_rss_bytes: int


def measure_footprint(
    path: str | Path, loading: LoadSettings, threads: int, prompt: tuple[int, ...], new_tokens: int
) -> Footprint:
    """Load a model in a new process and let it answer once.

    Raises:
        HalfweaveError: the process failed; its last line says why.
    """
    asked = {
        "path": str(path),
        "loading": asdict(loading),
        "threads": threads,
        "prompt": prompt,
        "new_tokens": new_tokens,
    }
    command = [sys.executable, "-m", __name__]
    ran = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["nothing"])[-1]
        raise HalfweaveError(f"loading {path} in a process of its own failed: {last}")
    return Footprint(**json.loads(ran.stdout.splitlines()[-1]))


def _own_footprint(asked: dict[str, Any]) -> Footprint:
    """Of this process."""
    import torch

    from .requests import carry_out

    torch.set_num_threads(asked["threads"])
    started = time.perf_counter()
    model = load_model(asked["path"], **asked["loading"])
    load_s = time.perf_counter() - started
    carry_out(model, [tuple(asked["prompt"])], asked["new_tokens"])
    return Footprint(load_s, _peak_bytes())


def _peak_bytes() -> int:
    """Of this program alone: what getrusage says begins with the memory of whoever started it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return peak_memory_bytes()


if __name__ == "__main__":
    print(json.dumps(asdict(_own_footprint(json.load(sys.stdin)))))
