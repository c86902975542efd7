"""Walks a model block by block, holding one block and the activations that enter it.

The forward pass is transformers' own block, so that what is pruned is exactly what the model
computes. Knows activations; knows nothing of what is learnt from them, of masks or files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .modules import adapt
from .source import Source
from .spill import states

_TOKENS_PER_BATCH, _STATES_PER_BATCH = 4096, 2**26


@dataclass(frozen=True)
class _Call:
    """What a block is called with beside its hidden states: masks, positions, and the like."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _LastBlockReached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a model's forward pass once all blocks have been called."""


class BlockStream:
    """The blocks of one model over a fixed set of token windows.

    `hidden` holds the activations that enter the current block, fp32 [windows, length, hidden].
    The last `held_out` windows never share a batch with others. With `parallel`, `dense` holds the
    dense model's own activations, so that drift from them can be observed too.
    """

    def __init__(
        self,
        source: Source,
        windows: Tensor,
        held_out: int = 0,
        parallel: bool = False,
        scratch: Path | None = None,
    ) -> None:
        """Embed `windows` [n, length] on the source's device; reads nothing of the blocks.

        Large activations go to files in `scratch`, if there is one.

        Raises:
            CheckpointError: the embedding is missing or does not fit the config.
        """
        self._source, self._device = source, source.device
        self.family, self.tasks = source.family, source.tasks
        model = skeleton(source)
        self._blocks = list(model.get_submodule(self.family.blocks).children())
        self._indices: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        widest = max(max(weight.shape) for weight in self._blocks[0].parameters())
        self._batch = max(1, tokens_per_batch(widest) // windows.shape[1])
        self._fitted = len(windows) - held_out
        self._calls: dict[int, list[_Call]] = {}
        self._scratch = scratch
        self.hidden = self._embed(model, windows)
        self.dense = None
        if parallel:
            self.dense = states(tuple(self.hidden.shape), self._device, scratch)
            self.dense.copy_(self.hidden)

    @torch.no_grad()
    def _embed(self, model: nn.Module, windows: Tensor) -> Tensor:
        """What enters the first block; notes what all are called with, for each size of a batch."""
        inner: Any = model.get_submodule(self.family.inner)
        self._load_outside(inner)
        first, self._calls[1] = self._calls_of(inner, windows[:1])
        entering = states((len(windows), *first.shape[1:]), self._device, self._scratch)
        for batch, _ in self._parts(len(windows)):
            entering[batch], calls = self._calls_of(inner, windows[batch])
            self._calls.setdefault(batch.stop - batch.start, calls)
        return entering

    def _load_outside(self, inner: nn.Module) -> None:
        """Read everything that is neither in a block nor the head."""
        prefix = self.family.inner + "."
        inside = self.family.blocks.removeprefix(prefix) + "."
        names = [name for name in inner.state_dict() if not name.startswith(inside)]
        tensors = {name: self._source.outside(prefix + name) for name in names}
        tensors = {name: tensor.to(self._device).float() for name, tensor in tensors.items()}
        _load(inner, tensors, f"what is outside of {self.family.blocks}", strict=False)

    def _calls_of(self, inner: Any, windows: Tensor) -> tuple[Tensor, list[_Call]]:
        """What enters the first block, fp32, and the calls of all blocks."""
        entering: list[Tensor] = []
        calls: list[_Call] = []

        def note(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            entering.append(hidden)
            calls.append(_Call(args, kwargs))
            if len(calls) == len(self._blocks):
                raise _LastBlockReached
            return (hidden,) if self.family.tuples else hidden

        for block in self._blocks:
            block.forward = note  # hides the method
        try:
            inner(input_ids=windows.to(self._device), use_cache=False)
        except _LastBlockReached:
            return entering[0].float(), calls
        finally:
            for block in self._blocks:
                del block.forward
        raise CheckpointError(f"{self._source.path}: the model does not call its blocks")

    def load_block(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The block's module, filled with `tensors` (full names; NaN and inf become 0).

        It computes in fp32; weights of linears may share memory with `tensors`, in their dtype.

        Raises:
            CheckpointError: a tensor is missing, unexpected, or of another shape.
        """
        return self._filled(self._blocks[index], index, tensors)

    def load_copy(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """As `load_block`, a module of its own; made first, while the block has no memory yet."""
        return self._filled(copy.deepcopy(self._blocks[index]), index, tensors)

    def _filled(self, block: nn.Module, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        prefix = self.family.block_prefix(index)
        linears = {f"{name}.weight" for name in self.family.linears}
        here = {name.removeprefix(prefix): t.to(self._device) for name, t in tensors.items()}
        finite = {
            name: _finite(tensor if name in linears else tensor.float())
            for name, tensor in here.items()
        }
        _load(block, finite, prefix.rstrip("."))
        self._indices[block] = index
        return block.requires_grad_(False)

    def drop_block(self, index: int) -> None:
        """Give a block's memory back."""
        self._blocks[index].to_empty(device="meta")

    @torch.no_grad()
    def advance(self, block: nn.Module, parent: nn.Module | None = None) -> None:
        """Replace `hidden` by the block's outputs, in place; and the dense model's, by `parent`."""
        for windows, _ in self.batches():
            batch = self.hidden[windows]
            batch.copy_(self.run(block, batch))
            if self.dense is not None and parent is not None:
                batch = self.dense[windows]
                batch.copy_(self.run(parent, batch))

    def batches(self) -> list[tuple[slice, bool]]:
        """Windows that run together, and whether they are held out: the same in every pass."""
        return self._parts(len(self.hidden))

    def _parts(self, windows: int) -> list[tuple[slice, bool]]:
        edges = (0, self._fitted), (self._fitted, windows)
        return [
            (slice(start, min(start + self._batch, last)), held_out)
            for (first, last), held_out in zip(edges, (False, True), strict=True)
            for start in range(first, last, self._batch)
        ]

    @torch.no_grad()
    def outputs(self, parent: nn.Module) -> Tensor:
        """What the dense model's block gives on the dense model's activations, as `hidden`."""
        assert self.dense is not None, "the stream is not parallel"
        leaving = states(tuple(self.dense.shape), self._device, self._scratch)
        for windows, _ in self.batches():
            leaving[windows] = self.run(parent, self.dense[windows])
        return leaving

    def run(self, block: nn.Module, batch: Tensor) -> Tensor:
        """One forward pass of a loaded block on [n, length, hidden]; n is 1, or that of a batch."""
        call = self._calls[len(batch)][self._indices[block]]
        output = block(batch, *call.args, **call.kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


def tokens_per_batch(widest: int) -> int:
    """Tokens that go through a block together, by the widest state inside it."""
    return min(_TOKENS_PER_BATCH, _STATES_PER_BATCH // widest)


def skeleton(source: Source) -> nn.Module:
    """The model without any weights, its blocks adapted; only tables that are no weights are real.

    Raises:
        CheckpointError: transformers does not take its config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    family = source.family
    try:
        config = AutoConfig.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                attn_implementation=family.attention,
                trust_remote_code=False,
            )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{source.path / 'config.json'} is not usable: {error}") from error
    for block in model.get_submodule(family.blocks).children():
        adapt(block, family)
    _fill_tables(model, source.device)
    built: nn.Module = model.eval()
    return built


def _fill_tables(model: Any, device: torch.device) -> None:
    """Compute what a config alone gives: rotary frequencies, the scale of an embedding."""
    for module in model.modules():
        tables = [name for name, table in module.named_buffers(recurse=False) if table.is_meta]
        for name in tables:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if tables:
            model._init_weights(module)  # of its parameters, none has memory yet


def _finite(tensor: Tensor) -> Tensor:
    if bool(torch.isfinite(tensor).all()):
        return tensor
    return torch.nan_to_num(tensor, posinf=0.0, neginf=0.0)


def _load(module: nn.Module, tensors: dict[str, Tensor], where: str, strict: bool = True) -> None:
    try:
        module.load_state_dict(tensors, strict=strict, assign=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise CheckpointError(f"{where} does not fit config.json: {detail[:400]}") from error
