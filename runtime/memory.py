"""What an engine will take of the memory, said before it is taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import CapacityError
from ..kernels.device import available_memory_bytes
from ..kernels.paging import PAGE_POSITIONS
from .spec import DecoderSpec

_FLOAT = 4
_ROWS_SCORED = 64  # rows of scores of a prompt that are held at a time


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes for keys and values, which hold `kv_tokens`, and most bytes of states in a step.

    `weight_bytes`, those of the files, are in memory already, and so are `expanded_bytes`, by which
    weights grew that are held dense because that was measured as faster; `available_bytes` is what
    is left beside them, None where the system does not say.
    """

    weight_bytes: int
    kv_bytes: int
    kv_tokens: int
    workspace_bytes: int
    available_bytes: int | None
    expanded_bytes: int = 0

    @classmethod
    def of(
        cls,
        spec: DecoderSpec,
        weight_bytes: int,
        pages: int,
        page_bytes: int,
        step: tuple[int, int, int],
        device: torch.device,
    ) -> MemoryPlan:
        """Of `pages` and steps of so many tokens, of so many sequences of so many positions."""
        tokens, rows, longest = step
        widest = 3 * spec.hidden + 2 * spec.heads * spec.head_dim + 2 * spec.ffn
        if spec.experts is not None:  # one at a time, on copies of its tokens
            widest += 2 * spec.hidden + 2 * max(spec.experts.ffn - spec.ffn, 0)
        if spec.attention_cap is not None:  # scores of every position, before, within and after
            widest += 3 * spec.heads * longest
        scores = (max(rows, _ROWS_SCORED)) * spec.vocab
        return cls(
            weight_bytes,
            pages * page_bytes,
            pages * PAGE_POSITIONS,
            _FLOAT * (tokens * widest + scores),
            available_memory_bytes(device),
        )

    @property
    def wanted_bytes(self) -> int:
        """What is to be taken of what is available."""
        return self.kv_bytes + self.workspace_bytes

    def check(self, promised: int = 0) -> None:
        """Raise CapacityError if it cannot fit, so that no request has to find out.

        `promised` are bytes of what is free that others have planned.
        """
        if self.available_bytes is None:
            return
        free = max(0, self.available_bytes - promised)
        if self.wanted_bytes > free:
            besides = f" beside {_mib(promised)} MiB for other models" if promised else ""
            raise CapacityError(
                f"keys and values of {self.kv_tokens} tokens and a step's states take "
                f"{_mib(self.wanted_bytes)} MiB, and {_mib(free)} MiB are free{besides}",
                "less memory for keys and values (--kv-mib), a shorter context (--max-model-len), "
                "or keys and values of 8 bits (--kv-bits 8)",
            )

    @property
    def line(self) -> str:
        """The plan in one line."""
        free, grown = self.available_bytes, self.expanded_bytes
        expanded = (
            f" and {_mib(grown)} MiB more for dense copies, measured as faster" if grown else ""
        )
        return (
            f"weights {_mib(self.weight_bytes)} MiB{expanded}, keys and values "
            f"{_mib(self.kv_bytes)} MiB for {self.kv_tokens} tokens, a step's states up to "
            f"{_mib(self.workspace_bytes)} MiB" + (f"; {_mib(free)} MiB are free" if free else "")
        )


def _mib(count: int) -> int:
    return -(-count // 2**20)
