"""One process of a service on Ray: its engines, and the very application of app.py."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import EngineDeadError, UsageError
from .ray_answers import REPLICA

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..runtime.engine_settings import EngineSettings
    from ..runtime.model import LoadSettings
    from .serve import Offer
    from .settings import ServerSettings

FLUSH_S = 2.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What every replica does; Ray hands it to them.

    `threads` are a replica's, and as many cores are set aside for it. With the device cuda it has
    a GPU of its own.

    Raises:
        UsageError: it should run on a certain GPU.
    """

    offers: Sequence[Offer]
    loading: LoadSettings
    running: EngineSettings
    settings: ServerSettings
    threads: int = 1

    def __post_init__(self) -> None:
        if self.loading.device not in ("cpu", "cuda"):
            message = f"a replica gets its GPU from Ray, and cannot ask for {self.loading.device}"
            raise UsageError(message, "--device cuda")


class Replica:
    """One process of the service: its engines and its application. Ray makes it and calls it."""

    def __init__(self, plan: Plan) -> None:
        """Load the models and warm them up; whatever that raises, Ray passes on."""
        import torch
        from ray import serve

        from .serve import serve_all
        from .service import Activity

        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("halfweave").setLevel(logging.INFO)
        torch.set_num_threads(plan.threads)
        self._plan, self._activity = plan, Activity()
        self._served = serve_all(plan.offers, plan.loading, plan.running)
        self._id: str = serve.get_replica_context().replica_id.unique_id
        _log.info("%s", json.dumps({"replica": self._id, "pid": os.getpid()}))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Ray asks for it once."""
        from .app import create_app

        app = create_app(self._served, self._plan.settings, self._activity)
        app.add_middleware(_FromRay, replica=self._id)
        return app

    async def check_health(self) -> None:
        """Ray asks again and again, and replaces a replica that raises."""
        if not self._activity.draining and not self._alive:
            raise EngineDeadError("the engine died; the log says why")

    async def drain(self) -> None:
        """Refuse new work; return when nothing is in flight, or time is up and it was ended."""
        self._activity.draining = True
        if not await self._idle(self._plan.settings.drain_s):
            _log.warning("aborting %d requests: time is up", self._activity.in_flight)
            for each in self._served:
                await asyncio.to_thread(each.engine.close)
            await self._idle(FLUSH_S)

    @property
    def _alive(self) -> bool:
        return all(each.engine.alive for each in self._served)

    async def _idle(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._activity.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        return self._activity.in_flight == 0


class _FromRay:
    """ASGI middleware: says which replica an answer is from, and when nobody waits for it.

    For a client that has left, Ray's `receive` raises; the application expects to be told.
    """

    def __init__(self, app: ASGIApp, replica: str) -> None:
        from ray.exceptions import RayError

        self._app, self._replica, self._cancelled = app, replica, RayError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_or_leave() -> Message:
            try:
                return await receive()
            except self._cancelled:
                return {"type": "http.disconnect"}

        async def sign(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REPLICA] = self._replica
            await send(message)

        await self._app(scope, receive_or_leave, sign)
