"""Prompts of about so many tokens out of a text, no two of which begin alike.

A server may remember beginnings that it has read, also from an earlier run. So each prompt begins
with a word of this run's own: the rest follows from the seed, and so does the length.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..runtime.tokenizer import Tokenizer

_TOKENS_A_WORD = 1.4  # of English, in the vocabularies of today; the server's usage says how many
_WORDS_BEFORE = 3


@dataclass(frozen=True)
class Prompts:
    """Makes prompts of `length` pieces of a text, which are words or tokens. Made by `of`."""

    pieces: Sequence[str] | Sequence[int]
    length: int
    seed: int
    nonce: str
    tokenizer: Tokenizer | None

    @classmethod
    def of(cls, text: str, tokens: int, seed: int, tokenizer: Tokenizer | None = None) -> Prompts:
        """Prompts of `tokens`; without a tokenizer that is a guess from the number of words.

        Raises:
            UsageError: the text is too short.
        """
        nonce = secrets.token_hex(4)
        pieces: Sequence[str] | Sequence[int]
        if tokenizer is None:
            pieces, length = text.split(), round(tokens / _TOKENS_A_WORD) - _WORDS_BEFORE
        else:
            pieces = tokenizer.encode(text, special=False)
            length = tokens - len(tokenizer.encode(_begin(nonce, "0 0", 0), special=False))
        length = max(1, length)
        if len(pieces) < length:
            raise UsageError(f"the text has {len(pieces)} tokens or words, a prompt needs {length}")
        return cls(pieces, length, seed, nonce, tokenizer)

    def make(self, count: int, salt: str) -> list[str]:
        """So many prompts; equal seeds and salts take equal parts of the text."""
        dice = random.Random(f"{self.seed} {salt}")
        starts = [dice.randrange(len(self.pieces) - self.length + 1) for _ in range(count)]
        return [
            _begin(self.nonce, salt, number) + self._text(self.pieces[first : first + self.length])
            for number, first in enumerate(starts)
        ]

    def _text(self, pieces: Sequence[str] | Sequence[int]) -> str:
        if self.tokenizer is None:
            return " ".join(map(str, pieces))
        return self.tokenizer.decode([int(piece) for piece in pieces])


def _begin(nonce: str, salt: str, number: int) -> str:
    return f"{nonce} {salt} {number}: "
