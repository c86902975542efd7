"""GET /v1/models and /v1/models/{id}: what is served."""

from __future__ import annotations

from fastapi import APIRouter

from .documents import READING_ERRORS
from .responses import ModelCard, ModelList
from .service import Served, Service


def models_router(service: Service) -> APIRouter:
    """The routes that say which models there are."""
    router = APIRouter()

    @router.get("/models", responses=READING_ERRORS)
    async def list_models() -> ModelList:
        """The models served."""
        return ModelList(object="list", data=[_card(each) for each in service.models.values()])

    # A name may hold slashes, as those of a hub do.
    @router.get("/models/{name:path}", responses=READING_ERRORS)
    async def retrieve_model(name: str) -> ModelCard:
        """One model, by the name that requests use."""
        return _card(service.find(name))

    return router


def _card(served: Served) -> ModelCard:
    return ModelCard(
        id=served.name,
        object="model",
        created=served.since,
        owned_by="halfweave",
        root=served.model.name,
        parent=None,
        max_model_len=served.engine.max_model_len,
        permission=[],
    )
