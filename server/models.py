"""GET /v1/models, /v1/models/{id} and /health: what is served, and whether it is."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from .documents import MODEL_ERRORS
from .responses import Health, ModelCard, ModelList
from .service import Service


def models_router(service: Service) -> APIRouter:
    """The routes that read and change nothing."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The models served: one."""
        return ModelList(object="list", data=[_card(service)])

    # A name may hold slashes, as those of a hub do.
    @router.get("/v1/models/{name:path}", responses=MODEL_ERRORS)
    async def retrieve_model(name: str) -> ModelCard:
        """One model, by the name that requests use."""
        service.check_model(name)
        return _card(service)

    @router.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """200 while requests are taken on, and 503 when there is no point in sending any."""
        state = _state(service)
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    return router


def _state(service: Service) -> str:
    if not service.engine.stats().alive:
        return "dead"
    return "draining" if service.activity.draining else "ok"


def _card(service: Service) -> ModelCard:
    return ModelCard(
        id=service.name,
        object="model",
        created=service.started_at,
        owned_by="halfweave",
        root=service.model.name,
        parent=None,
        max_model_len=service.model.max_model_len,
        permission=[],
    )
