"""API keys: who may ask. Knows headers, not what is asked.

A key comes as `Authorization: Bearer KEY`, as the API's clients send it; or as the password of
basic authentication, which is what a browser asks its user for when the playground is opened.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health", "/ready"})  # what a supervisor asks has no key
_KEY = "halfweave.caller"


class ApiKeys:
    """ASGI middleware: without one of the keys every other path is answered 401.

    Hashes are compared, all of them, in constant time: neither a key's beginning nor its length
    can be found out by timing.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._hashes = [_hash(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._hashes or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        given = _hash(_given(Headers(scope=scope).get("authorization", "")))
        matches = [hmac.compare_digest(given, known) for known in self._hashes]
        if not any(matches):
            await _refusal(scope)(scope, receive, send)
            return
        scope.setdefault("state", {})[_KEY] = given
        await self._app(scope, receive, send)


def caller_of(scope: Scope) -> bytes:
    """What tells callers with different keys apart; nothing where there are no keys."""
    caller: bytes = scope.get("state", {}).get(_KEY, b"")
    return caller


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _given(header: str) -> str:
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:  # neither base64 nor UTF-8, or no ASCII
            return ""
    return value if scheme.lower() == "bearer" else ""


def _refusal(scope: Scope) -> Response:
    challenge = {"WWW-Authenticate": "Bearer"}
    response = error_response(
        ApiError(401, "a valid API key is needed", code="invalid_api_key", headers=challenge)
    )
    if scope["path"] == "/":  # in a line of its own, or Chromium does not ask for the password
        basic = 'Basic realm="halfweave: the API key as password"'
        response.headers.append("WWW-Authenticate", basic)
    return response
