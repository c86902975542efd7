"""The closed table of families: a config's `model_type` is looked up in it, and never imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import UnsupportedModel
from ..spec import DecoderSpec
from .bloom import bloom
from .experts import mixtral, qwen3_moe
from .gemma import gemma2, gemma3_text
from .gpt2 import gpt2
from .gpt_neox import gpt_neox
from .llama import llama, mistral, phi3, qwen2, qwen3
from .opt import opt
from .rotary import check_turned

_FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], DecoderSpec]] = {
    "bloom": bloom,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "opt": opt,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}
SERVED = frozenset(_FAMILIES)
_HINTS: Mapping[str, str] = {"gemma3": "it reads images too; its text models, gemma3_text, can be"}


def decoder_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a parsed config.json.

    Raises:
        UnsupportedModel: the family, or an option of it, is not known here.
        CheckpointError: a value is missing or impossible.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        hint = f" ({_HINTS[str(kind)]})" if str(kind) in _HINTS else ""
        raise UnsupportedModel(
            f"config.json: model_type {str(kind)[:40]!r} cannot be served{hint}; "
            f"supported: {', '.join(sorted(_FAMILIES))}"
        )
    spec = _FAMILIES[kind](config)
    check_turned(spec)
    return spec
