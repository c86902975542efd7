"""Reading config.json: both spellings of rope, and refusal of everything that is not known."""

from __future__ import annotations

from typing import Any

import pytest
from halfweave.errors import CheckpointError, UnsupportedModel
from halfweave.runtime.families import decoder_spec
from halfweave.runtime.spec import RopeSpec
from support.tiny import LLAMA3_ROPE

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
    assert decoder_spec({**CONFIG, "model_type": "mistral", **stated}).window == window


def test_both_spellings_of_rope_mean_the_same() -> None:
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    older = {**CONFIG, "rope_theta": LLAMA3_ROPE["rope_theta"], "rope_scaling": scaling}
    newer = {**CONFIG, "rope_parameters": LLAMA3_ROPE}
    assert decoder_spec(older).positions == decoder_spec(newer).positions
    oldest = {**CONFIG, "rope_scaling": {"type": "linear", "factor": 2.0}}
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    newest = {**CONFIG, "rope_parameters": linear}
    assert decoder_spec(oldest).positions == decoder_spec(newest).positions


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
    ],
)
def test_an_impossible_value_names_its_field(change: dict[str, Any]) -> None:
    """Row 20."""
    with pytest.raises(CheckpointError, match=r"config\.json"):
        decoder_spec({**CONFIG, **change})
