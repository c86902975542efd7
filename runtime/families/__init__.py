"""The closed table of families: a config's `model_type` is looked up in it, and never imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import UnsupportedModel
from ..spec import DecoderSpec
from .bloom import bloom
from .llama import llama, mistral, qwen2, qwen3
from .opt import opt

_FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], DecoderSpec]] = {
    "bloom": bloom,
    "llama": llama,
    "mistral": mistral,
    "opt": opt,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


def decoder_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a parsed config.json.

    Raises:
        UnsupportedModel: the family, or an option of it, is not known here.
        CheckpointError: a value is missing or impossible.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise UnsupportedModel(
            f"config.json: model_type {str(kind)[:40]!r} cannot be served; "
            f"supported: {', '.join(sorted(_FAMILIES))}"
        )
    return _FAMILIES[kind](config)
