"""KL(dense || student) over the whole vocabulary, without logits of more than a few positions.

The output head is frozen, so the gradient with respect to the student's final hidden state is
(p_student - p_dense) @ head and is computed in the forward pass, a chunk of positions at a time;
nothing of [positions, vocabulary] outlives its chunk. Knows hidden states and heads, not models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits held at a time: two fp32 matrices of about this many elements each.
_CHUNK_ELEMENTS = 8 * 2**20


class _FusedKL(torch.autograd.Function):
    """Sum over positions; the gradient is ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        dense: Tensor,
        heads: tuple[Tensor, Tensor],
        targets: Tensor,
        ce: float,
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(student)
        kl, nll = (student.new_zeros((), dtype=torch.float64) for _ in range(2))
        rows = max(1, _CHUNK_ELEMENTS // heads[0].shape[0])
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            kl_part, nll_part, gradient[part] = _chunk(
                student[part], dense[part], heads, targets[part], ce
            )
            kl += kl_part
            nll += nll_part
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(nll)
        return kl + ce * nll, nll

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None


def fused_kl(
    student: Tensor, dense: Tensor, heads: tuple[Tensor, Tensor], targets: Tensor, ce: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sums over positions of KL + ce * cross entropy, and of the cross entropy: two fp64 scalars.

    Args:
        student: final hidden states after the final norm [positions, hidden]; gets the gradient.
        dense: the parent's, same shape; no gradient.
        heads: output matrices [vocabulary, hidden] of the student and of the parent; no gradient.
            Products with them are taken in their dtype, everything else in the hidden states'.
        targets: int64 [positions], the next token or a negative number where there is none.
        ce: weight of the cross entropy.
    """
    loss, nll = _FusedKL.apply(student, dense, heads, targets, ce)
    return loss, nll


def _chunk(
    student: Tensor, dense: Tensor, heads: tuple[Tensor, Tensor], targets: Tensor, ce: float
) -> tuple[Tensor, Tensor, Tensor]:
    """KL, cross entropy (sums) and d/d student of their weighted sum, for some positions."""
    logits, truth = (
        (hidden.to(head.dtype) @ head.T).to(hidden.dtype)
        for hidden, head in zip((student, dense), heads, strict=True)
    )
    has_target = targets >= 0
    picked = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    student_lse, dense_lse = logits.logsumexp(1), truth.logsumexp(1)
    nll = ((student_lse - picked) * has_target).sum(dtype=torch.float64)
    p_dense = (truth - dense_lse[:, None]).exp_()
    gap = torch.linalg.vecdot(p_dense, truth.sub_(logits))
    kl = (gap - dense_lse + student_lse).sum(dtype=torch.float64)
    p_student = logits.sub_(student_lse[:, None]).exp_()
    difference = p_student.sub_(p_dense) if ce == 0 else _with_ce(p_student, p_dense, targets, ce)
    return kl, nll, (difference.to(heads[0].dtype) @ heads[0]).to(student.dtype)


def _with_ce(p_student: Tensor, p_dense: Tensor, targets: Tensor, ce: float) -> Tensor:
    weight = ce * (targets >= 0).to(p_student.dtype)
    difference = (p_student * (1 + weight)[:, None]).sub_(p_dense)
    difference.scatter_add_(1, targets.clamp_min(0)[:, None], -weight[:, None])
    return difference
