"""One linear: from what was observed of its inputs to what is stored, and said, of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.formats import PackedLinear, stacked
from .guard import Solved, solve_guarded
from .journal import LinearRecord
from .judge import stored_error
from .masks import is_n_of_m
from .methods import admm
from .methods.base import InputStatistics, Pruned, Target
from .pack import pack
from .rows import row_ranges, rows_are_alone
from .walk import Observation


@dataclass
class Linear:
    """A linear on its way.

    `solved` and `fit`, its weights in fp32 and its Hessian, are there only between solving and
    `forget`.
    """

    name: str
    target: Target | None  # None: it stays as it is
    packed: PackedLinear  # as it would be stored now
    record: LinearRecord  # what is to be said of it now
    group: int | None
    solved: Solved | None = None
    fit: InputStatistics | None = None

    def take(self, solved: Solved, packed: PackedLinear, original: Tensor) -> None:
        """Hold another answer, whose error is that on the inputs observed last."""
        assert self.fit is not None
        self.solved, self.packed = solved, packed
        self.record = replace(
            self.record,
            format=packed.kind,
            group=self.group,
            method=solved.method,
            relative_error=stored_error(original, packed, self.fit),
            note=solved.pruned.note,
            held_out_error=solved.held_out_error,
            baseline_error=solved.baseline_error,
        )

    def forget(self) -> None:
        """Keep only what is stored and said."""
        self.solved = self.fit = None


@dataclass(frozen=True)
class Solver:
    """How linears are solved: by which method, and whether their masks were `trained` before."""

    method: str
    trained: bool

    def solve(self, linear: Linear, original: Tensor, seen: Observation, whole: bool) -> None:
        """Find the weights that are to stand for `original` [N, K].

        Rows that do not ask for each other are taken some at a time, unless all are wanted as a
        `whole`: then `linear.solved` holds them.
        """
        target = linear.target
        assert target is not None
        linear.fit = seen.fit
        parts = [slice(0, len(original))]
        if not whole and rows_are_alone(self.method, target.pattern):
            parts = list(row_ranges(*original.shape))
        packed = []
        for part in parts:
            solved = self._solved(original[part].float(), seen, target)
            packed.append(pack(solved.pruned, target, original.dtype, linear.name))
        linear.take(solved, stacked(packed), original)

    def _solved(self, weight: Tensor, seen: Observation, target: Target) -> Solved:
        pattern = target.pattern
        if pattern.is_dense and target.bits > 4:
            everything = torch.ones_like(weight, dtype=torch.bool)
            return Solved(Pruned(weight, everything), "round to nearest")
        if self.trained and target.bits == 4:
            # Its masks were chosen before the training.
            return Solved(admm.quantize(weight, weight != 0, seen.fit, target), "round")
        if pattern.of and is_n_of_m(weight, pattern.kept, pattern.of):
            if target.bits == 16:
                note = f"is {pattern.text} already: nothing to do, repacked"
                return Solved(Pruned(weight, weight != 0, note=note), "repack")
            if self.method == "admm":
                rounded = admm.quantize(weight, weight != 0, seen.fit, target)
                return Solved(replace(rounded, note=f"was {pattern.text} already"), "round")
        return solve_guarded(self.method, weight, seen.fit, seen.check, target)
