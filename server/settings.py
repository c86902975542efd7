"""The limits one server runs with. Knows numbers, not requests."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ServerSettings:
    """What an operator may choose.

    Attributes:
        api_keys: a request must bring one of these, if there are any.
        max_body_bytes: a longer request body is answered 413. Reading one holds up
            all others; a text of a quarter of a million tokens fits the default.
        max_header_bytes, max_headers: larger or more ones are answered 431.
        max_prompts: a completion request with more prompts is answered 400.
        header_timeout_s: a connection that has not sent a whole head after so long is closed.
        body_timeout_s: a body that has not arrived after so many seconds is answered 408.
        idle_timeout_s: a connection between two requests is closed after so long.
        send_timeout_s: a client that takes nothing for so long loses its connection.
        max_unread: an answer of which so many pieces wait for a slow client is ended.
        drain_s: seconds that answers get to finish once the server is told to stop.
        ping_s: seconds of silence after which a stream sends a comment, to keep proxies calm.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 2**20
    max_header_bytes: int = 2**16
    max_headers: int = 100
    max_prompts: int = 32
    header_timeout_s: float = 15.0
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 30.0
    send_timeout_s: float = 60.0
    max_unread: int = 4096
    drain_s: float = 30.0
    ping_s: float = 15.0
