"""Server-sent events out of the pieces that a connection brings, and tokens out of the events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_DONE = "[DONE]"
_MOST_TOKENS = 2**31
_ERROR_CHARS = 300


@dataclass(frozen=True)
class Arrival:
    """What one read from the connection brought: when, and how many chunks with text."""

    at: float
    chunks: int


@dataclass
class Answer:
    """A stream, read. `output_tokens` are those of its usage, None where it told none."""

    arrivals: list[Arrival] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None
    done: bool = False


class EventReader:
    """Cuts a stream of bytes into the data of its events."""

    def __init__(self) -> None:
        self._line: list[bytes] = []  # pieces of one that has not ended
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of all events that are complete now."""
        if b"\n" not in piece:
            self._line.append(piece)
            return []
        *lines, rest = b"".join((*self._line, piece)).split(b"\n")
        self._line = [rest]
        found = []
        for raw in lines:
            line = raw.rstrip(b"\r").decode("utf-8", errors="replace")
            if line.startswith("data:"):
                self._data.append(line[5:].removeprefix(" "))
            elif not line and self._data:
                found.append("\n".join(self._data))
                self._data = []
        return found


def read_answer(pieces: Sequence[tuple[float, bytes]]) -> Answer:
    """What a server streamed; each piece comes with the time at which it was read.

    Chunks of one piece came together: nobody can say when the later ones were sent, so they count
    as one arrival.
    """
    reader, answer = EventReader(), Answer()
    for at, piece in pieces:
        chunks = sum(_take(answer, data) for data in reader.feed(piece))
        if chunks:
            answer.arrivals.append(Arrival(at, chunks))
    return answer


def _take(answer: Answer, data: str) -> bool:
    """Put one event into the answer; whether it brought text."""
    if data == _DONE:
        answer.done = True
        return False
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        answer.error = f"an event is no JSON object: {data[:100]}"
        return False
    if document.get("error"):
        error = document["error"]
        said = error.get("message") if isinstance(error, dict) else error
        answer.error = f"in a stream: {str(said)[:_ERROR_CHARS]}"
        return False
    usage = document.get("usage")
    if isinstance(usage, dict):
        answer.prompt_tokens = _count(usage.get("prompt_tokens"))
        answer.output_tokens = _count(usage.get("completion_tokens"))
    choices = document.get("choices") or ()
    return isinstance(choices, list) and any(map(_has_text, choices))


def _count(told: Any) -> int | None:
    """A number of tokens, if it is one."""
    return told if type(told) is int and 0 <= told < _MOST_TOKENS else None


def _has_text(choice: Any) -> bool:
    """Of a completion, or of a chat, whose first chunk brings a role and no token."""
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta")
    brought = delta if isinstance(delta, dict) else {}
    thought = brought.get("reasoning_content") or brought.get("reasoning")
    told = (choice.get("text"), brought.get("content"), thought)
    return any(told) or bool(brought.get("tool_calls"))
