"""Keeps what a user writes from becoming a control token.

A chat template joins the model's control tokens and the users' words into one text, in which a
"<|im_end|>" typed by a user looks like the real one. So the users' are replaced by marks that
nobody can guess before rendering, and encoded as plain text after it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import RequestError

Encode = Callable[[str, bool], list[int]]


class ControlTokens:
    """Hides control tokens in the messages of one conversation and finds them again."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = sorted((token for token in tokens if token), key=len, reverse=True)
        self._written = re.compile("|".join(map(re.escape, self._tokens)) or "(?!)")
        mark = f"\ue000{secrets.token_hex(8)}."
        self._mark = mark
        self._hidden = re.compile(f"{re.escape(mark)}(\\d+)\ue001")

    def hide(self, value: Any, param: str | None = None) -> Any:
        """The same value with every control token in its strings, and keys, replaced by a mark.

        Raises:
            RequestError: it is nested too deeply; `param` is the field that says so.
        """
        try:
            return self._hide(value)
        except RecursionError:
            raise RequestError(f"{param or 'a value'}: nested too deeply", param) from None

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._written.sub(self._marked, value)
        if isinstance(value, Mapping):
            return {self._hide(key): self._hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(item) for item in value]
        return value

    def encode(self, text: str, encode: Encode) -> list[int]:
        """Token ids of rendered text; `encode(piece, plain)` takes what was hidden as plain."""
        pieces = self._hidden.split(text)
        ids: list[int] = []
        for at, piece in enumerate(pieces):
            hidden = at % 2 == 1  # split returns text, number, text, number, ..., text
            ids += encode(self._tokens[int(piece)] if hidden else piece, hidden)
        return ids

    def _marked(self, match: re.Match[str]) -> str:
        return f"{self._mark}{self._tokens.index(match.group())}\ue001"
