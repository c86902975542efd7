"""What a decoder is made of, as typed data: one spec per model, one reader per family.

The table of families is closed: a config's `model_type` is looked up in it and never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, UnsupportedModel
from .fields import flag, number, positive_int

_MAX_LAYERS = 1000


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions (Su et al., 2104.09864) and how they are stretched to longer contexts.

    `kind` is default, linear (positions divided by `factor`) or llama3 (low frequencies divided by
    `factor`, with a smooth passage between the two wavelength limits).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer with pre-norm RMSNorm, rotary attention and a gated MLP."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    norm_eps: float
    rope: RopeSpec
    attention_bias: bool
    mlp_bias: bool
    tied: bool

    @property
    def linear_shapes(self) -> Mapping[str, tuple[int, int]]:
        """(N, K) of each linear of a block, by name inside the block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
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


def _llama(config: Mapping[str, Any]) -> DecoderSpec:
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(
            f"config.json: hidden_act {str(config['hidden_act'])[:40]!r} is not supported; "
            "supported: silu"
        )
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
    layers = positive_int(config, "num_hidden_layers")
    if layers > _MAX_LAYERS:
        raise CheckpointError(f"config.json: num_hidden_layers is {layers}, over {_MAX_LAYERS}")
    return DecoderSpec(
        family="llama",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=positive_int(config, "intermediate_size"),
        vocab=positive_int(config, "vocab_size"),
        max_positions=positive_int(config, "max_position_embeddings", 2048),
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        rope=_rope(config),
        attention_bias=flag(config, "attention_bias", False),
        mlp_bias=flag(config, "mlp_bias", False),
        tied=flag(config, "tie_word_embeddings", False),
    )


def _rope(config: Mapping[str, Any]) -> RopeSpec:
    """Read `rope_parameters`, or the older pair `rope_theta` and `rope_scaling`."""
    block = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(block, dict):
        raise CheckpointError("config.json: the rope parameters are not an object")
    merged = {"rope_theta": config.get("rope_theta", 10000.0), **block}
    kind = merged.get("rope_type", merged.get("type", "default"))
    theta = number(merged, "rope_theta", 10000.0)
    if merged.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1):
        raise UnsupportedModel("config.json: a partial_rotary_factor is not supported")
    if kind == "default":
        return RopeSpec(theta)
    if kind == "linear":
        return RopeSpec(theta, kind, number(merged, "factor"))
    if kind == "llama3":
        return _llama3_rope(theta, merged)
    raise UnsupportedModel(
        f"config.json: rope type {str(kind)[:40]!r} is not supported; "
        "supported: default, linear, llama3"
    )


def _llama3_rope(theta: float, values: Mapping[str, Any]) -> RopeSpec:
    low, high = number(values, "low_freq_factor"), number(values, "high_freq_factor")
    if low >= high:
        raise CheckpointError("config.json: high_freq_factor is not above low_freq_factor")
    original = positive_int(values, "original_max_position_embeddings")
    return RopeSpec(theta, "llama3", number(values, "factor"), low, high, original)


_FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], DecoderSpec]] = {"llama": _llama}
