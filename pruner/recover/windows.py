"""Which tokens are trained on, in which order, and which are kept aside to measure by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UsageError

# Keeps the generators of different epochs apart; a generator's seed has 64 bits.
_EPOCH_STRIDE, MOST_SEED = 1_000_003, 2**32 - 1


@dataclass(frozen=True)
class Windows:
    """Token windows, int64 [n, length], cut from one text without overlap."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def cut(cls, token_ids: Sequence[int], length: int, held_out: int) -> Windows:
        """Cut the text into windows and keep `held_out` of them, evenly spread, aside.

        Raises:
            UsageError: the text has no window to train on beside them.
        """
        ids = torch.as_tensor(token_ids, dtype=torch.int64)
        count = len(ids) // length
        if count <= held_out:
            raise UsageError(
                f"the text has {len(ids)} tokens; {held_out} held-out windows and one to train on "
                f"need {(held_out + 1) * length}",
                "give a longer text, or fewer held-out windows",
            )
        windows = ids[: count * length].view(count, length)
        aside = torch.zeros(count, dtype=torch.bool)
        aside[[(2 * i + 1) * count // (2 * held_out) for i in range(held_out)]] = True
        return cls(windows[~aside], windows[aside])

    def to(self, device: torch.device) -> Windows:
        """The same windows on another device."""
        return Windows(self.train.to(device), self.held_out.to(device))

    def of_step(self, step: int, per_step: int, seed: int) -> list[int]:
        """Indices into `train` for one step: a function of its arguments alone.

        Every window is used once before any is used again.
        """
        count = len(self.train)
        chosen = []
        order: tuple[int, Tensor] | None = None
        for position in range(step * per_step, (step + 1) * per_step):
            epoch, place = divmod(position, count)
            if order is None or order[0] != epoch:
                generator = torch.Generator().manual_seed(seed * _EPOCH_STRIDE + epoch)
                order = (epoch, torch.randperm(count, generator=generator, device="cpu"))
            chosen.append(int(order[1][place]))
        return chosen


def next_tokens(windows: Tensor) -> Tensor:
    """For each position of [n, length] the token after it, -1 at the end of a window."""
    return torch.nn.functional.pad(windows[:, 1:], (0, 1), value=-1)
