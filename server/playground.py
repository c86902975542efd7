"""GET /: a page to try the served models from a browser.

Knows one file and the headers it goes out with, not the API that the page calls.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

_PAGE = Path(__file__).with_name("playground.html")
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def playground_router() -> APIRouter:
    """The route of the page, which is read once, now."""
    # As text, because browsers hash a script with its line ends as \n, whatever the file has.
    page = _PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def playground() -> Response:
        return Response(page, media_type="text/html", headers=headers)

    return router


def _policy(page: str) -> str:
    """Run exactly the script and the style of this page, and talk to nobody but this server."""
    hashes = {tag: _hash(content) for tag, content in _INLINE.findall(page)}
    rules = (
        "default-src 'none'",
        f"script-src '{hashes['script']}'",
        f"style-src '{hashes['style']}'",
        "img-src data:",  # the page's icon
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # No text may become markup: innerHTML and its kin throw.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return "; ".join(rules)


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
