"""What a run will do and cost, known before it starts: from headers alone, not from weights."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from ..errors import CapacityError, UsageError
from ..kernels.formats import Dense, expected_tensors, needs_group
from .methods.base import Target
from .pack import stored_format, why_not
from .recipe import CHOICES, Pattern, Recipe
from .source import Source

_INTERPRETER_BYTES = 700 * 2**20  # torch and transformers, imported
_SWEEP_SECONDS_PER_WEIGHT = 2.2e-7  # column sweep, measured on two cores; scales with N * K


@dataclass(frozen=True)
class PlannedLinear:
    """One linear: its shape, the format it will have, and how to get there or why it stays dense.

    Exactly one of `target` and `reason` is None.
    """

    name: str
    shape: tuple[int, int]
    format: str
    group: int | None
    target: Target | None
    reason: str | None = None


@dataclass(frozen=True)
class Plan:
    """The whole run. Sizes in bytes, time in seconds; the time is an estimate for this machine."""

    linears: tuple[PlannedLinear, ...]
    blocks: int
    calibration_tokens: int
    input_bytes: int
    output_bytes: int
    peak_memory_bytes: int
    seconds: float

    @property
    def kept_dense(self) -> tuple[PlannedLinear, ...]:
        """Linears that cannot take the pattern."""
        return tuple(linear for linear in self.linears if linear.reason is not None)


def target_of(recipe: Recipe, linear: str) -> Target | None:
    """What a method has to make of a linear; None where the recipe's choices leave it dense."""
    pattern, bits = Pattern.parse(recipe.pattern), recipe.bits
    if recipe.choices:
        choice = recipe.choices.get(linear, Dense.kind)
        if choice == Dense.kind:
            return None
        pattern, bits = Pattern.parse(CHOICES[choice][0]), CHOICES[choice][1]
    return Target(pattern, bits, recipe.group, recipe.damping, recipe.mix)


def make_plan(source: Source, recipe: Recipe) -> Plan:
    """Plan a run.

    Raises:
        UsageError: `recipe.strict`, and some linear cannot take the pattern.
    """
    linears = tuple(
        _plan_linear(name, source.linear_shape(name), target_of(recipe, name))
        for index in range(source.block_count)
        for name in source.linear_names(index)
    )
    unfit = [linear for linear in linears if linear.reason and not recipe.choices]
    if recipe.strict and unfit:
        raise UsageError(
            f"{unfit[0].name}: {unfit[0].reason}, and --strict was asked for",
            "drop --strict to keep such layers dense",
        )
    tokens = recipe.calib_windows * recipe.calib_length
    return Plan(
        linears=linears,
        blocks=source.block_count,
        calibration_tokens=tokens,
        input_bytes=sum(_stored_bytes(source, name) for name in source.tensors.names()),
        output_bytes=_output_bytes(source, linears),
        peak_memory_bytes=_peak_memory(source, linears, tokens),
        seconds=_seconds(source, linears, tokens, recipe),
    )


def check_capacity(plan: Plan, out: Path) -> None:
    """Refuse a run that cannot fit in this machine's memory or on the disk of `out`.

    Raises:
        CapacityError: with both numbers.
    """
    available = available_memory_bytes()
    if available is not None and plan.peak_memory_bytes > available:
        raise CapacityError(
            f"the run needs about {plan.peak_memory_bytes / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are available",
            "use fewer or shorter calibration windows (--calib-windows, --calib-length)",
        )
    free = shutil.disk_usage(out).free
    if plan.output_bytes > free:
        raise CapacityError(
            f"the output needs {plan.output_bytes} bytes, {free} are free on the disk of {out}"
        )


def available_memory_bytes() -> int | None:
    """Memory that can be used without swapping, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _plan_linear(name: str, shape: tuple[int, int], target: Target | None) -> PlannedLinear:
    reason = "chosen to stay dense" if target is None else why_not(shape, target)
    if target is None or reason is not None:
        return PlannedLinear(name, shape, Dense.kind, None, None, reason)
    kind = stored_format(target)
    return PlannedLinear(name, shape, kind, target.group if needs_group(kind) else None, target)


def _stored_bytes(source: Source, name: str) -> int:
    return prod(source.tensors.shape(name)) * source.tensors.dtype(name).itemsize


def _output_bytes(source: Source, linears: tuple[PlannedLinear, ...]) -> int:
    total = sum(_stored_bytes(source, name) for name in source.tensors.names())
    for linear in linears:
        weight = f"{linear.name}.weight"
        size = source.tensors.dtype(weight).itemsize
        total -= _stored_bytes(source, weight)
        for suffix, shape in expected_tensors(linear.format, linear.shape, linear.group).items():
            wide = suffix == "weight" or (suffix == "values" and linear.format == "sparse24")
            total += prod(shape) * (size if wide else 2 if suffix == "scale" else 1)
    return total


def _peak_memory(source: Source, linears: tuple[PlannedLinear, ...], tokens: int) -> int:
    """One block, its activations and Hessians, and the widest matrix's working copies."""
    count = len(source.family.linears)
    block = sum(prod(linear.shape) for linear in linears[:count])
    widest = max(linear.shape[1] for linear in linears)
    largest = max(prod(linear.shape) for linear in linears)
    columns = {stage[0]: stage for stage in source.family.stages}
    hessians = sum(
        linear.shape[1] ** 2
        for linear in linears[:count]
        if any(linear.name.endswith("." + first) for first in columns)
    )
    hidden = source.linear_shape(linears[0].name)[1]
    embedding = prod(source.tensors.shape(f"{source.family.embedding}.weight"))
    elements = 2 * block + hessians + 4 * widest**2 + 6 * largest + 2 * tokens * hidden
    return _INTERPRETER_BYTES + 4 * max(elements, 2 * embedding + tokens * hidden)


def _seconds(
    source: Source, linears: tuple[PlannedLinear, ...], tokens: int, recipe: Recipe
) -> float:
    """Two forward passes, one Hessian per stage, and for SparseGPT the factor and the sweep."""
    firsts = tuple("." + stage[0] for stage in source.family.stages)
    flops = sweep = 0.0
    for linear in linears:
        rows, columns = linear.shape
        flops += 2 * 2 * tokens * rows * columns
        if linear.name.endswith(firsts):
            flops += 2 * tokens * columns**2
        if recipe.method == "sparsegpt":
            flops += 2 * columns**3
            sweep += rows * columns
    return flops / _flops_per_second() + sweep * _SWEEP_SECONDS_PER_WEIGHT


def _flops_per_second() -> float:
    """What this machine's matrix product does right now, from a few hundredths of a second."""
    side = 512
    a = torch.ones(side, side)
    a @ a
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < 0.03:
        a @ a
        rounds += 1
    return rounds * 2 * side**3 / (time.perf_counter() - start)
