"""BLOOM (2211.05100): linear biases for positions, q, k and v in one linear, a normed embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..fields import flag, number, positive_int
from ..spec import AlibiSpec, DecoderSpec, Names, NormSpec, Stored
from .options import heads_of, layers_of, present, require

_LINEARS = {
    **dict.fromkeys("qkv", Stored("self_attention.query_key_value", ("q", "k", "v"), by_head=True)),
    "o": Stored("self_attention.dense"),
    "up": Stored("mlp.dense_h_to_4h"),
    "down": Stored("mlp.dense_4h_to_h"),
}
_NAMES = Names(
    blocks="transformer.h",
    embedding="transformer.word_embeddings",
    embedding_norm="transformer.word_embeddings_layernorm",
    norm="transformer.ln_f",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    linears=_LINEARS,
)
_TRAINED_POSITIONS = 2048  # where the config says nothing; the slopes go on


def bloom(config: Mapping[str, Any]) -> DecoderSpec:
    """Read its config.json; raises as `decoder_spec`."""
    require(config, "apply_residual_connection_post_layernorm", False)
    hidden = positive_int(config, present(config, "hidden_size", "n_embed"))
    heads = heads_of(config, present(config, "n_head", "num_attention_heads"), hidden)
    return DecoderSpec(
        family="bloom",
        layers=layers_of(config, present(config, "n_layer", "num_hidden_layers")),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=4 * hidden,
        vocab=positive_int(config, "vocab_size"),
        max_positions=positive_int(config, "seq_length", _TRAINED_POSITIONS),
        norm=NormSpec("layer", number(config, "layer_norm_epsilon", 1e-5)),
        positions=AlibiSpec(),
        activation="gelu_tanh",
        gated=False,
        biased=frozenset(_LINEARS),
        tied=flag(config, "tie_word_embeddings", True),
        names=_NAMES,
    )
