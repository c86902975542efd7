"""Who may share what is remembered of equal prompts: callers of one key, and of one salt."""

from __future__ import annotations

from .protocol import GenerationBody


def salt_of(body: GenerationBody, caller: bytes) -> bytes:
    """What sets this request's beginnings apart from others'. See `auth.caller_of`."""
    return caller + (body.cache_salt or "").encode()
