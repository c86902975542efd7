"""One linear: from what was observed of its inputs to what is stored, and said, of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.formats import PackedLinear, stacked
from .guard import Solved, solve_guarded, together
from .journal import LinearRecord
from .judge import lost
from .masks import is_n_of_m
from .methods import admm
from .methods.base import InputStatistics, Lost, Pruned, Target
from .pack import pack
from .rows import row_ranges, rows_are_alone
from .tasks import Tasks
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
    fit: InputStatistics | None
    solved: Solved | None = None

    def take(self, solved: Solved, packed: PackedLinear, error: float) -> None:
        """Hold another answer, with its error on the inputs observed last."""
        self.solved, self.packed = solved, packed
        self.record = replace(
            self.record,
            format=packed.kind,
            group=self.group,
            method=solved.method,
            relative_error=error,
            note=solved.pruned.note,
            held_out_error=solved.held_out_error,
            baseline_error=solved.baseline_error,
        )

    def forget(self) -> None:
        """Keep only what is stored and said."""
        self.solved = self.fit = None


@dataclass(frozen=True)
class Solver:
    """How linears are solved: by which method, whether their masks were `trained` before, and
    whether all rows are wanted as a `whole` afterwards."""

    method: str
    trained: bool
    whole: bool

    def begin(
        self, tasks: Tasks, linear: Linear, original: Tensor, seen: Any
    ) -> Callable[[], None]:
        """Have the weights found that are to stand for `original` [N, K]; the linear holds them
        when what is returned has been called.

        `seen` are its inputs' statistics, shared with `tasks`. Rows that do not ask for each other
        are parted among all workers.
        """
        target, parts = linear.target, [original]
        assert target is not None
        if self._parts(target) and tasks.workers > 1:
            # Copies: a view would be sent with all of the matrix.
            parts = [rows.clone() for rows in original.tensor_split(tasks.workers)]
        waiting = [
            tasks.submit(solve_rows, self, linear.name, target, rows, seen)
            for rows in parts
            if len(rows)
        ]

        def take() -> None:
            found = [wait() for wait in waiting]
            error = Lost.relative(part.lost for part in found)
            solved = together([part.solved for part in found])
            linear.take(solved, stacked([part.packed for part in found]), error)

        return take

    def _parts(self, target: Target) -> bool:
        return not self.whole and rows_are_alone(self.method, target.pattern)

    def solve(self, name: str, target: Target, rows: Tensor, seen: Observation) -> SolvedRows:
        """Some rows of a linear [n, K], few at a time where they do not ask for each other."""
        ranges = [slice(0, len(rows))]
        if self._parts(target):
            ranges = list(row_ranges(*rows.shape))
        packed, answers = [], []
        for part in ranges:
            found = self._solved(rows[part].float(), seen, target)
            packed.append(pack(found.pruned, target, rows.dtype, name))
            answers.append(found if self.whole else _without_weights(found))
        solved = together(answers)
        stored = stacked(packed)
        return SolvedRows(stored, solved, lost(rows, stored, seen.fit))

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


def _without_weights(solved: Solved) -> Solved:
    nothing = solved.pruned.weight.new_empty(0)
    return replace(solved, pruned=Pruned(nothing, nothing, note=solved.pruned.note))


@dataclass(frozen=True)
class SolvedRows:
    """Rows as stored, and what was lost; `solved` has their weights only if they were wanted."""

    packed: PackedLinear
    solved: Solved
    lost: Lost


def solve_rows(
    solver: Solver, name: str, target: Target, rows: Tensor, seen: Observation
) -> SolvedRows:
    """`Solver.solve`, as a task."""
    return solver.solve(name, target, rows, seen)
