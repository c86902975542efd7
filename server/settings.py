"""The limits and names one server runs with. Knows numbers, not requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """What an operator may choose.

    Attributes:
        served_name: the model's name in requests and answers; None takes the model's own.
        max_body_bytes: a longer request body is answered 413. Reading one holds up
            all others; a text of a quarter of a million tokens fits the default.
        max_prompts: a completion request with more prompts is answered 400.
        body_timeout_s: a body that has not arrived after so many seconds is answered 408.
        max_waiting: requests beyond so many waiting ones are answered 429.
        drain_s: seconds that answers get to finish once the server is told to stop.
        ping_s: seconds of silence after which a stream sends a comment, to keep proxies calm.
    """

    served_name: str | None = None
    max_body_bytes: int = 2**20
    max_prompts: int = 32
    body_timeout_s: float = 30.0
    max_waiting: int = 64
    drain_s: float = 30.0
    ping_s: float = 15.0
