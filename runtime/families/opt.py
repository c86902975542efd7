"""OPT (2205.01068): learned positions, LayerNorm, a plain MLP with ReLU, biases everywhere.

OPT-350m norms behind attention and MLP, and its embedding is smaller than its states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

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
_PROJECT_IN, _PROJECT_OUT = "model.decoder.project_in", "model.decoder.project_out"
_FIRST_ROW = 2  # of the table of positions, whose first rows stood for padding
_EPS = 1e-5  # of every LayerNorm; the config has no field for it


def opt(config: Mapping[str, Any]) -> DecoderSpec:
    """Read its config.json; raises as `decoder_spec`."""
    require(config, "layer_norm_elementwise_affine", True)
    hidden = positive_int(config, "hidden_size")
    heads = heads_of(config, "num_attention_heads", hidden)
    before = flag(config, "do_layer_norm_before", True)
    word_size = positive_int(config, "word_embed_proj_dim", hidden)
    names = _NAMES
    if not before or flag(config, "_remove_final_layer_norm", False):
        names = replace(names, norm="")
    if word_size != hidden:
        names = replace(names, project_in=_PROJECT_IN, project_out=_PROJECT_OUT)
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
        names=names,
        residual="pre" if before else "post",
        word_size=None if word_size == hidden else word_size,
    )
