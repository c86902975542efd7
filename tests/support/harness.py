"""The evaluation harness on tasks that are made here: nothing is downloaded.

`--model hf` is the oracle: the same weights in the harness's own process.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from support.tiny import dense_model

MISSING = [name for name in ("lm_eval", "aiohttp", "tenacity") if find_spec(name) is None]
REASON = f"{MISSING} are not installed: pip install 'lm_eval[api]'"
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


def write_tasks(directory: Path, model: Path) -> Path:
    """Files of the tasks riddles_choice and so on; `model` says what is likely."""
    rows = [*ROWS, likely_row(model)]
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
    return directory


Harness = Callable[..., Evaluated]


def harness_of(directory: Path) -> Harness:
    """Evaluates one of the harness's models, by the words that its user types, on those tasks."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(directory), include_defaults=False)

    def evaluate(model: Any, arguments: Any, tasks: tuple[str, ...], **more: Any) -> Evaluated:
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


def oracle(directory: Path, context: int = CONTEXT - 2) -> str:
    """The words that make the harness load a directory itself."""
    return f"pretrained={directory},dtype=float32,device=cpu,max_length={context}"
