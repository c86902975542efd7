"""All windows' way through one block, stage by stage, and what is learnt of its linears' inputs.

Every pass waits where it was observed last, so that a block whose stages are pruned one behind the
other is computed once; as many as there is memory for, the others start anew. What is observed is
the same bits either way. Knows activations and Hessians; knows nothing of masks or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn

from ..kernels.device import available_memory_bytes
from .methods.base import InputStatistics
from .pausing import PausingPass, stops
from .solvers.wide import SAMPLED_FROM, SAMPLED_TOKENS, WIDE, add_gram, mirror
from .stream import BlockStream
from .tasks import Tasks

_SPARE = 4  # passes that wait may hold one part in so many of the memory that is left


@dataclass(frozen=True)
class Observation:
    """Statistics of one linear's inputs, and of those windows that pruning must not learn from."""

    fit: InputStatistics
    check: InputStatistics | None

    def reordered(self, order: Tensor) -> Observation:
        """The same for inputs in the order `order` [K]."""
        check = None if self.check is None else self.check.reordered(order)
        return Observation(self.fit.reordered(order), check)


@dataclass(frozen=True)
class _Batch:
    """Some windows, and their passes through the block and through the one that it was."""

    windows: slice
    judging: bool
    ours: PausingPass
    dense: PausingPass | None
    waits: bool


class Walk:
    """The way of a stream's windows through one block; a context manager.

    Weights may change between two calls, if only behind what was observed.
    """

    def __init__(
        self,
        stream: BlockStream,
        block: nn.Module,
        parent: nn.Module | None = None,
        waits: bool = True,
    ) -> None:
        """`parent`, for a parallel stream, is the block as it was.

        Without `waits` every call begins at the block's input.
        """
        self._stream, self._block, self._parent = stream, block, parent
        self._firsts = [stage[0] for stage in stream.family.observed]
        self._batches = self._passes(self._waiting() if waits else 0.0)
        self._stops = ExitStack()

    def __enter__(self) -> Walk:
        for module in (self._block, self._parent):
            if module is not None:
                found = [module.get_submodule(name) for name in self._firsts]
                self._stops.enter_context(stops(found))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for batch in self._batches:
            _drop(batch)
        self._stops.close()

    @torch.no_grad()
    def observe(
        self, stages: Sequence[Sequence[str]], drift: bool = True
    ) -> dict[str, Observation]:
        """Run every window on to the linears of some stages, for the statistics of their inputs.

        Linears of one stage share theirs. With a parent, `drift` from it is observed too, but not
        of experts: the parent's router may have sent them other tokens.

        Raises:
            CheckpointError: the block calls one of them never, or before one observed earlier.
        """
        firsts = [stage[0] for stage in stages]
        tasks = self._stream.tasks
        sums = {judging: [_Sums(judging, tasks) for _ in firsts] for judging in (False, True)}
        for batch in self._batches:
            for first, total in zip(firsts, sums[batch.judging], strict=True):
                dense = None
                routed = self._stream.family.is_routed(first)
                if drift and not routed and batch.dense is not None and self._parent is not None:
                    dense = batch.dense.until(self._parent.get_submodule(first))
                total.add(batch.ours.until(self._block.get_submodule(first)), dense)
            if not batch.waits:
                _drop(batch)
        found: dict[str, Observation] = {}
        for stage, fit, check in zip(stages, sums[False], sums[True], strict=True):
            seen = Observation(fit.result(), check.result() if check.tokens else None)
            found |= dict.fromkeys(stage, seen)
        return found

    @torch.no_grad()
    def finish(self, anew: bool = False) -> None:
        """Run every window to the block's end: the stream then holds what enters the next one.

        `anew` begins at the block's input, for a block that changed where passes have been.
        """
        for batch in self._batches:
            if anew:
                batch.ours.drop()
            self._stream.hidden[batch.windows].copy_(batch.ours.output())
            if batch.dense is not None and self._stream.dense is not None:
                self._stream.dense[batch.windows].copy_(batch.dense.output())

    def _waiting(self) -> float:
        """The share of passes that may wait."""
        windows, length, hidden = self._stream.hidden.shape
        widest = max(max(weight.shape) for weight in self._block.parameters())
        copies = 1 if self._parent is None else 2
        needed = waiting_bytes(windows * length, (hidden, widest), copies)
        return waiting_share(needed, self._stream.hidden.device)

    def _passes(self, share: float) -> list[_Batch]:
        stream, parts = self._stream, self._stream.batches()
        waiting = int(share * len(parts))
        return [
            _Batch(
                windows,
                judging,
                PausingPass(partial(stream.run, self._block, stream.hidden[windows])),
                None
                if self._parent is None or stream.dense is None
                else PausingPass(partial(stream.run, self._parent, stream.dense[windows])),
                index < waiting,
            )
            for index, (windows, judging) in enumerate(parts)
        ]


class _Sums:
    """X^T X of the inputs it is given, in fp32, and their drift from the dense model's.

    Of wide inputs only the upper triangle is summed, and no drift; of many inputs some are kept.
    """

    def __init__(self, judging: bool, tasks: Tasks) -> None:
        self._judging = judging
        self.tokens = 0
        self._gram, self._drift, self._shift = (_Total(tasks) for _ in range(3))
        self._wide: Tensor | None = None
        self._sample: list[Tensor] = []

    def add(self, seen: Tensor, dense: Tensor | None) -> None:
        x = seen.float().flatten(0, -2)
        if x.shape[1] >= SAMPLED_FROM and self.tokens < SAMPLED_TOKENS:
            self._sample.append(x[: SAMPLED_TOKENS - self.tokens].clone())
        self.tokens += len(x)
        if x.shape[1] >= WIDE:
            self._add_wide(x)
            return
        self._gram.add(x, x)
        if dense is None:
            return
        difference = dense.flatten(0, -2) - x
        self._drift.add(difference, x)
        if self._judging:  # only a judge needs to know how far the target itself is
            self._shift.add(difference, difference)

    def _add_wide(self, x: Tensor) -> None:
        if self._wide is None:
            self._wide = x.new_zeros(x.shape[1], x.shape[1])
        add_gram(self._wide, x)

    def result(self) -> InputStatistics:
        """Per token; to be asked for once, since the sums are divided where they are."""
        tokens = max(self.tokens, 1)  # no token at all may have reached an expert
        sample = torch.cat(self._sample) if self._sample else None
        if self._wide is not None:
            mirror(self._wide.div_(tokens))
            return InputStatistics(self._wide, self.tokens, sample=sample, wide=True)
        gram, drift, shift = (
            None if total is None else total.div_(tokens)
            for total in (self._gram.sum(), self._drift.sum(), self._shift.sum())
        )
        assert gram is not None, "no window was observed"
        return InputStatistics(gram, self.tokens, drift, shift, sample)


class _Total:
    """A sum of A^T B, always in the order of `add`, whoever multiplies."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._ahead = 2 * tasks.workers if tasks.workers > 1 else 0
        self._pending: list[Callable[[], Tensor]] = []
        self._sum: Tensor | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        """Ask for one more product; few are on their way at a time."""
        self._pending.append(self._tasks.submit(_product, a, b))
        if len(self._pending) > self._ahead:
            self._take()

    def sum(self) -> Tensor | None:
        """The whole; None of nothing."""
        while self._pending:
            self._take()
        return self._sum

    def _take(self) -> None:
        product = self._pending.pop(0)()
        self._sum = product if self._sum is None else self._sum.add_(product)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a.T @ b


def _drop(batch: _Batch) -> None:
    batch.ours.drop()
    if batch.dense is not None:
        batch.dense.drop()


def waiting_bytes(tokens: int, widths: tuple[int, int], copies: int) -> int:
    """What passes hold that wait: a residual, a norm, heads or an intermediate state.

    `widths` are those of the hidden state and of the widest linear; `copies` is 2 where the dense
    model goes along.
    """
    hidden, widest = widths
    return 4 * copies * tokens * (3 * hidden + widest)


def waiting_share(needed: int, device: torch.device, used: int = 0) -> float:
    """Which share of a block's passes, from 0 to 1, may wait if all together hold `needed` bytes.

    `used` bytes of the memory that is left are spoken for.
    """
    available = available_memory_bytes(device)
    return 1.0 if available is None else min(1.0, max(0, available - used) / _SPARE / needed)
