"""What a measurement ran on: said beside every speed, because without it a speed means nothing."""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import dataclass

import torch

from ..kernels.cpu.cores import granted_cores
from ..kernels.device import cpu_model, whole_memory_bytes


@dataclass(frozen=True)
class Hardware:
    """What of a machine this process may use, at one moment.

    `cores` and `memory_bytes` are what affinity and control groups leave of it; `load` is the
    one-minute load average.
    """

    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    load: float
    gpu: str | None

    @property
    def line(self) -> str:
        """The whole in one line, for tables."""
        gpu = f", {self.gpu}" if self.gpu else ""
        memory = f"{self.memory_bytes / 2**30:.0f} GiB"
        return f"{self.cpu}, {self.cores} cores, {self.threads} threads, {memory}{gpu}"

    @property
    def busy(self) -> bool:
        """Whether other work would spoil a measurement: over half a core is taken."""
        return self.load > 0.5


def this_machine() -> Hardware:
    """Look at the machine and at torch's settings now."""
    return Hardware(
        cpu=cpu_model(),
        cores=granted_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=whole_memory_bytes(),
        load=os.getloadavg()[0],
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


def versions() -> dict[str, str]:
    """Versions of what decides a measurement."""
    import transformers

    from .. import __version__

    return {
        "halfweave": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def peak_memory_bytes() -> int:
    """The most memory this process has ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
