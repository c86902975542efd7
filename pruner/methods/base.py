"""The one signature of a pruning method, and the types that pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels.groups import expand_groups
from ..int4 import round_to_nearest
from ..recipe import Pattern
from ..solvers.factor import inverse_factor
from ..solvers.objective import Curvature, damp
from ..solvers.wide import factorize


@dataclass(frozen=True)
class Factor:
    """U, in the upper triangle [K, K], with U^T U the inverse of the damped Hessian.

    None where no damping was enough. `dead` inputs [K] were always zero.
    """

    upper: Tensor | None
    damping: float
    dead: Tensor


@dataclass(frozen=True)
class InputStatistics:
    """What calibration learned of one linear's inputs X [tokens, K].

    `hessian` is X^T X / tokens in fp32: the layer error's Hessian up to a factor, which no method
    here depends on (damping is relative to its diagonal).
    """

    hessian: Tensor  # [K, K]
    tokens: int
    drift: Tensor | None = None  # [K, K], see solvers/objective.py; None: not collected
    shift: Tensor | None = None  # [K, K], second moment of what `drift` is the first of
    sample: Tensor | None = None  # [tokens, K], some inputs, where there are many of them
    wide: bool = False  # SparseGPT's factor takes the Hessian's place
    _curvatures: dict[float, Curvature] = field(default_factory=dict, repr=False, compare=False)
    _factors: dict[float, Factor] = field(default_factory=dict, repr=False, compare=False)

    def curvature(self, damping: float) -> Curvature:
        """The damped Hessian, made once for all linears that share these statistics."""
        if damping not in self._curvatures:
            self._curvatures[damping] = damp(self.hessian, damping)
        return self._curvatures[damping]

    def factor(self, damping: float) -> Factor:
        """What SparseGPT needs of the Hessian, made once for all linears that share it.

        Of a wide one it takes the place of the Hessian (solvers/wide.py), which is then gone.
        """
        if damping not in self._factors:
            dead = self.hessian.diagonal() == 0
            if not self.wide:
                upper, raised = inverse_factor(self.hessian, damping)
            else:
                taken = factorize(self.hessian, damping)
                upper, raised = (None, damping) if taken is None else (self.hessian, taken)
            self._factors[damping] = Factor(upper, raised, dead)
        return self._factors[damping]

    @property
    def bare(self) -> InputStatistics:
        """What an error is told by, without all that was made of it."""
        return InputStatistics(self.hessian, self.tokens, sample=self.sample, wide=self.wide)

    def reordered(self, order: Tensor) -> InputStatistics:
        """The statistics of the same inputs in the order `order` [K]."""
        hessian, drift, shift = (
            None if matrix is None else matrix[order][:, order].contiguous()
            for matrix in (self.hessian, self.drift, self.shift)
        )
        assert hessian is not None
        known = {damping: each.reordered(order) for damping, each in self._curvatures.items()}
        sample = None if self.sample is None else self.sample[:, order]
        return InputStatistics(hessian, self.tokens, drift, shift, sample, self.wide, known)


@dataclass(frozen=True)
class Target:
    """What a method has to produce: the pattern, and 16 bits or 4 with a group size."""

    pattern: Pattern
    bits: int
    group: int
    damping: float
    mix: float = 0.0  # of the dense model's outputs, 0..1; see solvers/objective.py


@dataclass(frozen=True)
class Pruned:
    """A method's result. `weight` already lies on the 4-bit grid when there are codes."""

    weight: Tensor  # fp32 [N, K], zero where not kept
    keep: Tensor  # bool [N, K]
    codes: Tensor | None = None  # fp32 integers [N, K]
    scale: Tensor | None = None  # fp16 [N, groups]
    note: str = ""


Method = Callable[[Tensor, InputStatistics, Target], Pruned]


def from_mask(weight: Tensor, keep: Tensor, target: Target) -> Pruned:
    """Finish a method that only chooses a mask: drop the rest, round to nearest if 4-bit."""
    if target.bits == 16:
        return Pruned(torch.where(keep, weight, 0), keep)
    codes, scale = round_to_nearest(weight, keep, target.group)
    columns = weight.shape[1]
    return Pruned(codes * expand_groups(scale.float(), target.group, columns), keep, codes, scale)


def relative_error(original: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """||(W - W') X||^2 / ||W X||^2 on the calibration tokens; 0 when the layer saw no signal."""
    difference = original - pruned
    lost = ((difference @ hessian) * difference).sum()
    whole = ((original @ hessian) * original).sum()
    return float(lost / whole) if float(whole) > 0 else 0.0


@dataclass(frozen=True)
class Lost:
    """What some rows lost, per calibration token, and ||W X||^2, which they had."""

    lost: float
    whole: float

    @staticmethod
    def relative(parts: Iterable[Lost]) -> float:
        """What all rows lost, as a part of what was there; 0 when the layer saw no signal."""
        each = list(parts)
        whole = sum(part.whole for part in each)
        return sum(part.lost for part in each) / whole if whole > 0 else 0.0


def mixed_lost(original: Tensor, pruned: Tensor, statistics: InputStatistics, mix: float) -> Lost:
    """The two terms of `relative_error`, against what a method with this `mix` aims at.

    They are ||W (X^ + mix (X - X^)) - W' X^||^2 of ||W X^||^2, X being the dense model's inputs and
    X^ the real ones; `statistics` must hold drift and shift where mix is not 0.
    """
    difference = pruned - original
    lost = ((difference @ statistics.hessian) * difference).sum()
    if mix and statistics.drift is not None and statistics.shift is not None:
        lost -= 2 * mix * ((original @ statistics.drift) * difference).sum()
        lost += mix**2 * ((original @ statistics.shift) * original).sum()
    whole = ((original @ statistics.hessian) * original).sum()
    return Lost(float(lost), float(whole))
