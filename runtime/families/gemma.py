"""Gemma 2 (2408.00118) and Gemma 3's text models (2503.19786).

As Llama, with scaled embeddings, norms before and behind attention and MLP whose gains are stored
less one, capped scores, and layers that see a window only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import CheckpointError, UnsupportedModel
from ..fields import flag, number, positive_int
from ..spec import DecoderSpec, LocalSpec, RopeSpec
from .llama import LLAMA_NAMES, llama_like
from .options import ATTENTION_ROLES, require
from .rotary import rope_of

_FULL, _LOCAL = "full_attention", "sliding_attention"
_NAMES = replace(
    LLAMA_NAMES,
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
_DEFAULTS = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA2_DEFAULTS = {
    **_DEFAULTS,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3_DEFAULTS = {**_DEFAULTS, "max_position_embeddings": 131072}
_GLOBAL_THETA, _LOCAL_THETA = 1e6, 1e4  # of Gemma 3


def gemma2(config: Mapping[str, Any]) -> DecoderSpec:
    """Read its config.json; raises as `decoder_spec`."""
    stated = {**_GEMMA2_DEFAULTS, **config}
    spec = _gemma("gemma2", stated, rope_of(stated))
    return replace(
        spec,
        local=_local(stated, spec.layers, 2),
        attention_cap=_cap(stated, "attn_logit_softcapping"),
    )


def gemma3_text(config: Mapping[str, Any]) -> DecoderSpec:
    """Read its config.json; raises as `decoder_spec`."""
    stated = {**_GEMMA3_DEFAULTS, **config}
    if stated.get("attn_logit_softcapping") is not None:
        raise UnsupportedModel("config.json: attn_logit_softcapping is no part of Gemma 3")
    everywhere, nearby = _ropes(stated)
    spec = _gemma("gemma3_text", stated, everywhere)
    pattern = positive_int(stated, "sliding_window_pattern", 6)
    return replace(
        spec,
        local=_local(stated, spec.layers, pattern, nearby),
        names=replace(spec.names, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
    )


def _gemma(family: str, config: Mapping[str, Any], rope: RopeSpec) -> DecoderSpec:
    require(config, "use_bidirectional_attention", False)
    activation = config.get("hidden_activation") or "gelu_pytorch_tanh"
    biased = ATTENTION_ROLES if flag(config, "attention_bias", False) else ()
    spec = llama_like(family, {**config, "hidden_act": activation}, biased, rope)
    return replace(
        spec,
        norm=replace(spec.norm, offset=1.0),
        names=_NAMES,
        embedding_factor=spec.hidden**0.5,
        attention_scale=number(config, "query_pre_attn_scalar") ** -0.5,
        logit_cap=_cap(config, "final_logit_softcapping"),
    )


def _cap(config: Mapping[str, Any], key: str) -> float | None:
    return None if config.get(key) is None else number(config, key)


def _local(
    config: Mapping[str, Any], layers: int, pattern: int, rope: RopeSpec | None = None
) -> LocalSpec | None:
    """Which layers see a window only: as listed, or all but every `pattern`-th."""
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = [_LOCAL if (layer + 1) % pattern else _FULL for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise CheckpointError(f"config.json: layer_types is no list of {layers} kinds")
    other = [kind for kind in kinds if kind not in (_FULL, _LOCAL)]
    if other:
        raise UnsupportedModel(
            f"config.json: layer type {str(other[0])[:40]!r} is not supported; "
            f"supported: {_FULL}, {_LOCAL}"
        )
    near = frozenset(layer for layer, kind in enumerate(kinds) if kind == _LOCAL)
    return LocalSpec(near, positive_int(config, "sliding_window"), rope) if near else None


def _ropes(config: Mapping[str, Any]) -> tuple[RopeSpec, RopeSpec]:
    """Of the layers that see all, and of the others; both spellings."""
    kinds = config.get("rope_parameters") or {}
    if not isinstance(kinds, dict) or kinds.keys() - {_FULL, _LOCAL}:
        raise CheckpointError(f"config.json: rope_parameters are not those of {_FULL}, {_LOCAL}")
    everywhere = {
        "rope_theta": config.get("rope_theta", _GLOBAL_THETA),
        **_block(kinds.get(_FULL)),
        **_block(config.get("rope_scaling")),
    }
    theta = config.get("rope_local_base_freq", _LOCAL_THETA)
    nearby = {"rope_theta": theta, **_block(kinds.get(_LOCAL))}
    return rope_of({"rope_parameters": everywhere}), rope_of({"rope_parameters": nearby})


def _block(value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise CheckpointError("config.json: the rope parameters are not an object")
    return value or {}
