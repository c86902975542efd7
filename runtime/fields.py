"""Strict readers of numbers from a config: the right type, in range, or a typed error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError

MAX_INT = 2**31 - 1


def positive_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer of 1 to 2^31 - 1; a missing or null one is `default`, if there is one."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 0 < value <= MAX_INT:
        raise CheckpointError(f"config.json: {key} is {_short(value)}, no positive integer")
    return value


def number(
    config: Mapping[str, Any], key: str, default: float | None = None, above: float = 0.0
) -> float:
    """A finite number greater than `above`; a missing or null one is `default`."""
    value: Any = config.get(key)
    if value is None and default is not None:
        return default
    legal = type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
    if not legal or value <= above:
        raise CheckpointError(f"config.json: {key} is {_short(value)}, no number above {above:g}")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; a missing or null one is `default`."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {_short(value)}, neither true nor false")
    return value


def token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """One token id or a list of them; missing or null is none."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise CheckpointError(f"{key} is {_short(value)}, neither a token id nor a list of them")
    return tuple(ids)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
