"""GPT-NeoX (2204.06745) and Pythia (2304.01373): a rotary part of each head, parallel residuals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..fields import flag, number, positive_int
from ..spec import DecoderSpec, Names, NormSpec, Stored
from .options import ATTENTION_ROLES, activation_of, heads_of, layers_of
from .rotary import partial_rope_of

_LINEARS = {
    **dict.fromkeys("qkv", Stored("attention.query_key_value", ("q", "k", "v"), by_head=True)),
    "o": Stored("attention.dense"),
    "up": Stored("mlp.dense_h_to_4h"),
    "down": Stored("mlp.dense_4h_to_h"),
}
_NAMES = Names(
    blocks="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    norm="gpt_neox.final_layer_norm",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    linears=_LINEARS,
    head="embed_out",
)
_ROTARY_SHARE = 0.25  # of a head, where the config says nothing


def gpt_neox(config: Mapping[str, Any]) -> DecoderSpec:
    """Read its config.json; raises as `decoder_spec`."""
    hidden = positive_int(config, "hidden_size")
    heads = heads_of(config, "num_attention_heads", hidden)
    biased = frozenset(_LINEARS)
    if not flag(config, "attention_bias", True):
        biased -= frozenset(ATTENTION_ROLES)
    older = {
        "partial_rotary_factor": config.get("rotary_pct", _ROTARY_SHARE),
        "rope_theta": config.get("rotary_emb_base", 10000.0),
    }
    return DecoderSpec(
        family="gpt_neox",
        layers=layers_of(config),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=positive_int(config, "intermediate_size"),
        vocab=positive_int(config, "vocab_size"),
        max_positions=positive_int(config, "max_position_embeddings", 2048),
        norm=NormSpec("layer", number(config, "layer_norm_eps", 1e-5)),
        positions=partial_rope_of({**older, **config}),
        activation=activation_of(config, "hidden_act", "gelu"),
        gated=False,
        biased=biased,
        tied=flag(config, "tie_word_embeddings", False),
        names=_NAMES,
        residual="parallel" if flag(config, "use_parallel_residual", True) else "pre",
    )
