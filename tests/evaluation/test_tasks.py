"""Tasks are found by name, asked as far as the plan says, and fail with the way on."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from halfweave.errors import HalfweaveError, RefusedError, UsageError
from halfweave.evaluation.tasks import TaskPlan, Tasks
from halfweave.runtime.model import Model, load_model
from support.command import Command, assert_error
from support.harness import MISSING, REASON, ROWS, write_tasks

pytestmark = pytest.mark.skipif(bool(MISSING), reason=REASON)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_tasks(tmp_path_factory.mktemp("riddles"), tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return load_model(tiny_model, "float32")


def test_figures_have_a_value_an_error_and_a_number(folder: Path, model: Model) -> None:
    plan = TaskPlan(("riddles_choice", "riddles_writing"), include_path=folder)
    found = Tasks(plan).measure(model)
    assert found["riddles_choice"]["n"] == len(ROWS) + 1
    accuracy = found["riddles_choice"]["acc"]
    assert accuracy["value"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert accuracy["stderr"] is not None
    assert set(found) == {"riddles_choice", "riddles_writing"}


def test_a_limit_takes_the_first_documents(folder: Path, model: Model) -> None:
    seen: list[tuple[int, int, str]] = []
    plan = TaskPlan(("riddles_cloze",), limit=2, include_path=folder)
    found = Tasks(plan).measure(model, lambda *step: seen.append(step))
    assert found["riddles_cloze"]["n"] == 2
    assert seen == [(1, 2, "loglikelihood"), (2, 2, "loglikelihood")]


def test_examples_are_put_before_the_question(
    folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfweave.evaluation.lm import HalfweaveLM

    asked: list[str] = []
    real = HalfweaveLM.loglikelihood

    def watched(self: Any, requests: Any, **more: Any) -> Any:
        asked.extend(request.args[0] for request in requests)
        return real(self, requests, **more)

    monkeypatch.setattr(HalfweaveLM, "loglikelihood", watched)
    for number in (0, 2):
        plan = TaskPlan(("riddles_cloze",), limit=1, num_fewshot=number, include_path=folder)
        Tasks(plan).measure(model)
    assert asked[0] == ROWS[0]["begin"]
    assert asked[1].endswith(ROWS[0]["begin"])
    begins = [*(row["begin"] for row in ROWS), " foxes"]  # the last row's is the model's own
    assert sum(asked[1].count(begin) for begin in begins) == 3


def test_a_chat_is_put_into_the_template(
    folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfweave.evaluation.lm import HalfweaveLM

    seen: list[str] = []
    real = HalfweaveLM.loglikelihood

    def watched(self: Any, requests: Any, **more: Any) -> Any:
        seen.extend(request.args[0] for request in requests)
        return real(self, requests, **more)

    monkeypatch.setattr(HalfweaveLM, "loglikelihood", watched)
    plan = TaskPlan(("riddles_cloze",), limit=1, num_fewshot=1, include_path=folder, chat=True)
    Tasks(plan).measure(model)
    (text,) = seen
    assert text.count("<|im_start|>user\n") == 2
    assert text.endswith("<|im_start|>assistant\n")


def test_an_unknown_task_is_named_with_those_that_are_like_it(folder: Path) -> None:
    with pytest.raises(UsageError, match="no task 'hellaswagg'") as caught:
        Tasks(TaskPlan(("riddles_choice", "hellaswagg"), include_path=folder))
    assert "hellaswag" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": ()}, "no task is named"),
        ({"tasks": ("a", "")}, "no task is named"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"num_fewshot": -1}, "num_fewshot must be at least 0"),
        ({"include_path": Path("/nowhere")}, "no directory of tasks"),
    ],
)
def test_a_plan_is_checked_when_it_is_made(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TaskPlan(**{"tasks": ("a",), **wrong})


def test_without_the_harness_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, halfweave: Command, tiny_model: Path
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "lm_eval":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RefusedError, match="not installed"):
        Tasks(TaskPlan(("a",)))
    ran = halfweave("eval", tiny_model, "--tasks", "a", "--no-save")
    assert_error(ran, 3, "the evaluation harness, which is not installed", r"halfweave[eval]")


def test_a_data_set_that_cannot_be_had_is_named_with_the_way_on(
    folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline for the library too, which would otherwise try for half a minute."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = folder / "remote.yaml"
    file.write_text('{"task": "riddles_remote", "dataset_path": "nobody/nothing-of-the-kind"}')
    tasks = Tasks(TaskPlan(("riddles_remote",), include_path=folder))
    with pytest.raises(HalfweaveError, match="riddles_remote: a data set could not be had") as told:
        tasks.measure(model)
    assert told.value.exit_code == 1
    assert "--include-path DIR" in str(told.value.hint)


def test_a_task_that_fails_is_one_error(folder: Path, model: Model) -> None:
    text = (folder / "choice.yaml").read_text().replace("riddles_choice", "riddles_broken")
    (folder / "broken.yaml").write_text(text.replace("{{begin}}", "{{1 / 0}}"))
    tasks = Tasks(TaskPlan(("riddles_broken",), include_path=folder))
    with pytest.raises(HalfweaveError, match="riddles_broken: the task failed: ") as told:
        tasks.measure(model)
    assert "--debug" in str(told.value.hint)
