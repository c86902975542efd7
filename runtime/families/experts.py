"""Mixtral (2401.04088) and Qwen3-MoE (2505.09388): Llama's blocks with experts for MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import CheckpointError
from ..fields import flag, positive_int
from ..spec import MLP_ROLES, DecoderSpec, ExpertsSpec, Stored
from .llama import LLAMA_NAMES, llama_like, qwen3, window_of
from .options import ATTENTION_ROLES, present

_MOST_EXPERTS = 1024
_MIXTRAL_NAMES = replace(
    LLAMA_NAMES, linears={role: LLAMA_NAMES.linears[role] for role in ATTENTION_ROLES}
)
_MIXTRAL_EXPERT = {
    "gate": Stored("block_sparse_moe.experts.{expert}.w1"),
    "up": Stored("block_sparse_moe.experts.{expert}.w3"),
    "down": Stored("block_sparse_moe.experts.{expert}.w2"),
}
_MIXTRAL_DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
_QWEN3_EXPERT = {role: Stored(f"mlp.experts.{{expert}}.{role}_proj") for role in MLP_ROLES}


def mixtral(config: Mapping[str, Any]) -> DecoderSpec:
    """Read its config.json; raises as `decoder_spec`."""
    spec = llama_like("mixtral", {**_MIXTRAL_DEFAULTS, **config}, ())
    count, chosen = _counts(config, 8, 2)
    experts = ExpertsSpec(
        count=count,
        chosen=chosen,
        ffn=spec.ffn,
        renormalised=True,
        layers=frozenset(range(spec.layers)),
        router="block_sparse_moe.gate",
        linears=_MIXTRAL_EXPERT,
    )
    return replace(spec, names=_MIXTRAL_NAMES, experts=experts, window=window_of(config))


def qwen3_moe(config: Mapping[str, Any]) -> DecoderSpec:
    """Read its config.json; raises as `decoder_spec`."""
    hidden, heads = (positive_int(config, key) for key in ("hidden_size", "num_attention_heads"))
    defaults = {
        "head_dim": max(hidden // heads, 1),
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
    }
    spec = qwen3({**defaults, **config})
    count, chosen = _counts(config, 128, 8)
    experts = ExpertsSpec(
        count=count,
        chosen=chosen,
        ffn=positive_int(config, "moe_intermediate_size", 768),
        renormalised=flag(config, "norm_topk_prob", False),
        layers=_sparse_layers(config, spec.layers),
        router="mlp.gate",
        linears=_QWEN3_EXPERT,
    )
    return replace(spec, family="qwen3_moe", experts=experts)


def _counts(config: Mapping[str, Any], count: int, chosen: int) -> tuple[int, int]:
    """How many experts there are, and how many a token takes; with the family's defaults."""
    key = present(config, "num_local_experts", "num_experts")
    count = positive_int(config, key, count)
    chosen = positive_int(config, "num_experts_per_tok", chosen)
    if count > _MOST_EXPERTS or chosen > count:
        raise CheckpointError(
            f"config.json: {chosen} of {count} experts; {_MOST_EXPERTS} at most there may be"
        )
    return count, chosen


def _sparse_layers(config: Mapping[str, Any], layers: int) -> frozenset[int]:
    """Every `decoder_sparse_step`-th layer but those listed."""
    plain = config.get("mlp_only_layers") or []
    if not isinstance(plain, list) or not all(type(layer) is int for layer in plain):
        raise CheckpointError("config.json: mlp_only_layers is no list of layers")
    step = positive_int(config, "decoder_sparse_step", 1)
    return frozenset(n for n in range(layers) if (n + 1) % step == 0) - frozenset(plain)
