"""The HTTP application: which routes there are, and what surrounds them."""

from __future__ import annotations

from fastapi import FastAPI

from ..runtime.engine import Engine
from .body import BodyLimit
from .chat import chat_router
from .completions import completions_router
from .errors import install_error_handlers
from .models import models_router
from .request_scope import RequestScope
from .service import Activity, Service
from .settings import ServerSettings

_DESCRIPTION = """The OpenAI API, as far as one small model can keep its promises: a field is
implemented, or refused with 400 `unsupported_parameter`. Nothing is ignored."""


def create_app(
    engine: Engine,
    settings: ServerSettings | None = None,
    activity: Activity | None = None,
) -> FastAPI:
    """An application that serves the engine's model. The engine stays the caller's to close.

    Set `activity.draining` to refuse new work; `activity.in_flight` says what is left.
    """
    settings = settings or ServerSettings()
    activity = activity or Activity()
    service = Service(engine, engine.model, settings, activity)
    # The interactive pages would load scripts from elsewhere; /openapi.json needs nothing.
    app = FastAPI(
        title="halfweave",
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for router in (models_router(service), completions_router(service), chat_router(service)):
        app.include_router(router)
    install_error_handlers(app)
    app.add_middleware(
        BodyLimit, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s
    )
    app.add_middleware(RequestScope, activity=activity)
    return app
