"""What an operator asks: whether the server lives, whether to send it work, and how it does."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from .. import __version__
from .documents import READING_ERRORS
from .responses import Health, Version
from .service import Service

_UNWELL: dict[int | str, dict[str, Any]] = {503: {"model": Health}}


def operation_router(service: Service) -> APIRouter:
    """The routes for supervisors, routers and dashboards."""
    router = APIRouter()

    @router.get("/health", response_model=Health, responses=_UNWELL)
    async def health() -> Response:
        """200 as long as the process is worth keeping, also while it drains."""
        return JSONResponse({"status": _state(service)}, 200 if service.alive else 503)

    router.get("/ping", response_model=Health, responses=_UNWELL, include_in_schema=False)(health)

    @router.get("/ready", response_model=Health, responses=_UNWELL)
    async def ready() -> Response:
        """200 while requests are taken on."""
        state = _state(service)
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @router.get("/version", responses=READING_ERRORS)
    async def version() -> Version:
        """Of halfweave."""
        return Version(version=__version__)

    @router.get(
        "/metrics",
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            **READING_ERRORS,
        },
    )
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.meters.text(), media_type="text/plain; version=0.0.4")

    return router


def _state(service: Service) -> str:
    if not service.alive:
        return "dead"
    return "draining" if service.activity.draining else "ok"
