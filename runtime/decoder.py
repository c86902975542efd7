"""One generic decoder in torch, driven by a spec. Knows no text, no requests.

The whole batch goes through each linear at once, and each sequence through attention by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.formats import Dense
from ..kernels.paging import PAGE_POSITIONS
from .attention import Attention, FloatMemory, Viewpoint, Where, capped
from .checkpoint import Checkpoint
from .loading import Loader
from .mlp import Experts, Mlp, load_mlp
from .norms import Norm
from .paged import PagedDecoder, Part, positions, token_ids
from .spec import DecoderSpec, LearnedSpec


class Decoder(PagedDecoder):
    """All blocks of a model, ready to run."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        dtype: torch.dtype,
        device: torch.device,
        exact: bool = True,
    ) -> None:
        """Read and bind every weight; with `exact`, only to kernels that round nothing.

        Raises:
            CheckpointError: a tensor is missing, illegal, or does not fit the config.
        """
        self.spec = spec
        self.dtype, self.device = dtype, device
        loader, names = Loader(checkpoint, spec, dtype, device), spec.names
        # Our kernels make a head of the embedding as it is stored, and torch's of what is computed.
        self._embedding = loader.embedding(as_stored=not exact and device.type == "cpu")
        self._positions = loader.positions()
        self._embedding_norm = loader.norm(names.embedding_norm) if names.embedding_norm else None
        self._project_in = self._project_out = None
        if names.project_in:
            self._project_in = loader.never_packed(names.project_in, exact)
            self._project_out = loader.never_packed(names.project_out, exact)
        self._blocks = [Block.load(loader, layer, exact) for layer in range(spec.layers)]
        self._norm = loader.norm(names.norm) if names.norm else None
        head = Dense(self._embedding) if spec.tied else loader.end(names.head)
        self._head = loader.bind(head, None, exact)
        self._sights = [spec.sight(layer) for layer in range(spec.layers)]
        self._viewpoints = {sight: Viewpoint(spec, sight, device) for sight in set(self._sights)}

    @property
    def page_bytes(self) -> int:
        """What a page takes, over all layers."""
        spec = self.spec
        row = spec.kv_heads * spec.head_dim * self.dtype.itemsize
        return 2 * spec.layers * PAGE_POSITIONS * row

    def new_memory(self, pages: int) -> FloatMemory:
        """Room for so many pages."""
        shape = (self.spec.layers, self.spec.kv_heads, self.spec.head_dim)
        return FloatMemory(shape, pages, self.dtype, self.device)

    @torch.inference_mode()
    def run(self, parts: Sequence[Part], memory: FloatMemory) -> Tensor:
        """Append all parts at once: their final hidden states [tokens of all, hidden], in order."""
        at = positions(parts).to(self.device)
        hidden = self._embedded(token_ids(parts).to(self.device), at)
        where = {
            sight: viewpoint.where(parts, at, self.dtype)
            for sight, viewpoint in self._viewpoints.items()
        }
        for block, sight in zip(self._blocks, self._sights, strict=True):
            hidden = block(hidden, memory, where[sight])
        return hidden if self._norm is None else self._norm(hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every next token, fp32 [..., vocab] on the CPU, where they are sampled."""
        if self._project_out is not None:
            hidden = self._project_out(hidden)
        scores, cap = self._head(hidden), self.spec.logit_cap
        return (scores if cap is None else capped(scores, cap)).float().cpu()

    def _embedded(self, ids: Tensor, at: Tensor) -> Tensor:
        hidden = self._embedding[ids].to(self.dtype)
        if self.spec.embedding_factor != 1:
            # Rounded as the model computes, which is what models were trained with.
            hidden = hidden * torch.tensor(self.spec.embedding_factor, dtype=self.dtype)
        if self._project_in is not None:
            hidden = self._project_in(hidden)
        if self._positions is not None and isinstance(self.spec.positions, LearnedSpec):
            hidden = hidden + self._positions[self.spec.positions.first + at]
        return hidden if self._embedding_norm is None else self._embedding_norm(hidden)


@dataclass(frozen=True)
class Block:
    """One decoder block; `residual` is the spec's."""

    residual: str
    attention_norm: Norm
    attention: Attention
    attention_out_norm: Norm | None
    mlp_norm: Norm
    mlp: Mlp | Experts
    mlp_out_norm: Norm | None

    @classmethod
    def load(cls, loader: Loader, layer: int, exact: bool) -> Block:
        """Read it; raises as the loader."""
        names = loader.spec.names
        out = names.attention_out_norm, names.mlp_out_norm
        attention_out, mlp_out = (loader.block_norm(layer, each) if each else None for each in out)
        return cls(
            loader.spec.residual,
            loader.block_norm(layer, names.attention_norm),
            Attention.load(loader, layer, exact),
            attention_out,
            loader.block_norm(layer, names.mlp_norm),
            load_mlp(loader, layer, exact),
            mlp_out,
        )

    def __call__(self, hidden: Tensor, memory: FloatMemory, where: Where) -> Tensor:
        """States [tokens, hidden] behind the block; the memory gets keys and values."""
        if self.residual == "post":
            hidden = self.attention_norm(hidden + self.attention(hidden, memory, where))
            return self.mlp_norm(hidden + self.mlp(hidden))
        attended = self.attention(self.attention_norm(hidden), memory, where)
        if self.attention_out_norm is not None:
            attended = self.attention_out_norm(attended)
        seen = hidden if self.residual == "parallel" else hidden + attended
        out = self.mlp(self.mlp_norm(seen))
        if self.mlp_out_norm is not None:
            out = self.mlp_out_norm(out)
        return hidden + attended + out
