"""The verbs `eval` and `report`: quality as a table and a document, and everything as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HalfweaveError, UsageError
from . import tables
from .console import Console, Progress, duration, plain, size
from .flags import Asking, Loading, Measuring, Protocol
from .keeping import check_out, has_tasks, keep
from .loading import load, read_source

if TYPE_CHECKING:
    from ..evaluation.tasks import Figures, Tasks
    from ..runtime.eval import EvalResult
    from ..runtime.model import Model


@dataclass(frozen=True)
class _Measured:
    """What one run of `eval` found. The figures of tasks are empty where none were asked."""

    model: Model
    against: Model | None
    origin: str
    result: EvalResult
    tasks: Figures
    against_tasks: Figures


def measure_quality(
    path: str,
    measuring: Measuring,
    asking: Asking,
    protocol: Protocol,
    loading: Loading,
    console: Console,
) -> None:
    """Measure, print a row a model, and keep the document."""
    text, origin = read_source(measuring.text)
    tasks = _tasks(asking)
    model = load(path, loading)
    against = None if measuring.against is None else load(measuring.against, loading)
    if protocol.dry_run:
        _tell_plan(model, against, text, asking, protocol, console)
        return
    check_out(protocol.out)
    with console.progress("window") as bar:
        result = _perplexity(model, against, text, protocol, bar)
    other = None if against is None else against.name
    console.table(tables.EVAL_HEADER, tables.evaluation(model.name, other, result))
    found = _Measured(model, against, origin, result, {}, {})

    def kept(found: _Measured, notes: Sequence[str] = ()) -> dict[str, Any]:
        document = _document(found, measuring, asking, protocol, loading, notes)
        keep(console, document, path, protocol.save, protocol.out)
        return document

    if tasks is not None:
        try:
            with console.progress("question") as bar:
                found = _asked(found, tasks, bar)
        except (HalfweaveError, KeyboardInterrupt) as error:  # which may come after hours
            if not has_tasks(path, protocol.out):
                kept(found, [f"the tasks were not finished: {str(error) or 'interrupted'}"])
            raise
    if found.tasks:
        rows = tables.tasks(model.name, other, found.tasks, found.against_tasks)
        console.table(tables.TASKS_HEADER, rows)
    console.say(f"text: {origin}, SHA-256 {result.text_sha256[:16]}, windows of {result.window}")
    console.document({"verb": "eval", **kept(found)})


def _tasks(asking: Asking) -> Tasks | None:
    """Look the tasks up before a model is loaded for them."""
    if asking.tasks is None:
        if asking != Asking():
            raise UsageError("--limit, --num-fewshot, --include-path and --chat go with --tasks")
        return None
    from ..evaluation.tasks import TaskPlan, Tasks

    names = tuple(name.strip() for name in asking.tasks.split(","))
    return Tasks(TaskPlan(**{**vars(asking), "tasks": names}))


def _perplexity(
    model: Model, against: Model | None, text: str, protocol: Protocol, bar: Progress | None
) -> EvalResult:
    from ..runtime.eval import evaluate

    return evaluate(
        model,
        text,
        window=protocol.window,
        max_windows=protocol.max_windows,
        against=against,
        progress=None if bar is None else bar.step,
    )


def _asked(found: _Measured, tasks: Tasks, bar: Progress) -> _Measured:
    """The same with the tasks' figures, the dense model's too."""
    figures = [
        {} if model is None else tasks.measure(model, _labelled(bar, model.name))
        for model in (found.against, found.model)
    ]
    return _Measured(found.model, found.against, found.origin, found.result, figures[1], figures[0])


def _labelled(bar: Progress, name: str) -> Any:
    return lambda done, total, kind: bar.step(done, total, f"{name}: {kind}")


def _tell_plan(
    model: Model,
    against: Model | None,
    text: str,
    asking: Asking,
    protocol: Protocol,
    console: Console,
) -> None:
    """How long all windows will take, from one, and what that one took of memory."""
    from ..runtime.eval import count_windows
    from ..runtime.hardware import peak_memory_bytes

    windows = count_windows(model, text, protocol.window, protocol.max_windows)
    only = Protocol(window=protocol.window, max_windows=1)
    _perplexity(model, against, text, only, None)  # the first of all warms up
    seconds = _perplexity(model, against, text, only, None).seconds * windows
    models = 1 if against is None else 2
    plan = {
        "windows": windows,
        "window": protocol.window,
        "tokens": windows * (protocol.window - 1),
        "models": models,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "tasks": [] if asking.tasks is None else asking.tasks.split(","),
    }
    console.say(f"plan: {windows} windows of {protocol.window} tokens, {models} models at a time")
    console.say(
        f"  about {duration(seconds)} and {size(peak_memory_bytes())} of memory here, "
        "judged by one window"
    )
    if asking.tasks is not None:
        console.say(f"  tasks: {asking.tasks}; how long they take is known when they run")
    console.document({"verb": "eval", "dry_run": True, "plan": plan})


@dataclass(frozen=True)
class _Plan:
    """What was asked for."""

    text: str
    window: int
    max_windows: int | None
    tasks: Asking
    loading: Loading


def _document(
    found: _Measured,
    measuring: Measuring,
    asking: Asking,
    protocol: Protocol,
    loading: Loading,
    notes: Sequence[str],
) -> dict[str, Any]:
    from ..bench.document import document
    from ..runtime.hardware import this_machine
    from .bench_words import command_line

    told = document(
        "eval",
        this_machine(),
        model=_about(found.model),
        plan=_Plan(measuring.text, protocol.window, protocol.max_windows, asking, loading),
        body={
            "text": found.origin,
            "result": found.result,
            "against": None if found.against is None else _about(found.against),
            "tasks": found.tasks,
            "against_tasks": found.against_tasks,
        },
        notes=[*_notes(found), *notes],
        command=command_line(),
    )
    return {name: plain(value) for name, value in told.items()}


def _about(model: Model) -> dict[str, Any]:
    """The model and its size, which a report needs of a parent that may be gone by then."""
    from ..bench.document import about_model

    checkpoint = model.checkpoint
    return {**about_model(checkpoint.path), "weight_bytes": checkpoint.weight_bytes}


def _notes(found: _Measured) -> list[str]:
    """What a reader of the figures has to know."""
    from ..runtime.eval import flattered

    notes = []
    if note := flattered(found.model, found.result):
        notes.append(note)
    if not found.model.exact:
        notes.append("dtype auto rounds what is multiplied; --dtype float32 does not")
    return notes


def draw_report(path: str, others: Sequence[str], dry_run: bool, console: Console) -> None:
    """Draw the page, or say what would be on it."""
    from ..report.card import update_card
    from ..report.gather import command, gather_all
    from ..report.page import write_report

    if dry_run:
        main, *_rest = gather_all([path, *others])
        for kind in main.documents:
            console.say(f"{kind}: would be drawn")
        for kind, why in main.missing.items():
            console.say(f"{kind}: {why}; {command(kind, main)}")
        missing = {kind: {"why": why} for kind, why in main.missing.items()}
        plan = {"found": list(main.documents), "missing": missing}
        console.document({"verb": "report", "dry_run": True, "plan": plan})
        return
    with console.progress("chart") as bar:
        result = write_report(path, others, progress=bar.step)
    try:
        update_card(path)
    except OSError as error:
        console.tell(f"the model card is as it was: {error.filename}: {error.strerror}")
    for title in result.drawn:
        console.say(f"drawn: {title}")
    for title, why, told in result.absent:
        console.say(f"{title}: {why}")
        console.say(f"  to measure it: {told}")
    console.say(f"{result.page} is complete, {len(result.pictures)} PNGs beside it in report/")
    console.say(f"next: open {Path(result.page).resolve().as_uri()} in a browser")
    console.document({"verb": "report", "result": result})
