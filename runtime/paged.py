"""How decoders are fed: parts of sequences, whose keys and values lie in pages of one memory.

Knows no requests: who may use which page is for pages.py to say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import CapacityError
from ..kernels.paging import PAGE_POSITIONS
from .spec import DecoderSpec

_FIRST_PAGES = 16


@dataclass(frozen=True)
class Part:
    """Tokens to append to one sequence.

    Attributes:
        tokens: one at least.
        start: the position of the first.
        pages: the sequence's pages, in order; enough for all positions up to `end`.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]

    @property
    def end(self) -> int:
        """Positions of the sequence with these tokens."""
        return self.start + len(self.tokens)


class Memory(Protocol):
    """Keys and values of all layers, in pages."""

    @property
    def pages(self) -> int:
        """Pages that there is memory for."""

    def grow(self, pages: int) -> None:
        """Make room for so many; what is there stays."""


class SequenceCache:
    """One sequence with a memory of its own, which grows with it; `length` positions are filled."""

    def __init__(self, memory: Memory, limit: int) -> None:
        """`limit` is the most positions there may ever be."""
        self.memory, self.length, self._limit = memory, 0, limit

    def reserve(self, count: int) -> None:
        """Make room for `count` more positions.

        Raises:
            CapacityError: that would be more than the limit.
        """
        needed = self.length + count
        if needed > self._limit:
            raise CapacityError(f"{needed} positions, the model has {self._limit}")
        wanted, most = pages_for(needed), pages_for(self._limit)
        if wanted > self.memory.pages:
            self.memory.grow(min(max(wanted, 2 * self.memory.pages, _FIRST_PAGES), most))


class PagedDecoder(ABC):
    """Token ids in, logits out. One thread at a time, any number of sequences.

    A memory goes with the decoder that made it.
    """

    spec: DecoderSpec
    device: torch.device  # where keys and values are
    expanded_bytes: int = 0  # of weights that are held dense because that was measured as faster

    @property
    @abstractmethod
    def page_bytes(self) -> int:
        """What a page takes, over all layers."""

    @abstractmethod
    def new_memory(self, pages: int) -> Any:
        """A `Memory` with so many pages, with anything in them."""

    @abstractmethod
    def run(self, parts: Sequence[Part], memory: Any) -> Tensor:
        """Append all parts at once: their final hidden states [tokens of all, hidden], in order."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every next token, fp32 [..., vocab] on the CPU, of states [..., hidden]."""

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest next token [rows] for states [rows, hidden], and its score, on the CPU.

        A score that is no number says that some score of the row is none.
        """
        scores = self.logits(hidden).numpy()
        tokens = scores.argmax(-1)  # not by torch, which would wake other threads: see likeliest.py
        best = np.take_along_axis(scores, tokens[:, None], -1)[:, 0]
        return torch.from_numpy(tokens), torch.from_numpy(best)

    def new_cache(self, limit: int | None = None) -> SequenceCache:
        """An empty sequence of at most `limit` positions."""
        return SequenceCache(
            self.new_memory(0), self.spec.max_positions if limit is None else limit
        )

    def forward(self, token_ids: Tensor, cache: SequenceCache) -> Tensor:
        """Append tokens [T] to one sequence; returns their final hidden states [T, hidden].

        Raises:
            CapacityError: the sequence would be longer than its cache allows.
        """
        cache.reserve(len(token_ids))
        part = Part(token_ids.tolist(), cache.length, range(cache.memory.pages))
        hidden = self.run([part], cache.memory)
        cache.length = part.end
        return hidden


def pages_for(positions: int) -> int:
    """Pages that so many positions of one sequence take."""
    return -(-positions // PAGE_POSITIONS)


def token_ids(parts: Sequence[Part]) -> Tensor:
    """The tokens of all parts, one part behind the other: int32 [tokens]."""
    return torch.from_numpy(np.fromiter(chain(*(part.tokens for part in parts)), np.int32))


def positions(parts: Sequence[Part]) -> Tensor:
    """The positions of all parts' tokens: int64 [tokens]."""
    return torch.from_numpy(np.concatenate([np.arange(part.start, part.end) for part in parts]))


def slots(part: Part) -> Tensor:
    """Where a part's sequence lies in the memory, position by position: int64 [part.end]."""
    pages = np.asarray(part.pages[: pages_for(part.end)], np.int64)[:, None] * PAGE_POSITIONS
    return torch.from_numpy((pages + np.arange(PAGE_POSITIONS)).reshape(-1)[: part.end])
