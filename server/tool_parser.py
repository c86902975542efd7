"""Takes calls out of an answer's text as it arrives, in the form that the grammar holds it to."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from .tool_text import CALL_END, CALL_TRIGGER

_BEGIN = re.compile(re.escape(CALL_TRIGGER) + r'\n\{"name": "([^"]*)", "arguments": ')


@dataclass(frozen=True)
class ToolCall:
    """One call; `arguments` is JSON, unless the answer was cut off in it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class CallDelta:
    """More of the call at `index`: at first its id and name, then pieces of its arguments."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class ToolCallParser:
    """Give it text as it comes; it returns content, as texts, and calls, as deltas.

    No part of a call is ever returned as content, nor are blanks before a call and, where there are
    calls, at the end; only a call that is cut off before its arguments begin stays text.
    """

    def __init__(self) -> None:
        self._held = ""
        self._inside = False
        self._opened: list[tuple[str, str, list[str]]] = []

    @property
    def calls(self) -> list[ToolCall]:
        """The calls so far."""
        return [ToolCall(id_, name, "".join(pieces)) for id_, name, pieces in self._opened]

    @property
    def has_whole_calls(self) -> bool:
        """Whether there are calls, and the last one was not cut off, by a stop string say."""
        calls = self.calls
        return bool(calls) and (not self._inside or _is_json(calls[-1].arguments))

    def push(self, text: str) -> list[str | CallDelta]:
        """What has become certain with this text, in its order; may be empty."""
        self._held += text
        return list(self._advance())

    def finish(self) -> list[str | CallDelta]:
        """What was held back, since more might have come."""
        held, self._held = self._held, ""
        if self._inside:  # what was held back begins the call's end, unless the arguments lack it
            return [self._more(held)] if held and not _is_json(self.calls[-1].arguments) else []
        held = held.rstrip() if self._opened else held
        return [held] if held else []

    def _advance(self) -> Iterator[str | CallDelta]:
        while True:
            was_inside = self._inside
            shown = self._arguments() if was_inside else self._content()
            if shown:
                yield self._more(shown) if was_inside else shown
            if self._inside == was_inside:
                return
            if self._inside:
                id_, name, _ = self._opened[-1]
                yield CallDelta(len(self._opened) - 1, "", id_, name)

    def _content(self) -> str:
        """Text up to a call, or to what may become one; inside of it after that."""
        at = self._held.find(CALL_TRIGGER)
        begin = _BEGIN.match(self._held, at) if at >= 0 else None
        if at < 0:
            at = len(self._held) - _overlap(self._held, CALL_TRIGGER)
        shown = self._held[:at].rstrip()
        if begin is None:
            self._held = self._held[len(shown) :]
        else:
            self._held, self._inside = self._held[begin.end() :], True
            self._opened.append((f"call_{uuid.uuid4().hex}", begin[1], []))
        return shown

    def _arguments(self) -> str:
        """Arguments up to the call's end, or to what may become it; outside of it after that."""
        # The end cannot be found too early: JSON has no bare line break within a string, and no
        # letters outside of one that could look like a tag.
        at = self._held.find(CALL_END)
        if at >= 0:
            shown, self._held = self._held[:at], self._held[at + len(CALL_END) :]
            self._inside = False
        else:
            at = len(self._held) - _overlap(self._held, CALL_END)
            shown, self._held = self._held[:at], self._held[at:]
        return shown

    def _more(self, arguments: str) -> CallDelta:
        self._opened[-1][2].append(arguments)
        return CallDelta(len(self._opened) - 1, arguments)


def parse_calls(text: str) -> tuple[str, list[ToolCall], bool]:
    """The content of a whole answer, the calls in it, and whether the last one is whole."""
    parser = ToolCallParser()
    pieces = [*parser.push(text), *parser.finish()]
    content = "".join(piece for piece in pieces if isinstance(piece, str))
    return content, parser.calls, parser.has_whole_calls


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a beginning of `marker`."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
