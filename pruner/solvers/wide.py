"""Hessians so wide that a second one would not fit: summed by panels, factorized where they lie.

SparseGPT needs U, upper triangular, with U^T U = H^-1. The usual way there inverts H and takes two
Cholesky factors, with a copy of H for each. But where H = R R^T with R upper triangular (a Cholesky
factorization that begins at the last column), U = R^-1. Both steps go block by block in the upper
triangle of H itself, and take half of the operations: 2/3 K^3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .objective import LADDER

WIDE = 16384  # inputs from which on a Hessian is a gigabyte
# From so many inputs on a linear's error is told on so many tokens.
SAMPLED_FROM, SAMPLED_TOKENS = 8192, 1024
_BLOCK = 2048


def add_gram(total: Tensor, x: Tensor, block: int = _BLOCK) -> None:
    """Add x^T x to the upper triangle of `total` [K, K], and what is below is not to be used."""
    for part in _parts(len(total), block):
        total[part, part.start :].addmm_(x[:, part].T, x[:, part.start :])


def mirror(matrix: Tensor, block: int = _BLOCK) -> None:
    """Make a matrix symmetric by its upper triangle."""
    for part in _parts(len(matrix), block):
        diagonal = matrix[part, part]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
        matrix[part.stop :, part].copy_(matrix[part, part.stop :].T)


def factorize(hessian: Tensor, damping: float, block: int = _BLOCK) -> float | None:
    """Turn symmetric `hessian` [K, K] into U with U^T U = (H + damping * mean(diag H) * I)^-1.

    Only the upper triangle is U; the lower one stays H's. Inputs that are always zero get a one on
    the diagonal. Returns the damping that it took, which rises tenfold, up to three times; None
    where no damping of the ladder is enough.
    """
    diagonal = hessian.diagonal().clone()
    diagonal[diagonal == 0] = 1
    mean = diagonal.mean()
    for step in range(LADDER):
        raised = damping * 10.0**step
        hessian.diagonal().copy_(diagonal + raised * mean)
        if _reverse_cholesky(hessian, block) and _invert(hessian, block):
            return raised
        _restore(hessian, block)
    return None


def _parts(count: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, count)) for start in range(0, count, block)]


def _reverse_cholesky(matrix: Tensor, block: int) -> bool:
    """H = R R^T, R upper triangular, from the last block to the first."""
    parts = _parts(len(matrix), block)
    for j in range(len(parts) - 1, -1, -1):
        last = parts[j]
        lower, failed = torch.linalg.cholesky_ex(matrix[last, last].triu().flip(0, 1))
        if int(failed):
            return False
        corner = lower.flip(0, 1)
        _put_upper(matrix, last, corner)
        above = matrix[: last.start, last]
        above.copy_(torch.linalg.solve_triangular(corner.T, above, upper=False, left=False))
        for i in parts[:j]:
            matrix[i, i].sub_((above[i] @ above[i].T).triu())  # what is below stays
            matrix[i, i.stop : last.start].sub_(above[i] @ above[i.stop :].T)
    return True


def _invert(matrix: Tensor, block: int) -> bool:
    """R to R^-1 in the upper triangle, from the first block to the last."""
    for part in _parts(len(matrix), block):
        corner = matrix[part, part].triu()
        inverse = torch.linalg.solve_triangular(
            corner, torch.eye(len(corner), device=corner.device), upper=True
        )
        _put_upper(matrix, part, inverse)
        above = -(matrix[: part.start, part] @ inverse)
        for i in _parts(part.start, block):
            # Rows of U above are final from the first one on: nothing that is read was written.
            first = matrix[i, i].triu() @ above[i]
            rest = matrix[i, i.stop : part.start] @ above[i.stop :]
            matrix[i, part].copy_(first + rest)
    return bool(torch.isfinite(matrix.diagonal()).all())


def _put_upper(matrix: Tensor, part: slice, corner: Tensor) -> None:
    """Only the upper triangle of a block on the diagonal: what is below stays."""
    here = matrix[part, part]
    here.copy_(corner.triu() + here.tril(-1))


def _restore(matrix: Tensor, block: int) -> None:
    """Symmetric again by its lower triangle; the diagonal is the caller's to set."""
    for part in _parts(len(matrix), block):
        corner = matrix[part, part]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        matrix[part, part.stop :].copy_(matrix[part.stop :, part].T)
