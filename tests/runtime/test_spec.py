"""Reading config.json: both spellings of rope, and refusal of everything that is not known."""

from __future__ import annotations

from typing import Any

import pytest
from halfweave.errors import CheckpointError, UnsupportedModel
from halfweave.runtime.families import SERVED, decoder_spec
from halfweave.runtime.spec import RopeSpec, Sight
from support.tiny import LLAMA3_ROPE
from transformers import AutoConfig

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def test_missing_fields_take_the_defaults_of_the_family() -> None:
    spec = decoder_spec(CONFIG)
    assert (spec.kv_heads, spec.head_dim, spec.tied, spec.biased) == (4, 16, False, frozenset())


@pytest.mark.parametrize(
    ("stated", "window"),
    [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 7}, 7)],
)
def test_a_mistral_without_the_field_has_its_window(
    stated: dict[str, int | None], window: int | None
) -> None:
    config = {**CONFIG, "model_type": "mistral", "num_key_value_heads": 2}
    assert decoder_spec({**config, **stated}).window == window


def test_both_spellings_of_rope_mean_the_same() -> None:
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    older = {**CONFIG, "rope_theta": LLAMA3_ROPE["rope_theta"], "rope_scaling": scaling}
    newer = {**CONFIG, "rope_parameters": LLAMA3_ROPE}
    assert decoder_spec(older).positions == decoder_spec(newer).positions
    oldest = {**CONFIG, "rope_scaling": {"type": "linear", "factor": 2.0}}
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    newest = {**CONFIG, "rope_parameters": linear}
    # As transformers: somebody has added the older block to a config of today.
    assert decoder_spec({**oldest, "rope_parameters": LLAMA3_ROPE}) == decoder_spec(oldest)
    assert decoder_spec(oldest).positions == decoder_spec(newest).positions


def test_both_spellings_of_gemma_3_mean_the_same() -> None:
    """Older configs have a pattern and two bases, newer ones list layers and parameters."""
    gemma = {**CONFIG, "model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window": 7}
    older = {
        **gemma,
        "sliding_window_pattern": 2,
        "rope_theta": 5e5,
        "rope_local_base_freq": 1e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    newer = {
        **gemma,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    }
    assert decoder_spec(older) == decoder_spec(newer)
    assert decoder_spec(older).sight(2) == Sight(7, RopeSpec(1e3))
    assert decoder_spec(older).sight(3) == Sight(None, RopeSpec(5e5, "linear", 8.0))


def test_both_spellings_of_a_partial_rope_mean_the_same() -> None:
    neox = {**CONFIG, "model_type": "gpt_neox"}
    older = {**neox, "rotary_pct": 0.5, "rotary_emb_base": 5e3}
    block = {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.5}
    assert decoder_spec(older) == decoder_spec({**neox, "rope_parameters": block})
    assert decoder_spec(older).rotary_dim == 8
    assert decoder_spec(neox).rotary_dim == 4  # a quarter, where nothing is said


def test_gemma_3_with_images_is_refused_with_a_word_on_what_can_be_served() -> None:
    with pytest.raises(UnsupportedModel, match=r"'gemma3'.*images.*gemma3_text"):
        decoder_spec({**CONFIG, "model_type": "gemma3"})


def test_no_scaling_is_plain_rope() -> None:
    plain = {**CONFIG, "rope_theta": 5e5, "rope_scaling": None}
    assert decoder_spec(plain).positions == RopeSpec(5e5)


def test_an_unknown_family_is_refused_and_the_known_ones_listed() -> None:
    """Row 4."""
    with pytest.raises(UnsupportedModel, match=r"mamba.*llama"):
        decoder_spec({**CONFIG, "model_type": "mamba"})


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "mish"},
        {"hidden_act": ["silu"]},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"partial_rotary_factor": 0.5},
        {"model_type": "qwen2", "use_sliding_window": True},
        {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
        {"model_type": "qwen2", "layer_types": [[]]},
        {"model_type": "phi3", "rope_scaling": {"type": "longrope", "factor": 2.0}},
        {"model_type": "gemma2", "use_bidirectional_attention": True},
        {"model_type": "gemma2", "layer_types": ["full_attention", "chunked_attention"]},
        {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
        {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"model_type": "gpt_neox", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
        {"model_type": "gpt2", "add_cross_attention": True},
        {"model_type": "opt", "ffn_dim": 128, "layer_norm_elementwise_affine": False},
        {"model_type": "mixtral", "num_key_value_heads": 2, "hidden_act": "mish"},
        {"model_type": "qwen3_moe", "use_sliding_window": True},
        {"model_type": None},
        {"model_type": "../llama"},
    ],
)
def test_an_unknown_option_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel):
        decoder_spec({**CONFIG, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": None},
        {"hidden_size": "64"},
        {"hidden_size": -1},
        {"hidden_size": 2**40},
        {"num_hidden_layers": 2**30},
        {"num_attention_heads": True},
        {"num_key_value_heads": 3},
        {"head_dim": 15},
        {"head_dim": 0},
        {"rms_norm_eps": 0},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": 10**400},
        {"rope_parameters": [1]},
        {"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0}},
        {"rope_parameters": {"rope_type": "llama3"}},
        {"tie_word_embeddings": "yes"},
        {"model_type": "gpt_neox", "rotary_pct": 0.2},
        {"model_type": "phi3", "partial_rotary_factor": 1.5},
        {"model_type": "phi3", "num_attention_heads": 128},
        {"model_type": "gemma2", "layer_types": ["full_attention"]},
        {"model_type": "gemma2", "sliding_window": None},
        {"model_type": "gemma2", "query_pre_attn_scalar": 0},
        {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}},
        {"model_type": "gemma3_text", "rope_scaling": [1]},
        {
            "model_type": "mixtral",
            "num_key_value_heads": 2,
            "num_local_experts": 2,
            "num_experts_per_tok": 3,
        },
        {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 10**6},
        {"model_type": "qwen3_moe", "mlp_only_layers": 3},
        {"model_type": "qwen3_moe", "decoder_sparse_step": 0},
    ],
)
def test_an_impossible_value_names_its_field(change: dict[str, Any]) -> None:
    """Row 20."""
    with pytest.raises(CheckpointError, match=r"config\.json"):
        decoder_spec({**CONFIG, **change})


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OTHER_SIZES = ("n_embd", "n_layer", "n_head", "ffn_dim", "vocab_size", "model_type")


@pytest.mark.parametrize("family", sorted(SERVED))
def test_a_field_that_is_not_there_is_what_transformers_takes_it_for(family: str) -> None:
    """All but sizes that no model may leave out."""
    config = AutoConfig.for_model(family).to_dict()
    wanted = decoder_spec(config)
    for field in config.keys() - {*SIZES, *OTHER_SIZES}:
        less = {key: value for key, value in config.items() if key != field}
        assert decoder_spec(less) == wanted, field
