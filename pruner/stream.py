"""Walks a model block by block, holding one block and the activations that enter it.

The forward pass is transformers' own block, so that what is pruned is exactly what the model
computes. Knows activations; knows nothing of what is learnt from them, of masks or files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .families import Family
from .source import Source

TOKENS_PER_BATCH = 4096


class _FirstBlockReached(Exception):  # noqa: N818 - a signal, not an error
    """Carries the first block's arguments out of the model's forward pass."""

    def __init__(self, hidden: Tensor, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.hidden = hidden
        self.arguments = arguments


class _Catcher(nn.Module):
    def forward(self, hidden: Tensor, *args: Any, **arguments: Any) -> Tensor:
        raise _FirstBlockReached(hidden, arguments)


class BlockStream:
    """The blocks of one model over a fixed set of token windows.

    `hidden` holds the activations that enter the current block, fp32 [windows, length, hidden].
    The last `held_out` windows never share a batch with others. With `parallel`, `dense` holds the
    dense model's own activations, so that drift from them can be observed too.
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
        self.dense = self.hidden.clone() if parallel else None

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
        edges = (0, self._fitted), (self._fitted, len(self.hidden))
        return [
            (slice(start, min(start + self._batch, last)), held_out)
            for (first, last), held_out in zip(edges, (False, True), strict=True)
            for start in range(first, last, self._batch)
        ]

    @torch.no_grad()
    def outputs(self, parent: nn.Module) -> Tensor:
        """What the dense model's block gives on the dense model's activations, as `hidden`."""
        assert self.dense is not None, "the stream is not parallel"
        return torch.cat([self.run(parent, self.dense[windows]) for windows, _ in self.batches()])

    def run(self, block: nn.Module, batch: Tensor) -> Tensor:
        """One forward pass of the block on [n, length, hidden]."""
        output = block(batch, **self._arguments)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


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
