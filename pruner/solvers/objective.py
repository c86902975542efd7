"""The one quadratic that every step of our method lowers.

For a linear W with calibration inputs X^ (what the pruned model really feeds it) the error of a
replacement V is, up to a constant and with H = X^T X^ / tokens,

    f(V) = 1/2 tr(V H V^T) - tr(V B^T),   B = W (H + mix * drift),

where drift = (X - X^)^T X^ / tokens says how far the inputs have moved from X, those of the dense
model: mix 0 asks V to repeat W on today's inputs, mix 1 to repeat the dense model's outputs. H is
damped first, so a column that never saw a signal keeps its weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...errors import HalfweaveError

LADDER = 4  # damping, then up to three times ten times more


@dataclass(frozen=True)
class Spectrum:
    """The decomposition of H / (n n^T)."""

    values: Tensor  # [K]
    vectors: Tensor  # [K, K], one per column
    norm: Tensor  # n [K], the root of H's diagonal


@dataclass(frozen=True)
class Curvature:
    """A damped, positive definite Hessian. Linears that read the same input share one, since its
    decompositions are most of the cost of a linear with few rows.
    """

    matrix: Tensor  # [K, K] fp32
    damping: float  # what it took

    @cached_property
    def spectrum(self) -> Spectrum:
        """The unit-diagonal form, decomposed in fp64."""
        norm = self.matrix.diagonal().double().sqrt()
        values, vectors = torch.linalg.eigh(self.matrix.double() / torch.outer(norm, norm))
        return Spectrum(values.float(), vectors.float(), norm.float())

    @cached_property
    def diagonal(self) -> Tensor:
        """Of the matrix, [K]."""
        return self.matrix.diagonal().contiguous()

    def reordered(self, order: Tensor) -> Curvature:
        """The same for inputs in the order `order` [K]; what was decomposed is not again."""
        moved = Curvature(self.matrix[order][:, order].contiguous(), self.damping)
        spectrum = vars(self).get("spectrum")
        if spectrum is not None:
            vectors, norm = spectrum.vectors[order].contiguous(), spectrum.norm[order]
            vars(moved)["spectrum"] = Spectrum(spectrum.values, vectors, norm)
        return moved


class IndefiniteError(HalfweaveError):
    """A Hessian that cannot be made positive definite: the inputs are not usable."""


def damp(hessian: Tensor, damping: float) -> Curvature:
    """`hessian` [K, K], damped until it is positive definite.

    Half of `damping` is relative to the mean of the diagonal, half to each entry, so that quiet
    and loud inputs are both held.

    Raises:
        IndefiniteError: no damping of the ladder is enough.
    """
    diagonal = hessian.diagonal()
    floor = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    for step in range(LADDER):
        raised = damping * 10**step
        damped = hessian + torch.diag(0.5 * raised * (floor + diagonal))
        if int(torch.linalg.cholesky_ex(damped.double())[1]) == 0:
            return Curvature(damped, raised)
    raise IndefiniteError(
        f"the Hessian of a linear with {len(hessian)} inputs is not positive definite, even with "
        f"damping {raised:g}",
        "calibrate on more or other text, or raise --damping",
    )


@dataclass(frozen=True)
class Objective:
    """f(V) = 1/2 tr(V H V^T) - tr(V B^T) for V [N, K]."""

    curvature: Curvature
    linear: Tensor  # B, [N, K] fp32

    @property
    def hessian(self) -> Tensor:
        """H, [K, K] fp32."""
        return self.curvature.matrix

    def value(self, weight: Tensor) -> Tensor:
        """f of each row, [N]."""
        return (weight * (0.5 * (weight @ self.hessian) - self.linear)).sum(dim=1)

    def gradient(self, weight: Tensor) -> Tensor:
        """V H - B, [N, K]."""
        return weight @ self.hessian - self.linear


def make_objective(
    weight: Tensor, curvature: Curvature, drift: Tensor | None = None, mix: float = 0.0
) -> Objective:
    """The objective of replacing `weight` [N, K]."""
    target = curvature.matrix if drift is None else curvature.matrix + mix * drift
    return Objective(curvature, weight @ target)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with U^T U = H^-1, [K, K] fp32, computed in fp64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor
