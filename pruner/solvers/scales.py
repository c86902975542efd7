"""Scales of the 4-bit grid: searched for the kept weights, then refitted to the codes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.groups import expand_groups, group_count
from ..int4 import encode, to_scale
from .objective import Objective

_SHARES = [0.5 + 0.02 * step for step in range(36)]  # of max|w| / 7: 0.50 .. 1.20


def search_scales(weight: Tensor, keep: Tensor, importance: Tensor, group: int) -> Tensor:
    """Scale fp16 [N, groups] that rounds the kept weights [N, K] with least weighted error.

    The error is sum_j importance_j (q(w_j) - w_j)^2 over kept weights, `importance` [K] being the
    Hessian's diagonal. Scales are rounded to fp16 before anything is coded with them.
    """
    rows, columns = weight.shape
    groups = group_count(columns, group)
    padded = groups * group - columns
    kept = torch.nn.functional.pad(torch.where(keep, weight, 0), (0, padded))
    cost = torch.nn.functional.pad(importance, (0, padded)).view(1, groups, group)
    kept = kept.view(rows, groups, group)
    largest = kept.abs().amax(dim=-1)
    best = to_scale(largest / 7)
    least = torch.full_like(largest, torch.inf)
    for share in _SHARES:
        scale = to_scale(share * largest / 7)
        wide = scale.float().unsqueeze(-1)
        error = ((encode(kept, wide) * wide - kept).square_() * cost).sum(dim=-1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def refit_scales(objective: Objective, codes: Tensor, scale: Tensor, group: int) -> Tensor:
    """The best scales [N, groups] for fixed codes [N, K]: a small exact solve per row.

    With c_g the codes of group g, the scales solve A s = b, A_gh = c_g H_gh c_h, b_g = <c_g, B_g>.
    Rows whose solution has a scale that is not positive, or that fp16 rounding made worse, keep
    theirs.
    """
    rows, columns = codes.shape
    groups = group_count(columns, group)
    system = codes.new_empty(rows, groups, groups)
    for g in range(groups):
        part = slice(g * group, min((g + 1) * group, columns))
        system[:, g] = _group_sums((codes[:, part] @ objective.hessian[part]) * codes, group)
    wanted = _group_sums(codes * objective.linear, group)
    # A group without a code has no say; a one on its diagonal keeps the system solvable.
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal += torch.where(diagonal > 0, 1e-6 * diagonal, 1)
    solved, failed = torch.linalg.solve_ex(system, wanted)
    solved = torch.where(wanted == 0, scale.float(), solved)
    legal = (failed == 0) & (solved > 0).all(dim=1)
    fresh = torch.where(legal[:, None], to_scale(solved), scale)
    old, new = (
        objective.value(codes * expand_groups(s.float(), group, columns)) for s in (scale, fresh)
    )
    return torch.where((new < old)[:, None], fresh, scale)


def _group_sums(values: Tensor, group: int) -> Tensor:
    """Sums over groups of columns: [N, K] to [N, groups]."""
    rows, columns = values.shape
    groups = group_count(columns, group)
    padded = torch.nn.functional.pad(values, (0, groups * group - columns))
    return padded.view(rows, groups, group).sum(dim=-1)
