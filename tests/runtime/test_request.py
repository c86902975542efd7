"""What a request may ask for; everything else is refused, naming the parameter."""

from __future__ import annotations

from typing import Any

import pytest
from halfweave.errors import RequestError
from halfweave.runtime.params import SamplingParams
from halfweave.runtime.request import GenerationRequest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", -1),
        ("max_tokens", 2**31),
        ("max_tokens", True),
        ("max_tokens", 1.0),
        ("temperature", -1),
        ("temperature", 1e300),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -5),
        ("min_p", 2),
        ("seed", 2**63),
        ("seed", 0.5),
        ("stop", ("",)),
        ("stop", ("a", "b", "c", "d", "e")),
        ("stop", ("x" * 100_000,)),
        ("stop", "text"),
        ("stop", (1,)),
        ("min_tokens", 129),
        ("min_tokens", -1),
        ("ignore_eos", 1),
    ],
)
def test_an_illegal_parameter_is_named(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-300, 9e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert SamplingParams(temperature=temperature).greedy


def test_the_defaults_are_legal_and_not_greedy() -> None:
    assert not SamplingParams().greedy


@pytest.mark.parametrize("prompt", [(), (-1,), (1.0,), (True,), ("a",)])
def test_an_illegal_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        GenerationRequest("id", prompt)
    assert caught.value.param == "prompt"
