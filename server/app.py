"""The HTTP application: which routes there are, and what surrounds them."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI

from .auth import ApiKeys
from .body import BodyLimit
from .chat import chat_router
from .completions import completions_router
from .errors import install_error_handlers
from .models import models_router
from .operation import operation_router
from .playground import playground_router
from .request_scope import RequestScope
from .service import Activity, Served, Service
from .settings import ServerSettings
from .tokens import tokens_router

_DESCRIPTION = """The OpenAI API for text models: a field is implemented, or refused with 400
`unsupported_parameter`. Nothing that would change an answer is ignored."""


def create_app(
    served: Sequence[Served],
    settings: ServerSettings | None = None,
    activity: Activity | None = None,
) -> FastAPI:
    """An application that serves some models. Their engines stay the caller's to close.

    Set `activity.draining` to refuse new work; `activity.in_flight` says what is left.

    Raises:
        UsageError: there is no model, or two have one name.
    """
    settings, activity = settings or ServerSettings(), activity or Activity()
    service = Service(served, settings, activity)
    # The interactive pages would load scripts from elsewhere; /openapi.json needs nothing.
    app = FastAPI(
        title="halfweave",
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for router in (models_router(service), completions_router(service), chat_router(service)):
        app.include_router(router, prefix="/v1")
        app.include_router(router, include_in_schema=False)  # some clients leave the prefix out
    for router in (tokens_router(service), operation_router(service), playground_router()):
        app.include_router(router)
    install_error_handlers(app)
    app.add_middleware(
        BodyLimit, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s
    )
    app.add_middleware(ApiKeys, keys=settings.api_keys)
    app.add_middleware(RequestScope, activity=activity, max_headers=settings.max_headers)
    return app
