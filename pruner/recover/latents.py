"""What is trained in a linear of each format, and how it becomes a weight and is stored again.

A latent is fp32 [N, K], zero wherever the mask is. Of the formats that store floats it is the
weight. Of those that store codes it is the code before rounding, so that weight = scale x
round(latent): the gradient passes the rounding as if it were not there (straight through), and
the scale, which is trained too, gets the exact gradient at those codes. Learned Step Size
Quantization (Esser et al., 1902.08153) keeps latents in units of the weight instead; in units of
the code nothing is divided, and a scale's gradient is one product and sum. Nothing here relies on
autograd, so that no graph and no copy of a weight is kept. Knows formats and gradients; nothing of
models or steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import HalfweaveError
from ...kernels import nibbles
from ...kernels.formats import Dense, Int4, Int8, PackedLinear, Sparse24, Sparse24Int4
from ..int4 import HIGHEST, LOWEST, to_scale

_WITHIN = 0.49  # how far beyond the last code a latent may be: less than rounds to the next


@dataclass(frozen=True)
class Grid:
    """The levels of a format with codes: code x scale, one scale per row and `group` columns.

    `start` is the stored scale, fp32 [N, groups]; trained is the logarithm of what multiplies it.
    """

    lowest: int
    highest: int
    group: int
    start: Tensor
    log_factor: Tensor

    def scale(self) -> Tensor:
        """fp16 [N, groups]: what is stored, and so what the weights are computed with."""
        return to_scale(self.start * self.log_factor.exp())


@dataclass(frozen=True)
class Latent:
    """The trained state of one linear. Make it with `of`; optimizers change tensors in place.

    Attributes:
        stored: the linear as it was given; its slots and formats never change.
        value: fp32 [N, K], in units of the weight or, with a grid, of the code.
        keep: bool [N, K], the weights that may differ from zero; None when all may.
        grid: of a format with codes, else None.
    """

    stored: PackedLinear
    value: Tensor
    keep: Tensor | None
    grid: Grid | None

    @classmethod
    def of(cls, stored: PackedLinear, near: Tensor | None = None, pruned: bool = False) -> Latent:
        """Start from a stored linear: `write_weight` then gives exactly what it unpacks to.

        Of a `pruned` one the codes that are zero stay so, also in a format without slots.

        `near` are the weights fp32 [N, K] that its codes were rounded from. A latent then lies on
        their side of its code, so that a weight that was close to being rounded otherwise changes
        first; without them all latents are at the middle, where a small rate moves no code.
        """
        grid = _grid(stored)
        value = stored.unpack(torch.float32) if grid is None else _codes(stored)
        value = value.clone(memory_format=torch.contiguous_format)
        if grid is not None and near is not None:
            scale = grid.start
            for (part, columns), (wanted, _) in zip(
                _groups(value, grid.group), _groups(near, grid.group), strict=True
            ):
                aside = wanted / scale[:, columns, None] - part
                part.add_(aside.clamp(-_WITHIN, _WITHIN))
        keep = _kept(stored, pruned)
        if keep is not None:
            value.mul_(keep)
        return cls(stored, value, keep, grid)

    @property
    def slots(self) -> Tensor | None:
        """The mask, where the format says which weights those are; None where their values do.

        Of values that are stored as 0 it would be another one the next time.
        """
        return self.keep if isinstance(self.stored, Sparse24 | Sparse24Int4) else None

    def write_weight(self, out: Tensor) -> None:
        """Put the weight that the latent stands for into `out`, fp32 [N, K].

        A latent beyond the last code is put back to where it just still rounds to that code, so
        that it need not come a long way back.
        """
        if self.grid is None:
            out.copy_(self.value)
            return
        self.value.clamp_(self.grid.lowest - _WITHIN, self.grid.highest + _WITHIN)
        torch.round(self.value, out=out)
        scale = self.grid.scale().float()
        for part, columns in _groups(out, self.grid.group):
            part.mul_(scale[:, columns, None])

    def take_gradient(self, gradient: Tensor, weight: Tensor) -> None:
        """Turn d loss / d weight, which is used up, into the parameters' `.grad`.

        Both are [N, K]; `weight` is what `write_weight` gave for this gradient.
        """
        if self.keep is not None:
            gradient.mul_(self.keep)
        if self.grid is not None:
            scale = self.grid.scale().float()
            # weight = start * exp(log_factor) * codes, so d weight / d log_factor is the weight.
            factor_gradient = torch.empty_like(scale)
            parts = zip(
                _groups(gradient, self.grid.group), _groups(weight, self.grid.group), strict=True
            )
            for (part, columns), (of_weight, _) in parts:
                factor_gradient[:, columns] = torch.linalg.vecdot(part, of_weight)
                part.mul_(scale[:, columns, None])
            self.grid.log_factor.grad = factor_gradient
        self.value.grad = gradient

    def packed(self, name: str) -> PackedLinear:
        """The linear as it will be stored: same format, same slots.

        Raises:
            HalfweaveError: a weight is not finite, or too large for the stored dtype.
        """
        stored = self.stored
        if isinstance(stored, Dense | Sparse24):
            return _as_floats(stored, self.value, name)
        assert self.grid is not None
        scale = self.grid.scale()
        codes = torch.round(self.value).clamp_(self.grid.lowest, self.grid.highest)
        if not bool(torch.isfinite(codes).all() & torch.isfinite(scale).all()):
            raise _not_finite(name)
        if isinstance(stored, Int8):
            return Int8(codes.to(torch.int8), scale)
        if isinstance(stored, Int4):
            return Int4.from_codes(codes, scale, stored.group)
        kept = nibbles.gather_kept(codes, nibbles.unpack_meta(stored.meta, stored.shape[1]))
        values = nibbles.pack_nibbles((kept + 8).to(torch.uint8))
        return Sparse24Int4(values, stored.meta, scale, stored.group)


def _kept(stored: PackedLinear, pruned: bool) -> Tensor | None:
    """The mask, from the stored slots where there are some: a kept weight may well be zero."""
    if isinstance(stored, Sparse24 | Sparse24Int4):
        indices = nibbles.unpack_meta(stored.meta, stored.shape[1])
        return nibbles.scatter_kept(torch.ones_like(indices, dtype=torch.bool), indices)
    if isinstance(stored, Dense):
        keep = stored.weight != 0
        return None if bool(keep.all()) else keep
    return _codes(stored) != 0 if pruned else None


def _grid(stored: PackedLinear) -> Grid | None:
    if isinstance(stored, Int8):
        lowest, highest, group = -128, 127, stored.shape[1]
    elif isinstance(stored, Int4 | Sparse24Int4):
        lowest, highest, group = LOWEST, HIGHEST, stored.group
    else:
        return None
    start = stored.scale.float()
    return Grid(lowest, highest, group, start, torch.zeros_like(start))


def _codes(stored: PackedLinear) -> Tensor:
    """Codes fp32 [N, K]: what the format unpacks to with every scale at one."""
    assert isinstance(stored, Int8 | Int4 | Sparse24Int4)
    return replace(stored, scale=torch.ones_like(stored.scale)).unpack(torch.float32)


def _groups(matrix: Tensor, group: int) -> Iterator[tuple[Tensor, slice]]:
    """Views [N, some, width] of a matrix [N, K], and which scales they go with.

    The whole groups are one view; a shorter last one is another.
    """
    columns = matrix.shape[1]
    whole = columns // group
    if whole:
        yield matrix[:, : whole * group].unflatten(1, (whole, group)), slice(0, whole)
    if columns % group:
        yield matrix[:, whole * group :].unsqueeze(1), slice(whole, whole + 1)


def _as_floats(stored: Dense | Sparse24, value: Tensor, name: str) -> Dense | Sparse24:
    dtype = stored.weight.dtype if isinstance(stored, Dense) else stored.values.dtype
    cast = value.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise _not_finite(name)
    if isinstance(stored, Dense):
        return Dense(cast)
    indices = nibbles.unpack_meta(stored.meta, stored.shape[1])
    return Sparse24(nibbles.gather_kept(cast, indices).contiguous(), stored.meta)


def _not_finite(name: str) -> HalfweaveError:
    return HalfweaveError(
        f"{name}: a trained weight is not finite or too large to be stored",
        "train with a lower learning rate",
    )
