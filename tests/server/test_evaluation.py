"""The evaluation harness reads a served model as it reads the same weights in its own process.

`lm_eval --model local-completions` asks the server what its users ask; `--model hf` is the oracle.
The tasks are made here, as the files that the harness loads: nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from halfweave.runtime.model import load_model
from support.http_server import Live, live_server
from support.tiny import dense_model

MISSING = [name for name in ("lm_eval", "aiohttp", "tenacity") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{MISSING} are not installed: pip install 'lm_eval[api]'"
)
CONTEXT = 128  # of the harness; shorter than the model's, so that long texts have to be cut
LIKELIHOODS = ("choice", "cloze", "rolling")
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{begin}}",
        "doc_to_choice": "ends",
        "doc_to_target": "right",
    },
    "cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{begin}}",
        "doc_to_target": "{{ends[right]}}",
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{begin}}",
        "doc_to_target": "{{ends[right]}}",
        "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 24, "do_sample": False},
    },
}
ROWS: list[dict[str, Any]] = [
    {
        "begin": "The quick brown fox jumps over the",
        "ends": [" lazy dog", " moon", " quick fox. "],
        "right": 0,
        "text": "Two weights of every four are kept, and the rest are zero. " * 8,
    },
    {
        "begin": "Two weights of every four are",
        "ends": [" kept", " zero", " \U0001f98a", "\n"],
        "right": 0,
        "text": "A small model speaks in riddles; nobody minds.",
    },
    {
        "begin": "A small model speaks in riddles;\n\n",
        "ends": ["nobody minds.", "a"],
        "right": 1,
        "text": "\u00fcn\u00efc\u00f6de \U0001f98a and <|im_end|> in the middle",
    },
]


@dataclass(frozen=True)
class Evaluated:
    """What the harness measured: for every task each request's result, and the figures."""

    results: dict[str, list[Any]]
    figures: dict[str, dict[str, float]]

    @property
    def likelihoods(self) -> list[float]:
        """All of them in order, of whichever task."""
        pairs = [pair for name in LIKELIHOODS for pair in self.results[name]]
        return [pair[0] if isinstance(pair, tuple) else pair for pair in pairs]

    @property
    def greedy(self) -> list[bool]:
        """Whether each continuation is what the model itself would have written."""
        return [pair[1] for name in ("choice", "cloze") for pair in self.results[name]]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Any:
    """Evaluates one of the harness's models, given by the words that its user types."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    directory = tmp_path_factory.mktemp("riddles")
    rows = [*ROWS, likely_row(tiny_model)]
    data = directory / "riddles.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        document = {
            "task": f"riddles_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(directory / "cache"),
            },
            "test_split": "test",
            **task,
        }
        (directory / f"{name}.yaml").write_text(json.dumps(document))  # JSON is YAML
    manager = TaskManager(include_path=str(directory), include_defaults=False)

    def evaluate(model: str, arguments: str, tasks: tuple[str, ...], **more: Any) -> Evaluated:
        found = lm_eval.simple_evaluate(
            model,
            model_args=arguments,
            tasks=[f"riddles_{name}" for name in tasks],
            task_manager=manager,
            bootstrap_iters=0,
            **more,
        )
        results, figures = {}, {}
        for name in tasks:
            samples = found["samples"][f"riddles_{name}"]
            results[name] = [r for sample in samples for (r,) in sample["resps"]]
            figures[name] = found["results"][f"riddles_{name}"]
        return Evaluated(results, figures)

    return evaluate


def likely_row(directory: Path) -> dict[str, Any]:
    """A row whose right end the model itself would write, else no continuation is greedy."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(directory), dense_model(directory)
    for number in range(200):
        begin = f"The {number} foxes"
        ids = tokenizer(begin).input_ids
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        end = tokenizer.decode([token])
        if end.strip() and tokenizer(begin + end).input_ids == [*ids, token]:
            return {"begin": begin, "ends": [end, "x"], "right": 0, "text": begin + end}
    raise AssertionError("no token of this model can be written by itself")


def through(live: Live, tokenizer: Path, arguments: str = "", path: str = "completions") -> str:
    """The words that make the harness ask a server."""
    return (
        f"model={live.model},base_url={live.url}/v1/{path},tokenizer={tokenizer},"
        f"max_length={CONTEXT},{arguments}"
    ).rstrip(",")


def oracle(directory: Path) -> str:
    """The words that make it load a directory; a server's context also holds the next token."""
    return f"pretrained={directory},dtype=float32,device=cpu,max_length={CONTEXT - 2}"


@pytest.fixture(scope="module")
def wanted(harness: Any, tiny_model: Path) -> Evaluated:
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
    harness: Any,
    exact: Live,
    wanted: Evaluated,
    tiny_model: Path,
    arguments: str,
    more: dict[str, Any],
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
    harness: Any, exact: Live, tiny_model: Path
) -> None:
    """The server's chat template, and so its prompt, is the tokenizer's own."""
    asked = through(exact, tiny_model, path="chat/completions")
    found = harness("local-chat-completions", asked, ("writing",), apply_chat_template=True)
    wanted = harness("hf", oracle(tiny_model), ("writing",), apply_chat_template=True)
    assert found.results["writing"] == wanted.results["writing"]


def test_the_fast_path_differs_by_little(harness: Any, packed_model: Path) -> None:
    """2:4 with int4, in the arithmetic that is used unless another is asked for."""
    wanted = harness("hf", oracle(packed_model.with_name("packed-dense")), LIKELIHOODS)
    with live_server(load_model(packed_model)) as live:
        found = harness("local-completions", through(live, packed_model), LIKELIHOODS)
    differences = [abs(a - b) for a, b in zip(found.likelihoods, wanted.likelihoods, strict=True)]
    shares = [d / abs(w) for d, w in zip(differences, wanted.likelihoods, strict=True)]
    most, share = max(differences), max(shares)
    print(f"\nthe fast path differs by up to {most:.3f} nats, {100 * share:.2f} % of a result")
    assert share < 0.02
