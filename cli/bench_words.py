"""What a call of `bench` asks for, and how it was typed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..files import find_directory
from .flags import Loading, Speed, Traffic

MODES = ("kernel", "offline", "serve")
_LIMITS = ("ttft", "tpot", "e2e")
_SECRETS = ("--api-key",)


@dataclass(frozen=True)
class Asked:
    """What a call asks for; a model is needed but for an endpoint that runs already."""

    model: str | None
    mode: str
    limits: tuple[str, ...]
    speed: Speed
    traffic: Traffic
    loading: Loading

    @property
    def needed_model(self) -> str:
        """Raises UsageError where none was given."""
        if self.model is None:
            raise UsageError(
                "a model directory is missing", f"halfweave bench MODEL {self.mode}, or --help"
            )
        return self.model

    def repetitions(self, default: int) -> int:
        """How many rounds, if that was said."""
        return default if self.speed.repetitions is None else self.speed.repetitions


def understood(words: Sequence[str], speed: Speed, traffic: Traffic, loading: Loading) -> Asked:
    """Sort the words: limits of goodput, which may stand behind the first, a mode, a model.

    Raises:
        UsageError: a word is left.
    """
    limits = tuple(word for word in words if word.split(":")[0] in _LIMITS)
    others = [word for word in words if word not in limits]
    mode = others.pop() if others and others[-1] in MODES else "offline"
    if len(others) == 2 and others[0] in MODES:
        right = f"halfweave bench {others[1]} {others[0]}"
        raise UsageError(f"the model comes before {others[0]!r}", right)
    if len(others) > 1:
        raise UsageError(f"{others[1]!r} is none of {', '.join(MODES)}", "halfweave bench --help")
    return Asked(
        others[0] if others else None,
        mode,
        (*traffic.goodput, *limits),
        speed,
        traffic,
        loading,
    )


def named(model: str, against: Sequence[str]) -> dict[str, str]:
    """The directories under the names to print."""
    paths = [model, *against]
    names = [find_directory(path).resolve().name for path in paths]
    return dict(zip(names if len(set(names)) == len(names) else paths, paths, strict=True))


def command_line() -> list[str]:
    """As it was typed, but for what is secret."""
    words, hidden = ["halfweave"], False
    for word in sys.argv[1:]:
        name, equals, _ = word.partition("=")
        secret = name in _SECRETS and bool(equals)
        words.append("***" if hidden else f"{name}=***" if secret else word)
        hidden = word in _SECRETS
    return words
