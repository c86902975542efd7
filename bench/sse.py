"""Server-sent events out of the pieces that a connection brings, and tokens out of the events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_DONE = "[DONE]"


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
        self._line = b""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of all events that are complete now."""
        *lines, self._line = (self._line + piece).split(b"\n")
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
    except ValueError:
        document = None
    if not isinstance(document, dict):
        answer.error = f"an event is no JSON object: {data[:100]}"
        return False
    if document.get("error"):
        error = document["error"]
        said = error.get("message") if isinstance(error, dict) else error
        answer.error = f"in a stream: {said}"
        return False
    usage = document.get("usage")
    if isinstance(usage, dict):
        answer.prompt_tokens = usage.get("prompt_tokens")
        answer.output_tokens = usage.get("completion_tokens")
    return any(_has_text(choice) for choice in document.get("choices") or ())


def _has_text(choice: dict[str, Any]) -> bool:
    """Of a completion, or of a chat, whose first chunk brings a role and no token."""
    delta = choice.get("delta") or {}
    told = (choice.get("text"), delta.get("content"), delta.get("reasoning_content"))
    return any(told) or bool(delta.get("tool_calls"))
