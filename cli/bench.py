"""The verb `bench`: kernels, a model, or an endpoint, measured, kept, and compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from . import bench_tables
from .bench_plan import gpu, kernel_plan, offline_plan, serve_plan, tell_plan
from .bench_words import Asked, command_line, named, understood
from .console import Console, Progress, plain
from .flags import Comparing, Keeping, Loading, Output, Speed, Traffic
from .keeping import check_out, keep
from .loading import load_settings, read_source, set_threads

if TYPE_CHECKING:
    from ..bench.kernel import KernelPlan, KernelResult
    from ..kernels.measured import Device
    from ..runtime.hardware import Hardware


def bench(
    words: Annotated[
        list[str] | None,
        Argument(metavar="[MODEL] [kernel|offline|serve]", help="Model directory, and what of it."),
    ] = None,
    *,
    speed: Speed,
    traffic: Traffic,
    keeping: Keeping,
    comparing: Comparing,
    loading: Loading,
    output: Output,
) -> None:
    """Measure speed beside quality and the dense model, in turns; or compare two measurements.

    offline, which is meant if nothing is said, measures models alone: prompts and tokens, one and
    several at once. kernel measures the products of a model, by what it is made of and dense, and
    keeps which is faster here for when it is loaded. serve measures what users of an endpoint wait
    for. The last line of stdout is one JSON document.
    """
    console = Console(output.json)
    if comparing.compare is not None:
        _compare(console, comparing)
        return
    asked = understood(words or (), speed, traffic, loading)
    if keeping.dry_run:
        tell_plan(console, asked)
        return
    check_out(keeping.out)
    found = _MEASURE[asked.mode](console, asked, keeping)
    told: dict[str, Any] = plain(found.document(asked.mode))
    for line in bench_tables.notes(told["notes"]):
        console.say(line)
    keep(console, told, None if asked.traffic.url else asked.model, keeping.save, keeping.out)
    console.last_line(told)


@dataclass(frozen=True)
class _Found:
    """What a mode measured: of which model, by which plan, and the figures of its kind."""

    machine: Hardware
    model: Mapping[str, Any]
    plan: Any
    body: Mapping[str, Any]
    notes: Sequence[str]

    def document(self, kind: str) -> dict[str, Any]:
        from ..bench.document import document

        return document(
            kind,
            self.machine,
            model=self.model,
            plan=self.plan,
            body=self.body,
            notes=self.notes,
            command=command_line(),
        )


@contextmanager
def _quiet(
    asked: Asked, keeping: Keeping, pin: bool = True
) -> Iterator[tuple[Hardware, list[str]]]:
    """A machine to measure on, and what to say of it; threads keep to cores if `pin`."""
    from ..bench.quiet import KEPT, check_quiet, others_at_work, pinned
    from ..kernels.cpu.cores import granted_cores
    from ..runtime.hardware import this_machine

    set_threads(asked.loading.threads)
    machine, shares = this_machine(), others_at_work()
    notes = check_quiet(machine, shares, keeping.even_if_busy)
    if not pin:
        yield machine, notes
        return
    with pinned(min(machine.threads, granted_cores()), shares) as cpus:
        where = f"CPUs {', '.join(map(str, cpus))}" if cpus else "no CPUs of their own"
        yield machine, [*notes, f"{KEPT} {where}"]


def _offline(console: Console, asked: Asked, keeping: Keeping) -> _Found:
    from ..bench.document import about_model
    from ..bench.offline import baseline_first, bench_offline

    model, speed = asked.needed_model, asked.speed
    plan = offline_plan(asked)
    text, origin = read_source(speed.text)
    about, paths = about_model(model), baseline_first(named(model, speed.against))
    with _quiet(asked, keeping) as (machine, notes), console.progress("step") as bar:
        result = bench_offline(
            paths,
            text,
            text_origin=origin,
            plan=plan,
            progress=bar.step,
            loading=load_settings(asked.loading),
        )
    console.table(*bench_tables.offline(result), words=(0,))
    for line in bench_tables.offline_lines(result):
        console.say(line)
    return _Found(machine, about, plan, result.body(), [*notes, *result.notes])


def _kernel(console: Console, asked: Asked, keeping: Keeping) -> _Found:
    from ..bench.document import about_model
    from ..bench.quiet import BUSY

    plan, about = kernel_plan(asked), about_model(asked.needed_model)
    with _quiet(asked, keeping) as (machine, notes), console.progress("product") as bar:
        busy = any(note.startswith(BUSY) for note in notes)
        result, device = _products(asked, plan, bar)
    console.table(bench_tables.KERNEL_HEADER, bench_tables.kernel(result), words=(0, -1))
    for line in bench_tables.kernel_lines(result, machine, plan.device):
        console.say(line)
    notes = [*notes, *result.notes, _keep_table(result, device, keeping, busy)]
    return _Found(machine, about, plan, result.body(), notes)


def _products(asked: Asked, plan: KernelPlan, bar: Progress) -> tuple[KernelResult, Device]:
    """The products of a model on its device, and what a table of them holds for."""
    if plan.device == "cpu":
        from ..bench.kernel import bench_kernel, needed_library
        from ..kernels.measured import cpu_device

        return bench_kernel(asked.needed_model, plan, bar.step), cpu_device(needed_library())
    where = gpu(asked)
    from ..bench.kernel_gpu import bench_gpu
    from ..kernels.cuda.choices import gpu_device

    return bench_gpu(asked.needed_model, where, plan, bar.step), gpu_device(where.number)


def _keep_table(result: KernelResult, device: Device, keeping: Keeping, busy: bool) -> str:
    """Give dispatch what was measured, unless it cannot be trusted or is not to be kept."""
    from ..kernels.measured import VARIABLE, write_table

    if not keeping.save or busy:
        why = "the machine was busy" if busy else "nothing is to be saved"
        return f"dispatch goes on as before: {why}"
    try:
        path = write_table(device, result.table())
    except OSError as error:
        return f"dispatch goes on as before: its table cannot be written, {error.strerror}"
    return f"dispatch keeps to this from now on, by {path}; {VARIABLE}=off ignores it"


def _serve(console: Console, asked: Asked, keeping: Keeping) -> _Found:
    from .bench_serve import measure_endpoints

    plan = serve_plan(asked)
    with _quiet(asked, keeping, pin=False) as (machine, notes):
        model, body, told = measure_endpoints(console, asked, plan, machine)
    return _Found(machine, model, plan, body, [*notes, *told])


_MEASURE = {"kernel": _kernel, "offline": _offline, "serve": _serve}


def _compare(console: Console, comparing: Comparing) -> None:
    from ..bench.compare import compare
    from ..bench.document import read_document

    assert comparing.compare is not None
    first, second = (read_document(path) for path in comparing.compare)
    found = compare(first, second, comparing.floor, comparing.even_if_different)
    console.table(bench_tables.COMPARE_HEADER, bench_tables.comparison(found))
    for line in bench_tables.comparison_lines(found):
        console.say(line)
    console.last_line({"verb": "bench", **found.to_json()})
