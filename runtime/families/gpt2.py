"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, q, k and v in one linear.

Its linears are transformers' Conv1D: dense ones are stored as [K, N].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..fields import flag, number, positive_int
from ..spec import DecoderSpec, LearnedSpec, Names, NormSpec, Stored
from .options import activation_of, heads_of, layers_of, present, require

_LINEARS = {
    **dict.fromkeys("qkv", Stored("attn.c_attn", ("q", "k", "v"), transposed=True)),
    "o": Stored("attn.c_proj", transposed=True),
    "up": Stored("mlp.c_fc", transposed=True),
    "down": Stored("mlp.c_proj", transposed=True),
}
_NAMES = Names(
    blocks="transformer.h",
    embedding="transformer.wte",
    positions="transformer.wpe",
    norm="transformer.ln_f",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    linears=_LINEARS,
)


def gpt2(config: Mapping[str, Any]) -> DecoderSpec:
    """Read its config.json; raises as `decoder_spec`."""
    require(config, "scale_attn_by_inverse_layer_idx", False)
    require(config, "add_cross_attention", False)
    hidden = positive_int(config, present(config, "n_embd", "hidden_size"))
    heads = heads_of(config, present(config, "n_head", "num_attention_heads"), hidden)
    return DecoderSpec(
        family="gpt2",
        layers=layers_of(config, present(config, "n_layer", "num_hidden_layers")),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=positive_int(config, "n_inner", 4 * hidden),
        vocab=positive_int(config, "vocab_size"),
        max_positions=positive_int(config, present(config, "n_positions", "n_ctx"), 1024),
        norm=NormSpec("layer", number(config, "layer_norm_epsilon", 1e-5)),
        positions=LearnedSpec(),
        activation=activation_of(config, "activation_function", "gelu_new"),
        gated=False,
        biased=frozenset(_LINEARS),
        tied=flag(config, "tie_word_embeddings", True),
        names=_NAMES,
        attention_scale=None if flag(config, "scale_attn_weights", True) else 1.0,
    )
