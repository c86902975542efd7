"""The closed table of architectures the pruner knows.

Keyed by the `model_type` of config.json. A name from a config is only ever looked up here; it
never chooses a path or an import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedModel
from ..runtime.families.names import asks_for_own_code, dense_is_transposed
from .family import Experts, Family, FreeChannels, Stages

_MOST_LAYERS, _MOST_EXPERTS = 10_000, 10_000


def family_of(config: Mapping[str, Any]) -> Family:
    """Read a parsed config.json.

    Raises:
        UnsupportedModel: the config asks for code of its own, or its model_type is unknown.
        CheckpointError: a number is missing or absurd.
    """
    if asks_for_own_code(config):
        raise UnsupportedModel(
            "config.json has an auto_map: the model asks for code of its own, which is never run"
        )
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UnsupportedModel(
            f"config.json: model_type {str(kind)[:40]!r} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[kind](config)


def _llama(config: Mapping[str, Any], tied: bool = False, **further: Any) -> Family:
    gated = FreeChannels(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
    layout = {
        "stages": (*_SEPARATE_ATTENTION, gated.makers, (gated.reader,)),
        "free": (gated,),
        "context": _count(config, "max_position_embeddings"),
        **further,
    }
    return Family(
        layers=_layers(config),
        blocks="model.layers",
        embedding="model.embed_tokens",
        norm="model.norm",
        tied=_tied(config, tied),
        **layout,
    )


def _gemma(config: Mapping[str, Any]) -> Family:
    capped = config.get("final_logit_softcapping", 30.0) is not None
    # Capped scores of attention are beyond scaled_dot_product_attention.
    return _llama(config, tied=True, attention="eager", capped=capped)


def _gemma3(config: Mapping[str, Any]) -> Family:
    capped = config.get("final_logit_softcapping") is not None
    return _llama(config, tied=True, capped=capped)


def _phi3(config: Mapping[str, Any]) -> Family:
    gated = FreeChannels(("mlp.gate_up_proj",), "mlp.down_proj")
    attention = (("self_attn.qkv_proj",), ("self_attn.o_proj",))
    return _llama(config, stages=(*attention, gated.makers, (gated.reader,)), free=(gated,))


def _mixtral(config: Mapping[str, Any]) -> Family:
    count, chosen = _count(config, "num_local_experts", 8), _count(config, "num_experts_per_tok", 2)
    return _routed(config, Experts("block_sparse_moe", "w1", "w3", "w2", *_choice(count, chosen)))


def _qwen3_moe(config: Mapping[str, Any]) -> Family:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise UnsupportedModel(
            "config.json: mlp_only_layers and decoder_sparse_step: blocks without experts among "
            "those with them are not supported"
        )
    count = _count(config, "num_experts", _count(config, "num_local_experts", 128))
    chosen = _count(config, "num_experts_per_tok", 8)
    linears = ("gate_proj", "up_proj", "down_proj")
    return _routed(config, Experts("mlp", *linears, *_choice(count, chosen)))


def _routed(config: Mapping[str, Any], experts: Experts) -> Family:
    return _llama(
        config,
        stages=(*_SEPARATE_ATTENTION, *experts.stages),
        free=experts.free,
        experts=experts,
        stored_mlp=experts.place,
    )


def _opt(config: Mapping[str, Any]) -> Family:
    attention = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v"))
    last = config.get("do_layer_norm_before", True)
    last = last and not config.get("_remove_final_layer_norm", False)
    return Family(
        layers=_layers(config),
        blocks="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        norm="model.decoder.final_layer_norm" if last else "",
        stages=(attention, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        free=(FreeChannels(("fc1",), "fc2"),),
        context=_count(config, "max_position_embeddings"),
        tied=_tied(config, True),
    )


def _fused(names: tuple[str, str, str, str]) -> tuple[Stages, tuple[FreeChannels, ...]]:
    """Stages and free channels of q, k and v in one, output, and the two halves of a plain MLP."""
    return tuple((name,) for name in names), (FreeChannels((names[2],), names[3]),)


def _bloom(config: Mapping[str, Any]) -> Family:
    stages, free = _fused(
        (
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        )
    )
    return Family(
        layers=_layers(config, "n_layer", "num_hidden_layers"),
        blocks="transformer.h",
        embedding="transformer.word_embeddings",
        norm="transformer.ln_f",
        stages=stages,
        free=free,
        context=None,  # linear biases go on
        tied=_tied(config, True),
        attention="eager",
        tuples=True,
    )


def _gpt2(config: Mapping[str, Any]) -> Family:
    stages, free = _fused(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
    return Family(
        layers=_layers(config, "n_layer", "num_hidden_layers"),
        blocks="transformer.h",
        embedding="transformer.wte",
        norm="transformer.ln_f",
        stages=stages,
        free=free,
        context=_count(config, "n_positions", 1024),
        tied=_tied(config, True),
        transposed=dense_is_transposed(config),
    )


def _gpt_neox(config: Mapping[str, Any]) -> Family:
    stages, free = _fused(
        (
            "attention.query_key_value",
            "attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        )
    )
    return Family(
        layers=_layers(config),
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        norm="gpt_neox.final_layer_norm",
        stages=stages,
        free=free,
        context=_count(config, "max_position_embeddings"),
        tied=_tied(config, False),
        head="embed_out",
    )


_SEPARATE_ATTENTION = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
)
FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], Family]] = {
    "bloom": _bloom,
    "gemma2": _gemma,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _mixtral,
    "opt": _opt,
    "phi3": _phi3,
    "qwen2": _llama,
    "qwen3": _llama,
    "qwen3_moe": _qwen3_moe,
}


def _layers(config: Mapping[str, Any], *keys: str) -> int:
    for key in keys or ("num_hidden_layers",):
        if config.get(key) is not None:
            found = _count(config, key)
            if found is not None and found <= _MOST_LAYERS:
                return found
    raise CheckpointError(
        f"config.json: {(keys or ('num_hidden_layers',))[0]} is missing, or no number of layers"
    )


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int | None:
    """A whole number above 0; `default` where the config has none."""
    found = config.get(key)
    if found is None:
        return default
    if type(found) is not int or found <= 0:
        raise CheckpointError(f"config.json: {key} {str(found)[:40]} is no number above 0")
    return found


def _choice(count: int | None, chosen: int | None) -> tuple[int, int]:
    assert count is not None and chosen is not None
    if not chosen <= count <= _MOST_EXPERTS:
        raise CheckpointError(f"config.json: {chosen} experts a token do not go with {count}")
    return count, chosen


def _tied(config: Mapping[str, Any], default: bool) -> bool:
    found = config.get("tie_word_embeddings", default)
    if type(found) is not bool:
        raise CheckpointError("config.json: tie_word_embeddings is neither true nor false")
    return found
