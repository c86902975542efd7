"""What every endpoint needs: the models, the limits, and whether work is taken on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import UsageError
from ..runtime.engine import Engine
from ..runtime.grammar import GrammarCompiler
from ..runtime.model import Model
from .bounded import Bounded
from .errors import ApiError, unavailable
from .mailbox import Mailbox
from .metrics import Meters
from .settings import ServerSettings

# Forms of answers that are compiled at a time, each for some seconds at most, and that may wait.
_COMPILING, _MOST_COMPILING = 2, 64


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
class Served:
    """One model under the name that requests use. The engine stays its maker's to close."""

    name: str
    engine: Engine
    since: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> Model:
        """What the engine runs."""
        return self.engine.model

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles what answers must look like."""
        return GrammarCompiler(self.model.tokenizer)


class Service:
    """All served models, by name."""

    def __init__(
        self, served: Sequence[Served], settings: ServerSettings, activity: Activity
    ) -> None:
        """Raises UsageError if there is no model, or two of one name."""
        self.models: Mapping[str, Served] = {each.name: each for each in served}
        if not served or len(self.models) < len(served):
            names = [each.name for each in served]
            raise UsageError(f"models need names of their own, given {names}")
        self.settings, self.activity = settings, activity
        self.meters = Meters({each.name: each.engine for each in served})
        self._mailbox: Mailbox | None = None
        self._compiling: Bounded | None = None

    @property
    def mailbox(self) -> Mailbox:
        """The way from the engines to the running event loop."""
        if self._mailbox is None:
            self._mailbox = Mailbox()
        return self._mailbox

    @property
    def compiling(self) -> Bounded:
        """Where forms of answers are compiled, for all models."""
        if self._compiling is None:
            self._compiling = Bounded(_COMPILING, _MOST_COMPILING, "their form to be compiled")
        return self._compiling

    @property
    def alive(self) -> bool:
        """Whether every engine carries out requests."""
        return all(each.engine.alive for each in self.models.values())

    def find(self, name: str) -> Served:
        """The model of that name.

        Raises:
            ApiError: the 404 of OpenAI.
        """
        if name not in self.models:
            known = ", ".join(map(repr, self.models))
            message = f"the model {name[:100]!r} is not served here; {known} is"
            raise ApiError(404, message, code="model_not_found", param="model")
        return self.models[name]

    def check_open(self) -> None:
        """Raise a 503 once the server has been told to stop."""
        if self.activity.draining:
            raise unavailable("the server is shutting down", "draining")
