"""Every linear in every format it may get: made once, from the dense model, and kept on the disk.

One pass over the blocks, with dense activations throughout, so that a linear's candidates do not
depend on what becomes of the linears before it and any mixture can be put together later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...kernels.formats import Dense, Int8, PackedLinear
from ..methods import METHODS
from ..methods.base import InputStatistics, relative_error
from ..pack import pack, why_not
from ..plan import target_of
from ..recipe import Recipe
from ..source import Source, first_nonfinite
from ..stream import BlockStream
from ..walk import Observation, Walk
from .knapsack import Option
from .scratch import Scratch
from .sensitivity import predicted_loss
from .sizes import SOLVED, stored_bytes
from .windows import BudgetWindows

# By rising bytes. No sparse24: 9 bits a weight, with less of the weight left, than int8's 8.
FORMATS_TRIED = (*SOLVED, Int8.kind, Dense.kind)


def possible_formats(source: Source, recipe: Recipe, linear: str) -> list[str]:
    """The formats that a linear's shape allows, by rising bytes."""
    shape, found = source.linear_shape(linear), []
    for kind in FORMATS_TRIED:
        target = target_of(replace(recipe, choices={linear: kind}), linear)
        if target is None or why_not(shape, target) is None:
            found.append(kind)
    return found


def make_candidates(
    source: Source,
    recipe: Recipe,
    windows: BudgetWindows,
    scratch: Scratch,
    told: Callable[[int], None] = lambda _: None,
) -> dict[str, list[Option]]:
    """Options of every linear, in the model's order. Goes on behind the blocks that are there.

    Raises:
        CheckpointError: a linear is not finite, unless the recipe allows it.
    """
    known = [scratch.options(index) for index in range(source.block_count)]
    missing = [index for index, options in enumerate(known) if options is None]
    if missing:
        sensitivity = scratch.sensitivity()
        assert sensitivity is not None, "the sensitivities come first"
        both = torch.cat([windows.fit, windows.check])
        stream = BlockStream(source, both, held_out=len(windows.check))
        maker = _Maker(source, recipe, sensitivity, scratch)
        for index in range(missing[-1] + 1):
            tensors = source.block_tensors(index)
            block = stream.load_block(index, tensors)
            with Walk(stream, block) as walk:
                if known[index] is None:
                    observed = walk.observe(source.family.stages)
                    known[index] = maker.make(index, tensors, observed)
                if index < missing[-1]:
                    walk.finish()
            stream.drop_block(index)
            told(index + 1)
    return {name: those for block in known if block for name, those in block.items()}


def assembled(
    source: Source, scratch: Scratch, choices: Mapping[str, str]
) -> Callable[[int], dict[str, Tensor]]:
    """Reads blocks of the model that `choices` describes: all tensors, linears as dense weights."""

    def read(index: int) -> dict[str, Tensor]:
        tensors = source.block_tensors(index)
        names = source.linear_names(index)
        solved = {name: choices[name] for name in names if choices[name] in SOLVED}
        shapes = {name: source.linear_shape(name) for name in names}
        packed = scratch.packed(index, solved, shapes) if solved else {}
        for name in names:
            weight = f"{name}.weight"
            if name in packed:
                tensors[weight] = packed[name].unpack()
            elif choices[name] == Int8.kind:
                tensors[weight] = Int8.from_dense(tensors[weight].float()).unpack()
        return tensors

    return read


class _Maker:
    """Makes the candidates of one block after the other."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        sensitivity: Mapping[str, Tensor],
        scratch: Scratch,
    ) -> None:
        self._source, self._recipe = source, recipe
        self._sensitivity, self._scratch = sensitivity, scratch

    def make(
        self, index: int, tensors: Mapping[str, Tensor], observed: Mapping[str, Observation]
    ) -> dict[str, list[Option]]:
        """Solve, judge and keep; returns the block's options."""
        prefix = self._source.family.block_prefix(index)
        options: dict[str, list[Option]] = {}
        kept: dict[str, dict[str, PackedLinear]] = {}
        for short, observation in observed.items():
            name = prefix + short
            weight = tensors[f"{name}.weight"]
            candidates = self._candidates(name, weight, observation.fit)
            assert observation.check is not None
            options[name] = self._judged(name, weight, candidates, observation.check)
            kept[name] = {kind: candidates[kind] for kind in SOLVED if kind in candidates}
        self._scratch.save_block(index, options, kept)
        return options

    def _candidates(
        self, name: str, weight: Tensor, fit: InputStatistics
    ) -> dict[str, PackedLinear]:
        where = first_nonfinite(weight)
        if where is not None and not self._recipe.allow_nonfinite:
            raise CheckpointError(
                f"tensor {name}.weight is not finite at {where}",
                "--allow-nonfinite keeps such a linear as it is, unpruned",
            )
        made: dict[str, PackedLinear] = {Dense.kind: Dense(weight)}
        if where is not None:
            return made
        made[Int8.kind] = Int8.from_dense(weight.float())
        for kind in possible_formats(self._source, self._recipe, name):
            target = target_of(replace(self._recipe, choices={name: kind}), name)
            if kind in SOLVED and target is not None:
                solved = METHODS[self._recipe.method](weight.float(), fit, target)
                made[kind] = pack(solved, target, weight.dtype, name)
        return made

    def _judged(
        self,
        name: str,
        weight: Tensor,
        candidates: Mapping[str, PackedLinear],
        check: InputStatistics,
    ) -> list[Option]:
        judged = []
        for kind in FORMATS_TRIED:
            if kind not in candidates:
                continue
            size = stored_bytes(self._source, name, kind, self._recipe.group)
            if kind == Dense.kind:
                judged.append(Option(kind, size, 0.0))
                continue
            stored = candidates[kind].unpack()
            change = stored - weight.float()
            loss = predicted_loss(change, check.hessian, self._sensitivity[name])
            error = relative_error(weight.float(), stored, check.hessian)
            judged.append(Option(kind, size, loss, error))
        return judged
