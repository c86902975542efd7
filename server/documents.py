"""How answers are written, and how the OpenAPI document describes them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from .errors import ErrorAnswer

GENERATION_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request asks for something impossible."},
    404: {"model": ErrorAnswer, "description": "No such model, or no such URL."},
    413: {"model": ErrorAnswer, "description": "The body is too large."},
    429: {"model": ErrorAnswer, "description": "The queue is full; see Retry-After."},
    503: {"model": ErrorAnswer, "description": "The server is stopping, or its engine is dead."},
    # Named so that FastAPI does not promise its own shape for 422, which is never sent.
    "4XX": {"model": ErrorAnswer, "description": "Any other mistake of the client."},
}
READING_ERRORS: dict[int | str, dict[str, Any]] = {
    code: GENERATION_ERRORS[code] for code in (404, "4XX")
}


def json_or_stream(model: type[BaseModel]) -> dict[str, Any]:
    """The success of an endpoint that streams on request."""
    return {
        "model": model,
        "description": "The whole answer, or with `stream` its chunks as they are made.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }


def answer(document: BaseModel) -> Response:
    """A success, as JSON, without the fields that were not set."""
    return Response(document.model_dump_json(exclude_unset=True), media_type="application/json")
