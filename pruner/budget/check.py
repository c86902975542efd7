"""Whether a finished checkpoint keeps to its budget: measured on its own files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ...kernels.shards import ShardedTensors
from ...runtime.checkpoint import Checkpoint
from ..recipe import Recipe
from ..source import Source
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
    losses = window_losses(served, judge, _reader(checkpoint, parent))
    ratio = Ratio.of(losses, dense, judge.shape[1])
    share = checkpoint.weight_bytes / bytes_before(parent)
    small = not recipe.target_bytes or share <= recipe.target_bytes
    good = not recipe.max_ppl_ratio or ratio.value <= recipe.max_ppl_ratio
    return BudgetCheck(ratio.value, ratio.error, share, small and good)


def _reader(checkpoint: Checkpoint, parent: Source) -> Callable[[int], dict[str, Tensor]]:
    """Reads blocks of a packed checkpoint, linears unpacked."""

    def read(index: int) -> dict[str, Tensor]:
        tensors = {}
        linears = {f"{name}.weight": name for name in parent.linear_names(index)}
        prefix = parent.family.block_prefix(index)
        for name in (n for n in parent.tensors.names() if n.startswith(prefix)):
            packed = checkpoint.linear(linears[name]) if name in linears else None
            tensors[name] = checkpoint.tensor(name) if packed is None else packed.unpack()
        return tensors

    return read
