"""Answers held to a form by a model that writes anything, and what a form allows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from halfweave.errors import RequestError
from halfweave.runtime.grammar import INVALID_SCHEMA, CallForm, Grammar
from halfweave.runtime.params import SamplingParams
from halfweave.runtime.request import Constraint
from halfweave.runtime.sampler import Sampler
from halfweave.runtime.tokenizer import Tokenizer
from support.tiny import EOS, SPECIAL_TOKENS, VOCABULARY

MODEL_ROWS = VOCABULARY
LONGEST = 600
END = SPECIAL_TOKENS.index(EOS)
FORMS = [
    CallForm("<call>one(", {"type": "object", "additionalProperties": False}, ")</call>"),
    CallForm("<call>two(", {"type": "integer"}, ")</call>"),
]


def answer(tokenizer: Tokenizer, form: Grammar, seed: int, longest: int = LONGEST) -> str | None:
    """What a model that likes to end, and else writes anything, answers; None if it does not end.

    What closes a string or a list becomes likelier with every token, so that most answers end.
    """
    random, ids = np.random.default_rng(seed), []
    closing = tokenizer.encode('"]}', special=False)
    sampler = Sampler(SamplingParams(seed=seed), (), tokenizer.eos_ids, form.constraint())
    while len(ids) < longest:
        scores = random.standard_normal(MODEL_ROWS).astype(np.float32) * 3
        scores[closing] += len(ids) / 20
        scores[sorted(tokenizer.eos_ids)] += 3
        token = sampler.choose(scores)
        if token in tokenizer.eos_ids:
            return tokenizer.decode(ids)
        ids.append(token)
    return None


def allowed(constraint: Constraint) -> set[int]:
    scores = np.zeros(MODEL_ROWS, np.float32)
    constraint.forbid(scores)
    return set(np.flatnonzero(np.isfinite(scores)).tolist())


def write(tokenizer: Tokenizer, constraint: Constraint, text: str) -> None:
    """Take a text that the form allows, token by token, as the form would have it cut."""
    while text:
        fitting = [
            (len(piece), token)
            for token in allowed(constraint) - tokenizer.eos_ids
            if text.startswith(piece := tokenizer.decode([token])) and piece
        ]
        assert fitting, f"not allowed: {text!r}"
        length, token = max(fitting)
        constraint.take(token)
        text = text[length:]


def accepts(tokenizer: Tokenizer, form: Grammar, text: str) -> bool:
    constraint = form.constraint()
    try:
        write(tokenizer, constraint, text)
    except AssertionError:
        return False
    return END in allowed(constraint)


def refused(make: Callable[[], object], param: str = "response_format") -> str:
    with pytest.raises(RequestError) as caught:
        make()
    assert (caught.value.param, caught.value.code) == (param, INVALID_SCHEMA)
    assert len(caught.value.message) < 400
    return caught.value.message
