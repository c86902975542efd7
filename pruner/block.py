"""One block: observe its linears, prune each, tune them together if asked, pack them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..errors import CheckpointError
from ..kernels.formats import Dense
from .cost import is_staged, looks_back
from .guard import Solved, held_out_windows
from .journal import LinearRecord
from .judge import lost
from .linear import Linear, Solver
from .methods import admm
from .methods.base import InputStatistics, Lost
from .pack import pack
from .plan import Plan
from .recipe import Recipe
from .recover.blocks import Activations, BlockTuning, TuningResult, tune_block
from .reorder import (
    order_for,
    reorder_module,
    reorder_weights,
    reordered_rows,
    reordered_solution,
)
from .rows import unpacked
from .source import Source, Trained, first_nonfinite
from .starved import is_starved, shrunk
from .stream import BlockStream
from .tasks import Here
from .walk import Observation, Walk

Report = Callable[[str, LinearRecord, float], None]


@dataclass
class _Block:
    """A block in memory: its stored tensors by full name, and the module that they fill."""

    index: int
    prefix: str
    tensors: dict[str, Tensor]
    broken: frozenset[str]  # linears with NaN or infinity
    module: nn.Module
    parent: nn.Module | None  # the same, never to be changed
    reordered: bool = False  # passes that wait in the module have another order of channels
    routed: InputStatistics | None = None  # of all tokens that a router shares out to experts

    def original(self, short: str) -> Tensor:
        """The source's weight [N, K] of one of its linears."""
        return self.tensors[f"{self.prefix}{short}.weight"]


class BlockPruner:
    """Prunes the blocks of one model, each from its stream of activations."""

    def __init__(self, source: Source, recipe: Recipe, plan: Plan, report: Report) -> None:
        self._source, self._recipe, self._report = source, recipe, report
        self._planned = {linear.name: linear for linear in plan.linears}
        trained = isinstance(source, Trained)  # as a whole: its blocks are what they should be
        self._tunes = recipe.tunes_blocks and not trained
        self._judges = not trained  # what rounds a trained model is compared to nothing
        self._solver = Solver(recipe.method, trained, self._tunes)
        self._readers = {channels.reader: channels for channels in source.family.free}
        self.tuning_seconds = 0.0  # what the blocks pruned so far took beyond their pruning

    @property
    def held_out(self) -> int:
        """Calibration windows that only judge."""
        return held_out_windows(self._recipe) if self._judges else 0

    @property
    def needs_parent(self) -> bool:
        """Whether the dense model's own activations have to go along."""
        return looks_back(self._recipe)

    def parent(self, index: int, stream: BlockStream) -> nn.Module | None:
        """A second copy of the block, as it was, if it is needed."""
        if not self.needs_parent:
            return None
        return stream.load_copy(index, self._source.block_tensors(index))

    def prune(
        self, index: int, stream: BlockStream
    ) -> tuple[dict[str, Tensor], dict[str, LinearRecord]]:
        """All tensors of the block as they are to be stored, and what happened to each linear.

        The stream then holds what enters the next block.

        Raises:
            CheckpointError: a tensor is not finite, unless the recipe allows it.
        """
        tensors = self._source.block_tensors(index)
        broken = self.check(tensors, frozenset(self._source.linear_names(index)))
        parent, module = self.parent(index, stream), stream.load_block(index, tensors)
        prefix = self._source.family.block_prefix(index)
        block = _Block(index, prefix, tensors, broken, module, parent)
        with self._walk(block, stream) as walk:
            linears = self._solve_all(block, walk)
            if not self._tunes:
                self._leave(block, walk)
        if self._tunes:
            with self._timed():
                self._tune(block, linears, stream)
            block.reordered = False  # the passes of another walk are in the new order
            with self._walk(block, stream) as walk:
                self._quantize_all(block, linears, walk)
                with self._timed():  # it goes all the way once more
                    self._leave(block, walk)
        return self._stored(block, linears)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.tuning_seconds += time.perf_counter() - started

    def check(self, tensors: dict[str, Tensor], prunable: frozenset[str]) -> frozenset[str]:
        """Names of the `prunable` linears that hold NaN or infinity.

        Raises:
            CheckpointError: something else does, or the recipe does not allow it.
        """
        broken: set[str] = set()
        for name, tensor in tensors.items():
            where = first_nonfinite(tensor)
            if where is None:
                continue
            linear = name.removesuffix(".weight")
            if not (self._recipe.allow_nonfinite and linear in prunable):
                raise CheckpointError(
                    f"tensor {name} is not finite at {where}",
                    "--allow-nonfinite keeps such a linear as it is, unpruned",
                )
            broken.add(linear)
        return frozenset(broken)

    def _passes(self) -> list[tuple[tuple[str, ...], ...]]:
        """The stages of a block that are observed together, from the block as it then is.

        Ours sees each stage behind the already pruned ones before it; the published baselines, and
        `fast`, see the whole block dense.
        """
        stages = self._source.family.observed
        return [(stage,) for stage in stages] if is_staged(self._recipe) else [stages]

    def _walk(self, block: _Block, stream: BlockStream) -> Walk:
        # What was computed with weights that have changed since cannot be gone on from.
        waits = is_staged(self._recipe)
        return Walk(stream, block.module, block.parent, waits)

    def _leave(self, block: _Block, walk: Walk) -> None:
        if block.index + 1 < self._source.block_count:
            walk.finish(anew=block.reordered)

    def _solve_all(self, block: _Block, walk: Walk) -> dict[str, Linear]:
        linears: dict[str, Linear] = {}
        for stages in self._passes():
            observed = walk.observe(stages)
            for stage in stages:
                for short in stage:
                    seen = observed.pop(short)  # they share it
                if self._is_router(stage[0]):
                    block.routed = seen.fit
                else:
                    self._solve_stage(block, stage, seen, linears)
        return linears

    def _solve_stage(
        self, block: _Block, stage: tuple[str, ...], seen: Observation, linears: dict[str, Linear]
    ) -> None:
        """All linears of a stage, which do not ask for each other."""
        started = time.perf_counter()
        observation = self._reorder(block, stage[0], self._fed(block, stage[0], seen), linears)
        # A wide Hessian is used up where it lies: there is no room for one at every worker.
        tasks = Here() if observation.fit.wide else self._source.tasks
        linears |= {short: self._begin(block, short, observation) for short in stage}
        shared, waiting = tasks.share(observation), {}
        for short in stage:
            if linears[short].target is not None:
                original = block.original(short)
                waiting[short] = self._solver.begin(tasks, linears[short], original, shared)
        for short in stage:
            linear = linears[short]
            if short in waiting:
                waiting[short]()
                self._put(block, short, linear)
            if self._tunes:
                linear.fit = observation.fit.bare
            else:
                linear.forget()
                del block.tensors[f"{linear.name}.weight"]
                self._report(linear.name, linear.record, time.perf_counter() - started)

    def _is_router(self, short: str) -> bool:
        experts = self._source.family.experts
        return experts is not None and short == experts.router

    def _fed(self, block: _Block, short: str, seen: Observation) -> Observation:
        """What is known of a linear's inputs; an expert that saw few tokens leans on its layer."""
        if not self._source.family.is_routed(short) or not is_starved(seen.fit):
            return seen
        # What an expert computes itself, which its reader reads, no other token has.
        layer = None if short in self._readers else block.routed
        return replace(seen, fit=shrunk(seen.fit, layer))

    def _reorder(
        self, block: _Block, short: str, observation: Observation, linears: dict[str, Linear]
    ) -> Observation:
        """Before a reader of free channels is solved, put them into the order that suits it best.

        The block, and those of its `linears` that are solved, are in the new order from then on, as
        is the observation that is returned.
        """
        free, name = self._readers.get(short), block.prefix + short
        target = self._planned[name].target
        asked = self._recipe.reorder and self._recipe.method == "admm"
        if not asked or free is None or target is None:
            return observation
        if name in block.broken or isinstance(self._source, Trained):
            return observation
        order = order_for(block.original(short).float(), observation.fit, target)
        if order is None:
            return observation
        reorder_weights(block.tensors, free, order, block.prefix)
        reorder_module(block.module, free, order)
        for maker in free.makers:
            linear = linears[maker]
            linear.packed = reordered_rows(linear.packed, order)
            if linear.solved is not None:
                pruned = reordered_solution(linear.solved.pruned, order)
                linear.solved = replace(linear.solved, pruned=pruned)
        block.reordered = True
        return observation.reordered(order)

    def _begin(self, block: _Block, short: str, observation: Observation) -> Linear:
        name, packed = block.prefix + short, Dense(block.original(short))
        planned = self._planned[name]
        reason = planned.reason or ("not finite" if name in block.broken else None)
        target = None if reason else planned.target
        if target is not None and target.bits == 4 and self._tunes:
            target = replace(target, bits=16)  # codes come after the tuning
        tokens = observation.fit.tokens if self._source.family.is_routed(short) else None
        record = LinearRecord(packed.kind, packed.shape, None, "none", None, reason or "")
        record = replace(record, tokens=tokens)
        return Linear(name, target, packed, record, planned.group, observation.fit)

    def _tune(self, block: _Block, linears: dict[str, Linear], stream: BlockStream) -> None:
        """Train the block as a whole against its parent, the masks as they are."""
        assert block.parent is not None
        masks = {
            f"{short}.weight": linear.solved.pruned.keep
            for short, linear in linears.items()
            if linear.solved is not None
        }
        activations = Activations(stream.hidden, stream.outputs(block.parent), self.held_out)
        tuning = BlockTuning(self._recipe.block_epochs, self._recipe.seed + block.index)
        dense = {f"{short}.weight" for short, linear in linears.items() if linear.solved is None}
        result = tune_block(block.module, masks, activations, stream.run, tuning, dense)
        for name, parameter in block.module.named_parameters():
            short = name.removesuffix(".weight")
            full = block.prefix + name
            if short not in linears:
                block.tensors[full] = parameter.data.to(block.tensors[full].dtype)
                parameter.copy_(block.tensors[full])
            elif (solved := linears[short].solved) is not None:
                tuned = _tuned(solved, parameter.data.clone(), result)
                self._take(block, short, linears[short], tuned)

    def _quantize_all(self, block: _Block, linears: dict[str, Linear], walk: Walk) -> None:
        """Round the tuned weights, stage by stage, each on the inputs that it will really have."""
        targets = {short: self._planned[block.prefix + short].target for short in linears}
        coded = {short for short, target in targets.items() if target and target.bits == 4}
        for stages in self._passes() if coded else ():
            for short, seen in walk.observe(stages, drift=False).items():
                if self._is_router(short):
                    block.routed = seen.fit
                if short not in coded:
                    continue
                linear, target = linears[short], targets[short]
                if linear.solved is None or target is None:
                    continue
                observation = self._fed(block, short, seen)
                tuned = linear.solved.pruned
                pruned = admm.quantize(tuned.weight, tuned.keep, observation.fit, target)
                # What it was compared as is no longer what is stored.
                method = "admm" if target.pattern.is_dense else linear.solved.method
                linear.target, linear.fit = target, observation.fit
                self._take(block, short, linear, Solved(replace(pruned, note=tuned.note), method))
        for linear in linears.values():
            self._report(linear.name, linear.record, 0.0)

    def _take(self, block: _Block, short: str, linear: Linear, solved: Solved) -> None:
        """Let a linear be what `solved` says."""
        assert linear.target is not None
        original = block.original(short)
        packed = pack(solved.pruned, linear.target, original.dtype, linear.name)
        assert linear.fit is not None
        linear.take(solved, packed, Lost.relative([lost(original, packed, linear.fit)]))
        self._put(block, short, linear)

    def _put(self, block: _Block, short: str, linear: Linear) -> None:
        """Fill the module with a linear as it is stored, for the stages behind it."""
        block.module.get_parameter(f"{short}.weight").data = unpacked(linear.packed)

    def _stored(
        self, block: _Block, linears: dict[str, Linear]
    ) -> tuple[dict[str, Tensor], dict[str, LinearRecord]]:
        stored = dict(block.tensors)
        for linear in linears.values():
            stored.pop(f"{linear.name}.weight", None)
            stored |= {
                f"{linear.name}.{suffix}": t for suffix, t in linear.packed.tensors().items()
            }
        records = {linear.name: linear.record for linear in linears.values()}
        return {name: tensor.cpu() for name, tensor in stored.items()}, records


def _tuned(solved: Solved, weight: Tensor, result: TuningResult) -> Solved:
    """With the weight that its block's tuning left; the guard's errors are of another one then."""
    if not result.kept:
        pruned = replace(solved.pruned, weight=weight, note="its block's tuning was put back")
        return replace(solved, pruned=pruned)
    note = f"tuned with its block, held-out error {result.before:.4g} to {result.after:.4g}"
    return Solved(replace(solved.pruned, weight=weight, note=note), solved.method)
