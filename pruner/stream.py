"""Walks a model block by block, holding one block and the activations that enter it.

The forward pass is transformers' own block, so that what is pruned is exactly what the model
computes. Knows activations and Hessians; knows nothing of masks or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .families import Family
from .methods.base import InputStatistics
from .source import Source

_TOKENS_PER_BATCH = 4096


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
    """

    def __init__(self, source: Source, windows: Tensor) -> None:
        """Embed `windows` [n, length]; reads the embedding only.

        Raises:
            CheckpointError: the embedding is missing or does not fit the config.
        """
        self._source = source
        self._family: Family = source.family
        self._skeleton = _skeleton(source)
        self._blocks = list(self._skeleton.get_submodule(self._family.blocks).children())
        self.hidden, self._arguments = self._embed(windows)
        self._batch = max(1, _TOKENS_PER_BATCH // windows.shape[1])

    @torch.no_grad()
    def _embed(self, windows: Tensor) -> tuple[Tensor, dict[str, Any]]:
        name = f"{self._family.embedding}.weight"
        embedding = self._skeleton.get_submodule(self._family.embedding)
        _load(embedding, {"weight": self._source.tensors.read(name)}, name)
        parent, _, child = self._family.blocks.rpartition(".")
        setattr(self._skeleton.get_submodule(parent), child, nn.ModuleList([_Catcher()]))
        try:
            self._skeleton(input_ids=windows, use_cache=False)
        except _FirstBlockReached as reached:
            embedding.to_empty(device="meta")
            return reached.hidden.float(), reached.arguments
        raise CheckpointError(f"{self._source.path}: the model has no blocks")

    def load_block(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The block's module in fp32, filled with `tensors` (full names; NaN and inf become 0).

        Raises:
            CheckpointError: a tensor is missing, unexpected, or of another shape.
        """
        prefix = self._family.block_prefix(index)
        finite = {
            name.removeprefix(prefix): torch.nan_to_num(tensor.float(), posinf=0.0, neginf=0.0)
            for name, tensor in tensors.items()
        }
        block = self._blocks[index]
        _load(block, finite, prefix.rstrip("."))
        return block

    def drop_block(self, index: int) -> None:
        """Give a block's memory back."""
        self._blocks[index].to_empty(device="meta")

    @torch.no_grad()
    def observe(self, block: nn.Module) -> dict[str, InputStatistics]:
        """Run the block on `hidden` and return the input statistics of each of its linears."""
        collectors = {stage[0]: _HessianCollector() for stage in self._family.stages}
        hooks = [
            block.get_submodule(name).register_forward_pre_hook(collector)
            for name, collector in collectors.items()
        ]
        try:
            for batch in self.hidden.split(self._batch):
                self._run(block, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return {
            name: collectors[stage[0]].result() for stage in self._family.stages for name in stage
        }

    @torch.no_grad()
    def advance(self, block: nn.Module) -> None:
        """Replace `hidden` by the block's outputs, in place."""
        for batch in self.hidden.split(self._batch):
            batch.copy_(self._run(block, batch))

    def _run(self, block: nn.Module, batch: Tensor) -> Tensor:
        output = block(batch, **self._arguments)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


class _HessianCollector:
    """A forward hook that sums X^T X of the inputs it sees, in fp32."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._tokens = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().float().flatten(0, -2)
        if self._sum is None:
            self._sum = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        self._sum.addmm_(x.T, x)
        self._tokens += len(x)

    def result(self) -> InputStatistics:
        if self._sum is None:
            raise CheckpointError("a linear of the block was never called")
        return InputStatistics(self._sum / self._tokens, self._tokens)


def _skeleton(source: Source) -> nn.Module:
    """The model without any weights; only its rotary table, which is no weight, is real."""
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
        inner.rotary_emb = type(inner.rotary_emb)(config=config)
    skeleton: nn.Module = model.eval()
    return skeleton


def _load(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    try:
        module.load_state_dict(
            {name: tensor.float() for name, tensor in tensors.items()}, strict=True, assign=True
        )
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise CheckpointError(f"{where} does not fit config.json: {detail[:400]}") from error
