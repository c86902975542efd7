"""Whether a finished checkpoint keeps to its budget: measured on its own files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ...kernels.shards import ShardedTensors
from ...runtime.checkpoint import Checkpoint
from ..recipe import Recipe
from ..source import Source, Trained
from .perplexity import Ratio, window_losses
from .sizes import bytes_before


@dataclass(frozen=True)
class BudgetCheck:
    """A checkpoint's perplexity over its parent's, its share of the bytes, and the verdict.

    `error` is the standard error of the ratio's logarithm.
    """

    ratio: float
    error: float
    share_of_bytes: float
    met: bool


def check_budget(
    out: Path, parent: Source, recipe: Recipe, judge: Tensor, dense: list[float] | None = None
) -> BudgetCheck:
    """Measure the finished checkpoint `out` on the windows `judge` [n, length].

    `dense` are the parent's losses on them, if they are known. Memory stays at one block.

    Raises:
        CheckpointError: `out` is incomplete or damaged.
    """
    checkpoint = Checkpoint.open(out)
    if dense is None:
        dense = window_losses(parent, judge, parent.block_tensors)
    served = replace(parent, tensors=ShardedTensors.open(out))
    losses = window_losses(served, judge, Trained.of(parent, checkpoint).block_tensors)
    ratio = Ratio.of(losses, dense, judge.shape[1])
    share = checkpoint.weight_bytes / bytes_before(parent)
    small = not recipe.target_bytes or share <= recipe.target_bytes
    good = not recipe.max_ppl_ratio or ratio.value <= recipe.max_ppl_ratio
    return BudgetCheck(ratio.value, ratio.error, share, small and good)
