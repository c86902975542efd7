"""What a run takes in time, memory and disk, from shapes alone: an estimate for this machine.

Products of matrices are counted and divided by the rate that this machine reaches; the passes over
single weights, and the counts of the iterative solvers, are measured constants.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch

from ..kernels.formats import Dense, Int4, Sparse24
from .budget.search import MOST_MEASUREMENTS
from .budget.sizes import SOLVED, stored_bytes
from .budget.windows import SENSED_TOKENS, checked_windows, judged_windows
from .disk import handed_on_bytes, training_bytes
from .guard import held_out_windows
from .methods.base import Target
from .pack import why_not
from .recipe import CHOICES, Pattern, Recipe
from .recover.memory import MOST_TARGETS_BYTES, needed_bytes
from .recover.settings import ROUNDING_PARTS, ROUNDING_TOKENS, Distillation
from .rows import MOST_WEIGHTS, rows_are_alone
from .solvers.wide import WIDE
from .source import Source
from .spill import is_spilled
from .stream import tokens_per_batch
from .walk import waiting_bytes, waiting_share

_INTERPRETER_BYTES = 700 * 2**20  # torch and transformers, imported
# What an allocator holds beyond what is asked of it, measured; large pieces go back at once.
_HEAP_SLACK, _MOST_SLACK = 0.25, 2**30
# A pass through a block does more than its linears: norms, activations, copies of its inputs.
_FORWARD_SLOWDOWN = 1.25
_BACKWARD = 2  # in forward passes
# Our method, per linear [N, K]: products of N x K x K it takes, and K x K x K for the spectrum;
# seconds for each weight and each linear besides. The second figures are those that codes add.
_PRODUCTS, _CUBES, _CODES_PRODUCTS = 140, 17, 200
_WEIGHT_SECONDS, _CODES_WEIGHT_SECONDS = 4.4e-7, 8e-7
_LINEAR_SECONDS, _CODES_LINEAR_SECONDS = 0.05, 0.1
_SWEEP_SECONDS_PER_WEIGHT = 2.2e-7  # SparseGPT's columns, measured on two cores


class Linear(Protocol):
    """What a plan says of a linear."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def target(self) -> Target | None: ...


def estimate_seconds(source: Source, linears: Sequence[Linear], recipe: Recipe) -> float:
    """Wall time of a run."""
    if recipe.has_budget:  # what it will choose is not known; most linears are 4 bits in the end
        linears = [_Assumed(linear.name, linear.shape, recipe) for linear in linears]
    again = 1 - _waiting(source, linears, recipe)[0]
    block = linears[: len(source.family.linears)]
    passes = _block_flops(source, block, recipe, again)
    if recipe.is_rounded_on_the_way:
        passes += _rounding_flops(source, block, recipe, again)
    flops = source.block_count * passes
    seconds = 0.0
    for linear in linears:
        if linear.target is not None:
            more, passes = _solver(linear, linear.target, recipe.method)
            flops, seconds = flops + more, seconds + passes
    if recipe.has_budget:
        more, passes = _search(source, linears, recipe)
        flops, seconds = flops + more, seconds + passes
    return flops / _flops_per_second() + seconds + _distillation_seconds(source, recipe)


@dataclass(frozen=True)
class _Assumed:
    """A linear of a run whose formats are still to be chosen."""

    name: str
    shape: tuple[int, int]
    recipe: Recipe
    kind: str = Int4.kind

    @property
    def target(self) -> Target:
        pattern, bits = CHOICES[self.kind]
        return Target(Pattern.parse(pattern), bits, self.recipe.group, self.recipe.damping)


def _search(source: Source, linears: Sequence[Linear], recipe: Recipe) -> tuple[float, float]:
    """Of a budget's search, as `_solver`: sensitivities, candidates, and models measured."""
    length, family = recipe.calib_length, source.family
    block = linears[: len(family.linears)]
    forward = source.block_count * _forward_flops(source, block, length)
    head = 2 * prod(source.tensors.shape(f"{family.embedding}.weight"))
    first = [block[family.linears.index(stage[0])] for stage in family.stages]
    hessians = source.block_count * sum(2 * linear.shape[1] ** 2 for linear in first)
    fitted = length * (recipe.calib_windows + checked_windows(recipe))
    judged = length * judged_windows(recipe)
    flops = (2 + _BACKWARD) * SENSED_TOKENS * forward
    flops += fitted * (_FORWARD_SLOWDOWN * forward + hessians)
    # The dense model on both sets of windows, those that are tried on one, the result on the other.
    measured = (MOST_MEASUREMENTS + 3) * judged
    flops += measured * (_FORWARD_SLOWDOWN * forward + head)
    seconds = 0.0
    for linear in linears:
        for kind in SOLVED:
            assumed = _Assumed(linear.name, linear.shape, recipe, kind)
            more, passes = _solver(linear, assumed.target, recipe.method)
            flops, seconds = flops + more, seconds + passes
    return flops, seconds


def _forward_flops(source: Source, block: Sequence[Linear], length: int) -> float:
    """Of one block and one token."""
    # Half of the scores are above the diagonal and are never computed; what the output linear
    # reads are all heads.
    heads = block[source.family.linears.index(source.family.stages[1][0])].shape[1]
    return _linear_flops(source, block) + 2 * length * heads


def _linear_flops(source: Source, linears: Sequence[Linear]) -> float:
    """Of some linears of the first block and one token; few of a router's experts see it."""
    prefix, share = source.family.block_prefix(0), source.family.share
    return sum(2 * prod(x.shape) * share(x.name.removeprefix(prefix)) for x in linears)


def _block_flops(source: Source, block: Sequence[Linear], recipe: Recipe, again: float) -> float:
    """Of the passes through one block and of its Hessians; `again` of them start anew each time."""
    tokens = recipe.calib_windows * recipe.calib_length
    weights = {linear.name.removeprefix(source.family.block_prefix(0)): linear for linear in block}
    forward = _forward_flops(source, block, recipe.calib_length)
    attention = forward - _linear_flops(source, block)
    staged = is_staged(recipe)
    copies = 2 if looks_back(recipe) else 1
    passes, before, hessians = 0.0, 0.0, 0.0
    for stage in source.family.stages:
        passes += again * before if staged else 0.0
        share = source.family.share(stage[0])
        hessians += share * copies * 2 * weights[stage[0]].shape[1] ** 2
        before += _linear_flops(source, [weights[short] for short in stage])
        before += attention if stage is source.family.stages[0] else 0.0
    passes += forward * (1 if staged else 2)
    if recipe.tunes_blocks:
        share = 1 - held_out_windows(recipe) / recipe.calib_windows
        passes += recipe.block_epochs * (1 + _BACKWARD) * forward * share / copies
        passes += forward
    return tokens * (_FORWARD_SLOWDOWN * passes * copies + hessians)


def _rounding_flops(source: Source, block: Sequence[Linear], recipe: Recipe, again: float) -> float:
    """Of finding a block's codes after the training: a second walk (staged.py), in a few parts,
    each of which leads through the blocks before it once more."""
    windows = min(recipe.calib_windows, max(1, ROUNDING_TOKENS // recipe.calib_length))
    untuned = replace(recipe, recover="none", calib_windows=windows)
    once = windows * recipe.calib_length * _FORWARD_SLOWDOWN
    once *= _forward_flops(source, block, recipe.calib_length) * (2 if looks_back(untuned) else 1)
    return _block_flops(source, block, untuned, again) + once * (ROUNDING_PARTS - 1) / 2


def _solver(linear: Linear, target: Target, method: str) -> tuple[float, float]:
    """Floating-point operations, and seconds of work that is none, to prune one linear."""
    rows, columns = linear.shape
    square, weights = 2.0 * columns**2, rows * columns
    if method == "sparsegpt":
        factor = 1 / 3 if columns >= WIDE else 1.0  # of as many operations as LAPACK's way takes
        flops = square * (factor * columns + rows / 2)
        return flops, weights * _SWEEP_SECONDS_PER_WEIGHT
    if method != "admm" or (target.pattern.is_dense and target.bits > 4):
        return 0.0, 0.0
    flops, seconds = square * columns * _CUBES, _LINEAR_SECONDS
    if not target.pattern.is_dense:
        flops += square * rows * _PRODUCTS
        seconds += weights * _WEIGHT_SECONDS
    if target.bits == 4:
        flops += square * rows * _CODES_PRODUCTS
        seconds += weights * _CODES_WEIGHT_SECONDS + _CODES_LINEAR_SECONDS
    return flops, seconds


def _distillation_seconds(source: Source, recipe: Recipe) -> float:
    if not recipe.distills:
        return 0.0
    if not recipe.recover_tokens:
        return 60 * recipe.recover_minutes
    weights = sum(prod(source.tensors.shape(name)) for name in source.tensors.names())
    # The student there and back, the parent there.
    flops = 2 * weights * recipe.recover_tokens * (2 + _BACKWARD)
    return _FORWARD_SLOWDOWN * flops / _flops_per_second()


def estimate_memory(source: Source, linears: Sequence[Linear], recipe: Recipe) -> int:
    """Bytes at the peak, with the passes that wait for as long as there is room for them.

    Raises:
        UsageError: the recipe asks for a distillation that means nothing.
    """
    share, waiting = _waiting(source, linears, recipe)
    pruning = _least_memory(source, linears, recipe) + int(share * waiting)
    slack = min(int(_HEAP_SLACK * (pruning - _INTERPRETER_BYTES)), _MOST_SLACK)
    return max(pruning + slack, _distillation_memory(source, recipe))


def _distillation_memory(source: Source, recipe: Recipe) -> int:
    """Of a text that is long enough to fill what the parent's outputs may take."""
    if not recipe.distills:
        return 0
    settings = Distillation(minutes=recipe.recover_minutes, tokens=recipe.recover_tokens)
    fitted = settings.fitted(source.family.context)
    return needed_bytes(source, fitted, MOST_TARGETS_BYTES)


def _waiting(source: Source, linears: Sequence[Linear], recipe: Recipe) -> tuple[float, int]:
    """The share of a block's passes that wait at its stages, and the bytes that all would hold."""
    if not is_staged(recipe):
        return 0.0, 0
    block = linears[: len(source.family.linears)]
    widths = block[0].shape[1], max(max(linear.shape) for linear in block)
    tokens = recipe.calib_windows * recipe.calib_length
    needed = waiting_bytes(tokens, widths, 2 if looks_back(recipe) else 1)
    return waiting_share(needed, source.device, _least_memory(source, linears, recipe)), needed


def _least_memory(source: Source, linears: Sequence[Linear], recipe: Recipe) -> int:
    """The worst moment of a block: a pass through it, or the solving of one of its stages."""
    block = linears[: len(source.family.linears)]
    copies = 2 if looks_back(recipe) else 1
    short = {each.name.removeprefix(source.family.block_prefix(0)): each for each in block}
    stages = [[short[name] for name in stage] for stage in source.family.stages]
    hessians = [_hessian_bytes(stage[0], recipe, copies) for stage in stages]
    stay = recipe.has_budget or recipe.tunes_blocks  # the Hessians, to the block's end
    staged = is_staged(recipe) and not stay
    together = max(hessians) if staged else sum(hessians)
    weights = sum(_weight_bytes(source, linear, recipe, copies, False) for linear in block)
    moments = [weights + together + _passing_bytes(block, recipe)]
    for stage, hessian in zip(stages, hessians, strict=True):
        left = hessian if staged else together
        moments.append(weights + left + max(_method_bytes(linear, recipe) for linear in stage))
        together -= 0 if stay else hessian
        for linear in stage:
            weights -= _weight_bytes(source, linear, recipe, copies, False)
            weights += _weight_bytes(source, linear, recipe, copies, True)
    moments.append(weights + _passing_bytes(block, recipe))
    embedding = 4 * prod(source.tensors.shape(f"{source.family.embedding}.weight"))
    states = _states_bytes(source, block, recipe, copies)
    return _INTERPRETER_BYTES + max(*moments, 2 * embedding) + states


def _weight_bytes(source: Source, linear: Linear, recipe: Recipe, copies: int, solved: bool) -> int:
    """A linear as it is computed with and, once it is `solved`, as it is stored beside that."""
    stored = source.tensors.dtype(f"{linear.name}.weight").itemsize
    if recipe.tunes_blocks:
        # In fp32: the weight, what it was, a gradient, two moments and the solution; its mask.
        return prod(linear.shape) * (6 * 4 + 1 + 2 * stored + copies * stored)
    each = float(copies * stored)
    if solved and linear.target is not None:
        coded, sparse = linear.target.bits < 16, linear.target.pattern.is_24
        served, packed = (4, 1) if coded else (stored, stored * 9 / 16 if sparse else stored)
        each += served - stored + packed
    return int(prod(linear.shape) * each)


def _hessian_bytes(linear: Linear, recipe: Recipe, copies: int) -> int:
    """Of its inputs, and of those that judge; where the dense model goes along, drift and shift."""
    judged = held_out_windows(recipe) > 0
    kinds = (5 if copies == 2 else 2) if judged else copies
    return 4 * linear.shape[1] ** 2 * kinds


def _method_bytes(linear: Linear, recipe: Recipe) -> int:
    """What a method holds beside the Hessian."""
    weights, square = prod(linear.shape), 4 * linear.shape[1] ** 2
    target, whole = linear.target, recipe.tunes_blocks
    if target is not None and not whole and rows_are_alone(recipe.method, target.pattern):
        weights = min(weights, MOST_WEIGHTS)
    if recipe.method == "admm":
        return 12 * square + 6 * 4 * weights  # a third for those in another order
    factors = 3 * square if recipe.method == "sparsegpt" and linear.shape[1] < WIDE else 0
    return factors + 6 * 4 * weights


def _passing_bytes(block: Sequence[Linear], recipe: Recipe) -> int:
    """Activations of one pass through the block."""
    tokens, widest = recipe.calib_windows * recipe.calib_length, max(max(x.shape) for x in block)
    return 4 * min(tokens, tokens_per_batch(widest)) * 4 * (block[0].shape[1] + widest)


def _states_bytes(source: Source, block: Sequence[Linear], recipe: Recipe, copies: int) -> int:
    """Activations that enter the block, where they do not lie in a file."""
    states = 4 * recipe.calib_windows * recipe.calib_length * block[0].shape[1]
    if recipe.has_budget:  # those of all blocks, for the sensitivities
        return 2 * states + 4 * SENSED_TOKENS * block[0].shape[1] * source.block_count
    if is_spilled(states, source.device):
        return 0
    return states * (copies + (1 if recipe.tunes_blocks else 0))


def estimate_scratch(source: Source, linears: Sequence[Linear], recipe: Recipe, output: int) -> int:
    """Bytes on the disk that only an unfinished run holds, beside its `output`."""
    states = 4 * recipe.calib_windows * recipe.calib_length * linears[0].shape[1]
    streams = (2 if looks_back(recipe) else 1) + (recipe.tunes_blocks)
    scratch = states * streams if is_spilled(states, source.device) else 0
    if recipe.has_budget:  # candidates; the model is made beside them and moved, not copied
        scratch += sum(
            stored_bytes(source, linear.name, kind, recipe.group)
            for linear in linears
            for kind in SOLVED
            if not why_not(linear.shape, _Assumed(linear.name, linear.shape, recipe, kind).target)
        )
    if not recipe.distills:
        return scratch
    kept = sum(
        prod(linear.shape) // (2 if linear.target and linear.target.pattern.is_24 else 1)
        for linear in linears
    )
    scratch += output + training_bytes(kept)
    if recipe.is_rounded_on_the_way:  # pruned and trained as floats first; both lie beside it
        floats = Sparse24.kind if Pattern.parse(recipe.pattern).is_24 else Dense.kind
        scratch += 2 * output + handed_on_bytes(kept)
        for linear in linears:
            kind = floats if linear.target else Dense.kind
            scratch += 2 * stored_bytes(source, linear.name, kind, recipe.group)
    return scratch


def is_staged(recipe: Recipe) -> bool:
    """Whether a stage of a block is observed behind the already pruned ones before it."""
    return recipe.method == "admm" and not recipe.fast


def looks_back(recipe: Recipe) -> bool:
    """Whether the dense model's own activations go along with the pruned one's."""
    return (recipe.mix > 0 and recipe.method == "admm") or recipe.tunes_blocks


def _flops_per_second() -> float:
    """What this machine's matrix product reaches, from two tenths of a second.

    The fastest of some products: the mean was up to a third below what a run then reached, since
    threads wake up one by one and neighbours come and go.
    """
    side = 768
    a = torch.ones(side, side)
    begin, seconds = time.perf_counter(), []
    while time.perf_counter() - begin < 0.2:
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)
