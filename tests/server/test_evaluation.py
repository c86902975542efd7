"""The evaluation harness reads a served model as it reads the same weights in its own process.

`lm_eval --model local-completions` asks the server what its users ask; `--model hf` is the oracle.
The tasks are made here, as the files that the harness loads: nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from halfweave.runtime.model import load_model
from support.harness import (
    CONTEXT,
    LIKELIHOODS,
    MISSING,
    REASON,
    TASKS,
    Evaluated,
    Harness,
    harness_of,
    oracle,
    write_tasks,
)
from support.http_server import Live, live_server

pytestmark = pytest.mark.skipif(bool(MISSING), reason=REASON)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Harness:
    return harness_of(write_tasks(tmp_path_factory.mktemp("riddles"), tiny_model))


def through(live: Live, tokenizer: Path, arguments: str = "", path: str = "completions") -> str:
    """The words that make the harness ask a server."""
    return (
        f"model={live.model},base_url={live.url}/v1/{path},tokenizer={tokenizer},"
        f"max_length={CONTEXT},{arguments}"
    ).rstrip(",")


@pytest.fixture(scope="module")
def wanted(harness: Harness, tiny_model: Path) -> Evaluated:
    return harness("hf", oracle(tiny_model), tuple(TASKS))


@pytest.fixture(scope="module")
def exact(tiny_model: Path) -> Iterator[Live]:
    """The model on the path that has 32 bits everywhere."""
    with live_server(load_model(tiny_model, dtype="float32")) as running:
        yield running


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        ("tokenized_requests=True", {}),
        ("tokenized_requests=False", {}),
        ("tokenized_requests=False", {"batch_size": 4}),
        ("num_concurrent=3,tokenizer_backend=huggingface", {}),
    ],
    ids=["token ids", "texts", "texts in batches", "token ids at once"],
)
def test_a_served_model_is_evaluated_as_in_the_harness_itself(
    harness: Harness,
    exact: Live,
    wanted: Evaluated,
    tiny_model: Path,
    arguments: str,
    more: dict[str, int],
) -> None:
    found = harness(
        "local-completions", through(exact, tiny_model, arguments), tuple(TASKS), **more
    )
    assert found.likelihoods == pytest.approx(wanted.likelihoods, abs=1e-3)
    assert found.greedy == wanted.greedy
    assert set(wanted.greedy) == {True, False}
    assert found.results["writing"] == wanted.results["writing"]
    for name, figures in wanted.figures.items():
        numbers = {key: number for key, number in figures.items() if isinstance(number, float)}
        assert numbers
        served = {key: found.figures[name][key] for key in numbers}
        assert served == pytest.approx(numbers, rel=1e-3)


def test_a_chat_is_evaluated_as_in_the_harness_itself(
    harness: Harness, exact: Live, tiny_model: Path
) -> None:
    """The server's chat template, and so its prompt, is the tokenizer's own."""
    asked = through(exact, tiny_model, path="chat/completions")
    found = harness("local-chat-completions", asked, ("writing",), apply_chat_template=True)
    wanted = harness("hf", oracle(tiny_model), ("writing",), apply_chat_template=True)
    assert found.results["writing"] == wanted.results["writing"]


def test_the_fast_path_differs_by_little(harness: Harness, packed_model: Path) -> None:
    """2:4 with int4, in the arithmetic that is used unless another is asked for."""
    wanted = harness("hf", oracle(packed_model.with_name("packed-dense")), LIKELIHOODS)
    with live_server(load_model(packed_model)) as live:
        found = harness("local-completions", through(live, packed_model), LIKELIHOODS)
    differences = [abs(a - b) for a, b in zip(found.likelihoods, wanted.likelihoods, strict=True)]
    shares = [d / abs(w) for d, w in zip(differences, wanted.likelihoods, strict=True)]
    most, share = max(differences), max(shares)
    print(f"\nthe fast path differs by up to {most:.3f} nats, {100 * share:.2f} % of a result")
    assert share < 0.02
