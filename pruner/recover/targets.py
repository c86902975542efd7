"""What the dense parent says of each window: computed once, kept in 16 bits and in
the CPU's memory, used in every epoch.

Windows run one at a time, so that a window's targets are the same bits whatever ran before: a
resumed run computes anew what it needs. Knows hidden states, not what is done with them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .network import Network


@dataclass(frozen=True)
class Target:
    """Hidden states of one window: final, [length, hidden], and after each tapped block."""

    final: Tensor
    tapped: dict[int, Tensor]


class Targets:
    """Targets of one set of windows. `seconds` is the time spent in the parent so far."""

    def __init__(
        self,
        parent: Network,
        windows: Tensor,
        memory_bytes: float,
        precision: str = "float32",
    ) -> None:
        """Keep what fits in `memory_bytes`; what does not is computed each time it is asked for."""
        self._parent, self._windows, self._precision = parent, windows, precision
        self._left = memory_bytes
        self._cached: dict[int, Target] = {}
        self.seconds = 0.0

    def of(self, indices: Sequence[int]) -> Target:
        """Targets of several windows in fp32, their positions one after the other."""
        each, device = [self._one(index) for index in indices], self._windows.device
        return Target(
            torch.cat([target.final for target in each]).to(device).float(),
            {
                tap: torch.cat([target.tapped[tap] for target in each]).to(device).float()
                for tap in each[0].tapped
            },
        )

    @torch.no_grad()
    def _one(self, index: int) -> Target:
        if index in self._cached:
            return self._cached[index]
        started = time.perf_counter()
        final, tapped = self._parent.forward(self._windows[index : index + 1], self._precision)
        # A residual stream can hold values beyond fp16; the final norm's output cannot.
        target = Target(
            final[0].clamp(-65504, 65504).half().cpu(),
            {tap: hidden[0].bfloat16().cpu() for tap, hidden in tapped.items()},
        )
        size = 2 * target.final.numel() * (1 + len(target.tapped))
        if size <= self._left:
            self._left -= size
            self._cached[index] = target
        self.seconds += time.perf_counter() - started
        return target
