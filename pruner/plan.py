"""What a run will do and cost, known before it starts: from headers alone, not from weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..errors import CapacityError, CheckpointError, UnsupportedModel, UsageError
from ..kernels.device import available_memory_bytes, parse_device
from ..kernels.formats import Dense, expected_tensors, needs_group
from ..runtime.families import decoder_spec
from .budget.head import check_head
from .cost import estimate_memory, estimate_scratch, estimate_seconds
from .disk import check_disk
from .methods.base import Target
from .pack import stored_format, why_not
from .recipe import CHOICES, Pattern, Recipe
from .source import Source


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
    output_bytes: int  # at most, where a budget has yet to choose formats
    scratch_bytes: int  # on the same disk, while the run lasts
    peak_memory_bytes: int  # of `device`
    seconds: float
    device: str
    unserved: str | None = None  # why the result cannot be evaluated or served here

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
        UnsupportedModel: the recipe has a budget, and the model's scores cannot be computed here.
        UsageError: the windows are longer than the model's context; a choice is of a linear that
            the model does not have; or `recipe.strict`, and some linear cannot take the pattern.
    """
    _check_length(source, recipe)
    if recipe.has_budget:
        check_head(source.family)
    linears = tuple(
        _plan_linear(name, source.linear_shape(name), target_of(recipe, name))
        for index in range(source.block_count)
        for name in source.linear_names(index)
    )
    _check_names(linears, recipe)
    unfit = [linear for linear in linears if linear.reason and not recipe.choices]
    if recipe.strict and unfit:
        raise UsageError(
            f"{unfit[0].name}: {unfit[0].reason}, and --strict was asked for",
            "drop --strict to keep such layers dense",
        )
    tokens = recipe.calib_windows * recipe.calib_length
    before = sum(_stored_bytes(source, name) for name in source.tensors.names())
    output = _output_bytes(source, linears)
    if recipe.has_budget:
        output = int(before * (recipe.target_bytes or 1))
    return Plan(
        linears=linears,
        blocks=source.block_count,
        calibration_tokens=tokens,
        input_bytes=before,
        output_bytes=output,
        scratch_bytes=estimate_scratch(source, linears, recipe, output),
        peak_memory_bytes=estimate_memory(source, linears, recipe),
        seconds=estimate_seconds(source, linears, recipe),
        device=str(source.device),
        unserved=_unserved(source),
    )


def check_capacity(plan: Plan, out: Path, held: int) -> None:
    """Refuse a run that cannot fit in this machine's memory or on the disk of `out`.

    `held` are the bytes of its own that `out` holds already, to go on with or to be removed.

    Raises:
        CapacityError: with both numbers.
    """
    available = available_memory_bytes(parse_device(plan.device))
    if available is not None and plan.peak_memory_bytes > available:
        raise CapacityError(
            f"the run needs about {plan.peak_memory_bytes / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are available",
            "use fewer or shorter calibration windows (--calib-windows, --calib-length), no "
            "--recover distill, and for matrices as wide as this machine --method sparsegpt",
        )
    check_disk(plan.output_bytes + plan.scratch_bytes, out, held)


def _unserved(source: Source) -> str | None:
    try:
        decoder_spec(source.config)
    except (UnsupportedModel, CheckpointError) as error:
        return error.message
    return None


def _check_length(source: Source, recipe: Recipe) -> None:
    context = source.family.context
    if context is not None and recipe.calib_length > context:
        raise UsageError(
            f"calib_length {recipe.calib_length} is more than the {context} positions that the "
            "model has learned",
            f"--calib-length {context} at most",
        )


def _check_names(linears: Sequence[PlannedLinear], recipe: Recipe) -> None:
    unknown = sorted(recipe.choices.keys() - {linear.name for linear in linears})
    if unknown:
        raise UsageError(
            f"{len(unknown)} of the recipe's choices are of linears that the model does not have, "
            f"{unknown[0]} for one",
            "prune the model that the recipe was made for, or take the choices out of it",
        )


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
