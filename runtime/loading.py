"""Reads a decoder's weights under their names, against the shapes that its spec expects."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.formats import FLOAT_DTYPES, PackedLinear
from .checkpoint import Checkpoint
from .spec import DecoderSpec

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class Loader:
    """Tensors come as `dtype` on `device`, linears as they are stored.

    Every method raises CheckpointError for what is missing, illegal or of another shape.
    """

    checkpoint: Checkpoint
    spec: DecoderSpec
    dtype: torch.dtype
    device: torch.device

    def matrix(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A float tensor of any number of dimensions."""
        found = self.checkpoint.shape(name)
        if found != shape:
            raise CheckpointError(
                f"tensor {name}: config.json says {list(shape)}, found {list(found)}"
            )
        tensor = self.checkpoint.tensor(name)
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"tensor {name}: expected a float dtype, found {tensor.dtype}")
        return tensor.to(device=self.device, dtype=self.dtype)

    def vector(self, name: str, size: int) -> Tensor:
        """A float tensor [size]."""
        return self.matrix(name, (size,))

    def embedding(self) -> Tensor:
        """[vocab, hidden]."""
        return self.matrix(f"{EMBEDDING}.weight", (self.spec.vocab, self.spec.hidden))

    def packed(self, linear: str) -> PackedLinear:
        """A linear of a block by its full name, or one of the ends, as it is stored."""
        if linear == EMBEDDING and linear in self.checkpoint.linears:
            raise CheckpointError(f"{EMBEDDING} is packed, and embeddings never are")
        shape = self._shape(linear)
        found = self.checkpoint.linear_shape(linear)
        if found != shape:
            raise CheckpointError(
                f"linear {linear}: config.json says {list(shape)}, found {list(found)}"
            )
        return self.checkpoint.linear(linear)

    def bias(self, linear: str) -> Tensor | None:
        """Its bias [N], if the spec gives it one."""
        if not self._has_bias(linear):
            return None
        return self.vector(f"{linear}.bias", self._shape(linear)[0])

    def _shape(self, linear: str) -> tuple[int, int]:
        if linear in (EMBEDDING, HEAD):
            return self.spec.vocab, self.spec.hidden
        return self.spec.linear_shapes[_short(linear)]

    def _has_bias(self, linear: str) -> bool:
        if linear in (EMBEDDING, HEAD):
            return False
        inside_attention = _short(linear).startswith("self_attn")
        return self.spec.attention_bias if inside_attention else self.spec.mlp_bias


def _short(linear: str) -> str:
    """A linear's name inside its block: the part behind the block's number."""
    return ".".join(linear.split(".")[-2:])
