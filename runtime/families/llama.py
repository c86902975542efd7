"""Llama and what is built like it: RMSNorm, rotary positions, shared keys, a gated MLP.

Mistral (2310.06825) adds a sliding window, Phi-3 (2404.14219) stores several linears in one, Qwen2
(2407.10671) has biases, Qwen3 (2505.09388) norms of every head's queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import CheckpointError, UnsupportedModel
from ..fields import flag, number, positive_int
from ..spec import MLP_ROLES, DecoderSpec, Names, NormSpec, RopeSpec, Stored
from .options import ATTENTION_ROLES, activation_of, layers_of, require
from .rotary import partial_rope_of, rope_of

LLAMA_NAMES = Names(
    blocks="model.layers",
    embedding="model.embed_tokens",
    norm="model.norm",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    linears={
        **{role: Stored(f"self_attn.{role}_proj") for role in ATTENTION_ROLES},
        **{role: Stored(f"mlp.{role}_proj") for role in MLP_ROLES},
    },
)
_PHI3_NAMES = replace(
    LLAMA_NAMES,
    linears={
        **dict.fromkeys("qkv", Stored("self_attn.qkv_proj", ("q", "k", "v"))),
        "o": Stored("self_attn.o_proj"),
        **dict.fromkeys(("gate", "up"), Stored("mlp.gate_up_proj", ("gate", "up"))),
        "down": Stored("mlp.down_proj"),
    },
)
# What transformers takes for a field that is not there; null may mean another thing.
_MISTRAL_DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
_PHI3_DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_QWEN_DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32}


def llama(config: Mapping[str, Any]) -> DecoderSpec:
    """Read its config.json; raises as `decoder_spec`."""
    attention = ATTENTION_ROLES if flag(config, "attention_bias", False) else ()
    mlp = MLP_ROLES if flag(config, "mlp_bias", False) else ()
    return llama_like("llama", config, (*attention, *mlp))


def mistral(config: Mapping[str, Any]) -> DecoderSpec:
    """Read its config.json; raises as `decoder_spec`."""
    stated = {**_MISTRAL_DEFAULTS, **config}
    return replace(llama_like("mistral", stated, ()), window=window_of(stated))


def phi3(config: Mapping[str, Any]) -> DecoderSpec:
    """Read its config.json; raises as `decoder_spec`."""
    spec = llama_like("phi3", {**_PHI3_DEFAULTS, **config}, (), partial_rope_of(config))
    return replace(spec, window=window_of(config), names=_PHI3_NAMES)


def qwen2(config: Mapping[str, Any]) -> DecoderSpec:
    """Read its config.json; raises as `decoder_spec`."""
    _require_full_attention(config)
    return llama_like("qwen2", {**_QWEN_DEFAULTS, **config}, ("q", "k", "v"))


def qwen3(config: Mapping[str, Any]) -> DecoderSpec:
    """Read its config.json; raises as `decoder_spec`."""
    _require_full_attention(config)
    biased = ATTENTION_ROLES if flag(config, "attention_bias", False) else ()
    names = replace(LLAMA_NAMES, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    stated = {**_QWEN_DEFAULTS, "head_dim": 128, **config}
    return replace(llama_like("qwen3", stated, biased), names=names)


def _require_full_attention(config: Mapping[str, Any]) -> None:
    require(config, "use_sliding_window", False)
    kinds = config.get("layer_types")
    full = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    if kinds is not None and not full:
        raise UnsupportedModel("config.json: layer_types other than full_attention")


def window_of(config: Mapping[str, Any]) -> int | None:
    """Positions that a token sees; missing or null says that there is no such limit."""
    stated = config.get("sliding_window") is not None
    return positive_int(config, "sliding_window") if stated else None


def llama_like(
    family: str, config: Mapping[str, Any], biased: tuple[str, ...], rope: RopeSpec | None = None
) -> DecoderSpec:
    """What Llama's fields say, with `rope` if that is written in another way."""
    heads = positive_int(config, "num_attention_heads")
    hidden = positive_int(config, "hidden_size")
    kv_heads = positive_int(config, "num_key_value_heads", heads)
    head_dim = positive_int(config, "head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise CheckpointError(
            f"config.json: {heads} heads of {head_dim} do not go with {kv_heads} key-value heads"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is no multiple of {heads} heads")
    return DecoderSpec(
        family=family,
        layers=layers_of(config),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=positive_int(config, "intermediate_size"),
        vocab=positive_int(config, "vocab_size"),
        max_positions=positive_int(config, "max_position_embeddings", 2048),
        norm=NormSpec("rms", number(config, "rms_norm_eps", 1e-6)),
        positions=rope or rope_of(config),
        activation=activation_of(config, "hidden_act", "silu"),
        gated=True,
        biased=frozenset(biased),
        tied=flag(config, "tie_word_embeddings", False),
        names=LLAMA_NAMES,
    )
