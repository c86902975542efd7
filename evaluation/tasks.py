"""Tasks of the evaluation harness (lm_eval, extra `[eval]`), by the names that it gives them.

Its tasks read data sets, most of them from a hub; those of a directory of one's own may read local
files. A task's file may name code beside it, which the harness runs: give it files that you trust.
"""

from __future__ import annotations

import difflib
import io
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HalfweaveError, RefusedError, UsageError
from ..runtime.model import Model

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# {metric: {"value", "stderr"}, ..., "n": documents}, by task.
Figures = dict[str, dict[str, Any]]
TaskProgress = Callable[[int, int, str], None]
_SEED = 1234  # draws the examples; the harness's own
_BOOTSTRAPS = 1000  # for metrics whose standard error has no formula
_OFFLINE = (
    "put the data set into the cache of `datasets` where there is a network, or write a task that "
    "reads local files and name its directory: --include-path DIR"
)


@dataclass(frozen=True)
class TaskPlan:
    """Which tasks to ask, and how much of them.

    Attributes:
        tasks: names of tasks, groups or tags, one at least.
        limit: only the first so many documents of each; None for all.
        num_fewshot: solved examples before each question; None for what the task says.
        include_path: a directory with more tasks.
        chat: put questions and examples into the model's chat template, a message each.

    Raises:
        UsageError: a number is out of range, there is no name, or no such directory.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: Path | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks):
            raise UsageError("no task is named", "--tasks NAME,NAME")
        if self.limit is not None and self.limit < 1:
            raise UsageError("limit must be at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError("num_fewshot must be at least 0")
        if self.include_path is not None and not self.include_path.is_dir():
            raise UsageError(f"{self.include_path} is no directory of tasks")


class Tasks:
    """The tasks of a plan, found in the harness's index. Nothing is read of their data yet."""

    def __init__(self, plan: TaskPlan) -> None:
        """Look the tasks up; seconds, where the harness's own are searched.

        Raises:
            RefusedError: the harness is not installed.
            UsageError: there is no such task.
        """
        _need_harness()
        self._plan = plan
        self._manager = _manager(plan)

    def measure(self, model: Model, progress: TaskProgress | None = None) -> Figures:
        """Ask `model` through its engine.

        Raises:
            HalfweaveError: a data set cannot be had, or a task fails.
            UsageError: a task asks for what this runtime does not do.
        """
        from lm_eval.evaluator import evaluate

        from .lm import HalfweaveLM

        with HalfweaveLM(model, progress=progress) as lm, _quiet(), _told_plainly(self._plan):
            found = evaluate(
                lm,
                self._loaded(),
                limit=self._plan.limit,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=False,
                apply_chat_template=self._plan.chat,
                fewshot_as_multiturn=self._plan.chat,
            )
        counts = found["n-samples"]
        return {
            name: {**_metrics(values), "n": _count(name, counts, values)}
            for name, values in found["results"].items()
        }

    def _loaded(self) -> Any:
        """The tasks with their data, and as many examples as the plan says."""
        loaded = self._manager.load(list(self._plan.tasks))
        for task in loaded["tasks"].values():
            told = task.get_config("num_fewshot")
            # A task that says 0 means it: its questions hold examples of their own.
            if told is None or (self._plan.num_fewshot is not None and told != 0):
                task.set_config(key="num_fewshot", value=self._plan.num_fewshot or 0)
            task.set_fewshot_seed(seed=_SEED)
        return loaded


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """The harness writes "acc,none" and "acc_stderr,none"; other filters than none are named."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or _number(value) is None:
            continue
        error = _number(values.get(f"{metric}_stderr,{kind}"))
        name = metric if kind == "none" else f"{metric} ({kind})"
        found[name] = {"value": _number(value), "stderr": error}
    return found


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _count(name: str, counts: Mapping[str, Any], values: Mapping[str, Any]) -> int | None:
    """Documents that were asked; a group's are counted by the harness with its figures."""
    if name in counts:
        return int(counts[name]["effective"])
    length = values.get("sample_len")
    return int(length) if isinstance(length, int) else None


def _need_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise RefusedError(
            "tasks need the evaluation harness, which is not installed",
            "pip install 'halfweave[eval]'",
        ) from error


def _manager(plan: TaskPlan) -> TaskManager:
    """The index of a directory alone, where that has all the tasks: the harness's takes seconds."""
    from lm_eval.tasks import TaskManager

    folder = None if plan.include_path is None else str(plan.include_path)
    managers = [TaskManager(include_path=folder, include_defaults=False)] if folder else []
    for manager in managers:
        if not _unknown(manager, plan):
            return manager
    whole = TaskManager(include_path=folder)
    if unknown := _unknown(whole, plan):
        near = difflib.get_close_matches(unknown[0], whole.all_tasks, n=3)
        raise UsageError(
            f"there is no task {unknown[0][:60]!r}",
            f"did you mean {', '.join(near)}?" if near else "lm-eval ls tasks lists them",
        )
    return whole


def _unknown(manager: TaskManager, plan: TaskPlan) -> list[str]:
    return [name for name in plan.tasks if not manager.match_tasks([name])]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from talking on stdout, and from forking beside our threads."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels, forks = [logger.level for logger in loggers], os.environ.get("DISABLE_MULTIPROC")
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if forks is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = forks


@contextmanager
def _told_plainly(plan: TaskPlan) -> Iterator[None]:
    """Turn what the harness and the libraries below it raise into one error of ours."""
    try:
        yield
    except HalfweaveError:
        raise
    except Exception as error:  # tasks, data sets and their hubs raise whatever they like
        names, told = ", ".join(plan.tasks)[:80], _first_line(error)
        if _is_network(error):
            message = f"{names}: a data set could not be had: {told}"
            raise HalfweaveError(message, _OFFLINE) from error
        raise HalfweaveError(
            f"{names}: the task failed: {told}", "check the task's file, or run with --debug"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _is_network(error: BaseException | None) -> bool:
    """Whether a data set's way was cut: by the error, or by one that it came from."""
    seen: set[int] = set()
    words = ("connect", "offline", "timeout", "timedout", "datasetnotfound", "hfhub", "repository")
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        names = (kind.__name__.lower() for kind in type(error).__mro__)
        if any(word in name for name in names for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False
