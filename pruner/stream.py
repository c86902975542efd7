"""Walks a model block by block, holding one block and the activations that enter it.

The forward pass is transformers' own block, so that what is pruned is exactly what the model
computes. Knows activations and Hessians; knows nothing of masks or files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .families import Family
from .methods.base import InputStatistics
from .source import Source

TOKENS_PER_BATCH = 4096


class _FirstBlockReached(Exception):  # noqa: N818 - a signal, not an error
    """Carries the first block's arguments out of the model's forward pass."""

    def __init__(self, hidden: Tensor, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.hidden = hidden
        self.arguments = arguments


class _SeenEnough(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass once the last input that was asked for has been seen."""


class _Catcher(nn.Module):
    def forward(self, hidden: Tensor, *args: Any, **arguments: Any) -> Tensor:
        raise _FirstBlockReached(hidden, arguments)


@dataclass(frozen=True)
class Observation:
    """Statistics of one linear's inputs, and of those windows that pruning must not learn from."""

    fit: InputStatistics
    check: InputStatistics | None


class BlockStream:
    """The blocks of one model over a fixed set of token windows.

    `hidden` holds the activations that enter the current block, fp32 [windows, length, hidden].
    The last `held_out` windows are only ever observed apart. With `parallel`, the dense model's own
    activations go along, so that drift from them can be observed too.
    """

    def __init__(
        self, source: Source, windows: Tensor, held_out: int = 0, parallel: bool = False
    ) -> None:
        """Embed `windows` [n, length] on the source's device; reads the embedding only.

        Raises:
            CheckpointError: the embedding is missing or does not fit the config.
        """
        self._source, self._device = source, source.device
        self._family: Family = source.family
        self._skeleton = skeleton(source)
        self._blocks = list(self._skeleton.get_submodule(self._family.blocks).children())
        self.hidden, self._arguments = self._embed(windows)
        self._batch = max(1, TOKENS_PER_BATCH // windows.shape[1])
        self._fitted = len(windows) - held_out
        self._dense = self.hidden.clone() if parallel else None

    @torch.no_grad()
    def _embed(self, windows: Tensor) -> tuple[Tensor, dict[str, Any]]:
        name = f"{self._family.embedding}.weight"
        embedding = self._skeleton.get_submodule(self._family.embedding)
        _load(embedding, {"weight": self._source.tensors.read(name).to(self._device)}, name)
        parent, _, child = self._family.blocks.rpartition(".")
        setattr(self._skeleton.get_submodule(parent), child, nn.ModuleList([_Catcher()]))
        try:
            self._skeleton(input_ids=windows.to(self._device), use_cache=False)
        except _FirstBlockReached as reached:
            embedding.to_empty(device="meta")
            return reached.hidden.float(), reached.arguments
        raise CheckpointError(f"{self._source.path}: the model has no blocks")

    def load_block(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The block's module in fp32, filled with `tensors` (full names; NaN and inf become 0).

        Raises:
            CheckpointError: a tensor is missing, unexpected, or of another shape.
        """
        return self._filled(self._blocks[index], index, tensors)

    def load_copy(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """As `load_block`, a module of its own."""
        return self._filled(copy.deepcopy(self._blocks[index]), index, tensors)

    def _filled(self, block: nn.Module, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        prefix = self._family.block_prefix(index)
        finite = {
            name.removeprefix(prefix): torch.nan_to_num(tensor.float(), posinf=0.0, neginf=0.0)
            for name, tensor in ((name, t.to(self._device)) for name, t in tensors.items())
        }
        _load(block, finite, prefix.rstrip("."))
        return block.requires_grad_(False)

    def drop_block(self, index: int) -> None:
        """Give a block's memory back."""
        self._blocks[index].to_empty(device="meta")

    @torch.no_grad()
    def observe(
        self, block: nn.Module, stages: Sequence[Sequence[str]], parent: nn.Module | None = None
    ) -> dict[str, Observation]:
        """Run the block on `hidden`, as far as needed, for the inputs of the linears in `stages`.

        Linears of one stage share their statistics. `parent`, the block as it was, is what drift
        is measured from; the stream must be parallel.
        """
        fitted, held_out = slice(0, self._fitted), slice(self._fitted, None)
        fit = self._statistics(block, stages, fitted, parent, judging=False)
        check: Sequence[InputStatistics | None] = [None] * len(stages)
        if self._fitted < len(self.hidden):
            check = self._statistics(block, stages, held_out, parent, judging=True)
        return {
            name: Observation(ours, theirs)
            for stage, ours, theirs in zip(stages, fit, check, strict=True)
            for name in stage
        }

    def _statistics(
        self,
        block: nn.Module,
        stages: Sequence[Sequence[str]],
        part: slice,
        parent: nn.Module | None,
        judging: bool,
    ) -> list[InputStatistics]:
        names = [stage[0] for stage in stages]
        dense = [_Recorder(name is names[-1]) for name in names] if parent is not None else None
        collectors = [
            _HessianCollector(name is names[-1], dense[i] if dense else None, judging)
            for i, name in enumerate(names)
        ]
        batches = self.hidden[part].split(self._batch)
        parallel = batches if self._dense is None else self._dense[part].split(self._batch)
        for batch, dense_batch in zip(batches, parallel, strict=True):
            if parent is not None and dense:
                self._run_until(parent, dense_batch, names, dense)
            self._run_until(block, batch, names, collectors)
        return [collector.result() for collector in collectors]

    def _run_until(
        self, block: nn.Module, batch: Tensor, names: Sequence[str], hooks: Sequence[_Hook]
    ) -> None:
        """Run the block with a hook on each linear's input, no further than the hooks want."""
        handles = [
            block.get_submodule(name).register_forward_pre_hook(hook)
            for name, hook in zip(names, hooks, strict=True)
        ]
        try:
            self.run(block, batch)
        except _SeenEnough:
            pass
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def advance(self, block: nn.Module, parent: nn.Module | None = None) -> None:
        """Replace `hidden` by the block's outputs, in place; and the dense model's, by `parent`."""
        for batch in self.hidden.split(self._batch):
            batch.copy_(self.run(block, batch))
        if self._dense is not None and parent is not None:
            for batch in self._dense.split(self._batch):
                batch.copy_(self.run(parent, batch))

    @torch.no_grad()
    def outputs(self, parent: nn.Module) -> Tensor:
        """What the dense model's block gives on the dense model's activations, as `hidden`."""
        assert self._dense is not None, "the stream is not parallel"
        return torch.cat([self.run(parent, batch) for batch in self._dense.split(self._batch)])

    def run(self, block: nn.Module, batch: Tensor) -> Tensor:
        """One forward pass of the block on [n, length, hidden]."""
        output = block(batch, **self._arguments)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


class _Recorder:
    """A forward hook that holds the last input it saw."""

    def __init__(self, last: bool) -> None:
        self.seen: Tensor | None = None
        self._last = last

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen = args[0].flatten(0, -2)
        if self._last:
            raise _SeenEnough


class _HessianCollector:
    """A forward hook that sums X^T X of the inputs it sees, in fp32, and their drift."""

    def __init__(self, last: bool, dense: _Recorder | None, judging: bool) -> None:
        self._sum: Tensor | None = None
        self._drift: Tensor | None = None
        self._shift: Tensor | None = None
        self._tokens = 0
        self._last = last
        self._dense = dense
        self._judging = judging

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().float().flatten(0, -2)
        if self._sum is None:
            self._sum = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        self._sum.addmm_(x.T, x)
        self._tokens += len(x)
        if self._dense is not None and self._dense.seen is not None:
            self._compare(self._dense.seen, x)
        if self._last:
            raise _SeenEnough

    def _compare(self, dense: Tensor, x: Tensor) -> None:
        if self._drift is None or self._shift is None:
            self._drift, self._shift = (x.new_zeros(x.shape[1], x.shape[1]) for _ in range(2))
        difference = dense - x
        self._drift.addmm_(difference.T, x)
        if self._judging:  # only a judge needs to know how far the target itself is
            self._shift.addmm_(difference.T, difference)

    def result(self) -> InputStatistics:
        if self._sum is None:
            raise CheckpointError("a linear of the block was never called")
        drift, shift = (
            None if total is None else total / self._tokens for total in (self._drift, self._shift)
        )
        return InputStatistics(self._sum / self._tokens, self._tokens, drift, shift)


_Hook = _Recorder | _HessianCollector


def skeleton(source: Source) -> nn.Module:
    """The model without any weights; only its rotary table, which is no weight, is real.

    Raises:
        CheckpointError: transformers does not take its config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
            )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{source.path / 'config.json'} is not usable: {error}") from error
    inner = model.get_submodule(source.family.blocks.partition(".")[0])
    if hasattr(inner, "rotary_emb"):
        inner.rotary_emb = type(inner.rotary_emb)(config=config).to(source.device)
    built: nn.Module = model.eval()
    return built


def _load(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    try:
        module.load_state_dict(
            {name: tensor.float() for name, tensor in tensors.items()}, strict=True, assign=True
        )
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise CheckpointError(f"{where} does not fit config.json: {detail[:400]}") from error
