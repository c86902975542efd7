"""One block: observe its linears, prune each, tune them together if asked, pack them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..kernels.formats import Dense, PackedLinear
from .cost import is_staged, looks_back
from .guard import Solved, held_out_windows, solve_guarded
from .journal import LinearRecord
from .masks import is_n_of_m
from .methods import admm
from .methods.base import InputStatistics, Pruned, Target, relative_error
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
from .source import Source, Trained, first_nonfinite
from .starved import is_starved, shrunk
from .stream import BlockStream
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


@dataclass
class _Linear:
    """One linear on its way: what it has to become, and the best answer so far."""

    target: Target | None  # None: it stays as it is, for `reason`
    reason: str | None
    fit: InputStatistics  # of the inputs it was last observed with
    packed: PackedLinear  # as it would be stored now
    solved: Solved | None = None


class BlockPruner:
    """Prunes the blocks of one model, each from its stream of activations."""

    def __init__(self, source: Source, recipe: Recipe, plan: Plan, report: Report) -> None:
        self._source, self._recipe, self._report = source, recipe, report
        self._planned = {linear.name: linear for linear in plan.linears}
        self._tunes = recipe.recover == "blocks"
        self._readers = {channels.reader: channels for channels in source.family.free}

    @property
    def held_out(self) -> int:
        """Calibration windows that only judge."""
        return held_out_windows(self._recipe)

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
        module, parent = stream.load_block(index, tensors), self.parent(index, stream)
        prefix = self._source.family.block_prefix(index)
        block = _Block(index, prefix, tensors, broken, module, parent)
        with self._walk(block, stream) as walk:
            linears = self._solve_all(block, walk)
            if not self._tunes:
                self._leave(block, walk)
        if self._tunes:
            self._tune(block, linears, stream)
            block.reordered = False  # the passes of another walk are in the new order
            with self._walk(block, stream) as walk:
                self._quantize_all(block, linears, walk)
                self._leave(block, walk)
        return self._stored(block, linears)

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

    def _solve_all(self, block: _Block, walk: Walk) -> dict[str, _Linear]:
        linears: dict[str, _Linear] = {}
        for stages in self._passes():
            for short, seen in walk.observe(stages).items():
                if self._is_router(short):
                    block.routed = seen.fit
                    continue
                started = time.perf_counter()
                observation = self._reorder(block, short, self._fed(block, short, seen), linears)
                linear = self._begin(block, short, observation)
                if linear.target is not None:
                    weight = block.original(short).float()
                    linear.solved = self._solve(weight, observation, linear.target)
                    self._put(block, short, linear)
                linears[short] = linear
                if not self._tunes:
                    self._tell(block, short, linear, started)
        return linears

    def _is_router(self, short: str) -> bool:
        experts = self._source.family.experts
        return experts is not None and short == experts.router

    def _fed(self, block: _Block, short: str, seen: Observation) -> Observation:
        """What is known of a linear's inputs; an expert that saw few tokens leans on its layer."""
        if not self._source.family.is_routed(short) or not is_starved(seen.fit):
            return seen
        layer = block.routed
        same = layer is not None and layer.hessian.shape == seen.fit.hessian.shape
        reads_layer = same and short not in self._readers
        return replace(seen, fit=shrunk(seen.fit, layer if reads_layer else None))

    def _reorder(
        self, block: _Block, short: str, observation: Observation, linears: dict[str, _Linear]
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

    def _begin(self, block: _Block, short: str, observation: Observation) -> _Linear:
        name, original = block.prefix + short, block.original(short)
        planned = self._planned[name]
        reason = planned.reason or ("not finite" if name in block.broken else None)
        target = None if reason else planned.target
        if target is not None and target.bits == 4 and self._tunes:
            target = replace(target, bits=16)  # codes come after the tuning
        return _Linear(target, reason, observation.fit, Dense(original))

    def _solve(self, weight: Tensor, observation: Observation, target: Target) -> Solved:
        pattern = target.pattern
        if pattern.is_dense and target.bits > 4:
            everything = torch.ones_like(weight, dtype=torch.bool)
            return Solved(Pruned(weight, everything), "round to nearest")
        method = self._recipe.method
        if isinstance(self._source, Trained) and target.bits == 4:
            # Its masks were chosen before the training.
            return Solved(admm.quantize(weight, weight != 0, observation.fit, target), "round")
        if pattern.of and is_n_of_m(weight, pattern.kept, pattern.of):
            if target.bits == 16:
                note = f"is {pattern.text} already: nothing to do, repacked"
                return Solved(Pruned(weight, weight != 0, note=note), "repack")
            if method == "admm":
                rounded = admm.quantize(weight, weight != 0, observation.fit, target)
                return Solved(replace(rounded, note=f"was {pattern.text} already"), "round")
        return solve_guarded(method, weight, observation.fit, observation.check, target)

    def _tune(self, block: _Block, linears: dict[str, _Linear], stream: BlockStream) -> None:
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
                linears[short].solved = _tuned(solved, parameter.data.clone(), result)
                self._put(block, short, linears[short])

    def _quantize_all(self, block: _Block, linears: dict[str, _Linear], walk: Walk) -> None:
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
                linear.target, linear.fit = target, observation.fit
                # What it was compared as is no longer what is stored.
                method = "admm" if target.pattern.is_dense else linear.solved.method
                linear.solved = Solved(replace(pruned, note=tuned.note), method)
                self._put(block, short, linear)
        for short, linear in linears.items():
            self._tell(block, short, linear, time.perf_counter())

    def _put(self, block: _Block, short: str, linear: _Linear) -> None:
        """Pack a solved linear, and fill the module with it, for the stages behind it."""
        assert linear.target is not None and linear.solved is not None
        name, dtype = block.prefix + short, block.original(short).dtype
        linear.packed = pack(linear.solved.pruned, linear.target, dtype, name)
        block.module.get_parameter(f"{short}.weight").copy_(linear.packed.unpack())

    def _tell(self, block: _Block, short: str, linear: _Linear, started: float) -> None:
        name = block.prefix + short
        self._report(name, self._record(block, short, linear), time.perf_counter() - started)

    def _record(self, block: _Block, short: str, linear: _Linear) -> LinearRecord:
        packed, solved = linear.packed, linear.solved
        tokens = linear.fit.tokens if self._source.family.is_routed(short) else None
        if solved is None:
            record = LinearRecord(packed.kind, packed.shape, None, "none", None)
            return replace(record, note=linear.reason or "", tokens=tokens)
        original = block.original(short).float()
        return LinearRecord(
            format=packed.kind,
            shape=packed.shape,
            group=self._planned[block.prefix + short].group,
            method=solved.method,
            relative_error=relative_error(original, packed.unpack(), linear.fit.hessian),
            note=solved.pruned.note,
            held_out_error=solved.held_out_error,
            baseline_error=solved.baseline_error,
            tokens=tokens,
        )

    def _stored(
        self, block: _Block, linears: dict[str, _Linear]
    ) -> tuple[dict[str, Tensor], dict[str, LinearRecord]]:
        stored = dict(block.tensors)
        records = {}
        for short, linear in linears.items():
            name = block.prefix + short
            del stored[f"{name}.weight"]
            stored.update({f"{name}.{suffix}": t for suffix, t in linear.packed.tensors().items()})
            records[name] = self._record(block, short, linear)
        return {name: tensor.cpu() for name, tensor in stored.items()}, records


def _tuned(solved: Solved, weight: Tensor, result: TuningResult) -> Solved:
    """With the weight that its block's tuning left; the guard's errors are of another one then."""
    if not result.kept:
        pruned = replace(solved.pruned, weight=weight, note="its block's tuning was put back")
        return replace(solved, pruned=pruned)
    note = f"tuned with its block, held-out error {result.before:.4g} to {result.after:.4g}"
    return Solved(replace(solved.pruned, weight=weight, note=note), solved.method)
