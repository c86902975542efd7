"""What every endpoint needs: the engine, the model, the limits, and whether work is taken on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..runtime.engine import Engine
from ..runtime.model import Model
from .errors import ApiError, unavailable
from .settings import ServerSettings


@dataclass
class Activity:
    """What goes on at this moment. Changed on the event loop only.

    Attributes:
        in_flight: HTTP requests that are being answered.
        draining: set once the server is to stop; no new generation begins then.
    """

    in_flight: int = 0
    draining: bool = False


@dataclass(frozen=True)
class Service:
    """One served model."""

    engine: Engine
    model: Model
    settings: ServerSettings
    activity: Activity
    started_at: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        """The model's name in requests and answers."""
        return self.settings.served_name or self.model.name

    def check_model(self, name: str) -> None:
        """Raise the 404 of OpenAI unless `name` is the model served."""
        if name != self.name:
            message = f"the model {name[:100]!r} is not served here; {self.name!r} is"
            raise ApiError(404, message, code="model_not_found", param="model")

    def check_open(self) -> None:
        """Raise a 503 once the server has been told to stop."""
        if self.activity.draining:
            raise unavailable("the server is shutting down", "draining")
