"""How configs write rotary positions down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import CheckpointError, UnsupportedModel
from ..fields import number, positive_int
from ..spec import DecoderSpec, RopeSpec


def rope_of(config: Mapping[str, Any]) -> RopeSpec:
    """Read `rope_parameters`, or the older pair `rope_theta` and `rope_scaling`.

    Raises:
        UnsupportedModel: a kind that is not known here, or one that turns a part of each head.
        CheckpointError: a value is missing or impossible.
    """
    merged = _merged(config)
    if merged.get("partial_rotary_factor") not in (None, 1):
        raise UnsupportedModel("config.json: a partial_rotary_factor is not supported")
    return _rope(merged)


def partial_rope_of(config: Mapping[str, Any]) -> RopeSpec:
    """The same, of a family that may turn a part of each head."""
    merged = _merged(config)
    return replace(_rope(merged), share=number(merged, "partial_rotary_factor", 1.0))


def check_turned(spec: DecoderSpec) -> None:
    """Raise CheckpointError if rotary positions turn an odd part of a head, or more than it has."""
    rope, turned, dims = spec.positions, spec.rotary_dim, spec.head_dim
    if isinstance(rope, RopeSpec) and (turned % 2 or not 0 < turned <= dims):
        raise CheckpointError(
            f"config.json: rotary positions turn {turned} of {dims} dimensions, no even part"
        )


def _merged(config: Mapping[str, Any]) -> dict[str, Any]:
    # Where a config has both, the older name is what somebody added: transformers takes it, too.
    block = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(block, dict):
        raise CheckpointError("config.json: the rope parameters are not an object")
    older = {
        "rope_theta": config.get("rope_theta", 10000.0),
        "partial_rotary_factor": config.get("partial_rotary_factor"),
    }
    return {**older, **block}


def _rope(merged: Mapping[str, Any]) -> RopeSpec:
    kind = merged.get("rope_type", merged.get("type", "default"))
    theta = number(merged, "rope_theta", 10000.0)
    if kind == "default":
        return RopeSpec(theta)
    if kind == "linear":
        return RopeSpec(theta, kind, number(merged, "factor"))
    if kind == "llama3":
        return _llama3(theta, merged)
    raise UnsupportedModel(
        f"config.json: rope type {str(kind)[:40]!r} is not supported; "
        "supported: default, linear, llama3"
    )


def _llama3(theta: float, values: Mapping[str, Any]) -> RopeSpec:
    low, high = number(values, "low_freq_factor"), number(values, "high_freq_factor")
    if low >= high:
        raise CheckpointError("config.json: high_freq_factor is not above low_freq_factor")
    original = positive_int(values, "original_max_position_embeddings")
    return RopeSpec(theta, "llama3", number(values, "factor"), low, high, original)
