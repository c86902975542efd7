"""OPT (2205.01068): learned positions, LayerNorm, a plain MLP with ReLU, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UnsupportedModel
from ..fields import flag, positive_int
from ..spec import DecoderSpec, LearnedSpec, Names, NormSpec, Stored
from .options import activation_of, heads_of, layers_of, require

_LINEARS = {
    "q": Stored("self_attn.q_proj"),
    "k": Stored("self_attn.k_proj"),
    "v": Stored("self_attn.v_proj"),
    "o": Stored("self_attn.out_proj"),
    "up": Stored("fc1"),
    "down": Stored("fc2"),
}
_NAMES = Names(
    blocks="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    norm="model.decoder.final_layer_norm",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    linears=_LINEARS,
)
_FIRST_ROW = 2  # of the table of positions, whose first rows stood for padding
_EPS = 1e-5  # of every LayerNorm; the config has no field for it


def opt(config: Mapping[str, Any]) -> DecoderSpec:
    """Read its config.json; raises as `decoder_spec`."""
    require(config, "do_layer_norm_before", True)
    require(config, "layer_norm_elementwise_affine", True)
    require(config, "_remove_final_layer_norm", False)
    hidden = positive_int(config, "hidden_size")
    if positive_int(config, "word_embed_proj_dim", hidden) != hidden:
        raise UnsupportedModel("config.json: a word_embed_proj_dim of its own is not supported")
    heads = heads_of(config, "num_attention_heads", hidden)
    return DecoderSpec(
        family="opt",
        layers=layers_of(config),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=positive_int(config, "ffn_dim"),
        vocab=positive_int(config, "vocab_size"),
        max_positions=positive_int(config, "max_position_embeddings", 2048),
        norm=NormSpec("layer", _EPS),
        positions=LearnedSpec(first=_FIRST_ROW),
        activation=activation_of(config, "activation_function", "relu"),
        gated=False,
        biased=frozenset(_LINEARS if flag(config, "enable_bias", True) else ()),
        tied=flag(config, "tie_word_embeddings", True),
        names=_NAMES,
    )
