"""Reads a decoder's weights under their names, against the shapes that its spec expects."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.formats import FLOAT_DTYPES, PackedLinear
from .checkpoint import Checkpoint
from .spec import DecoderSpec, LearnedSpec


@dataclass(frozen=True)
class Norm:
    """Gain and, of a LayerNorm, bias [size]."""

    gain: Tensor
    bias: Tensor | None


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

    def embedding(self) -> Tensor:
        """[vocab, hidden]."""
        shape = (self.spec.vocab, self.spec.hidden)
        return self.matrix(f"{self.spec.names.embedding}.weight", shape)

    def positions(self) -> Tensor | None:
        """The table of learned positions [rows, hidden], if there is one."""
        spec = self.spec
        if not isinstance(spec.positions, LearnedSpec):
            return None
        rows = spec.positions.first + spec.max_positions
        return self.matrix(f"{spec.names.positions}.weight", (rows, spec.hidden))

    def norm(self, name: str) -> Norm:
        """A norm of hidden states by its full name."""
        size = (self.spec.hidden,)
        biased = self.spec.norm.kind == "layer"
        bias = self.matrix(f"{name}.bias", size) if biased else None
        return Norm(self.matrix(f"{name}.weight", size), bias)

    def block_norm(self, layer: int, short: str) -> Norm:
        """A norm of a block by its name inside it."""
        return self.norm(f"{self.spec.names.blocks}.{layer}.{short}")

    def head_norm(self, layer: int, short: str) -> Tensor | None:
        """The gain [head_dim] of a norm of every head; None where it has no name."""
        name = f"{self.spec.names.blocks}.{layer}.{short}.weight"
        return self.matrix(name, (self.spec.head_dim,)) if short else None

    def linear(self, layer: int, role: str) -> PackedLinear:
        """A linear of a block, as it is stored; its own rows, where others are stored with it."""
        name = self.spec.linear_name(layer, role)
        stored, part = self._checked(name, self.spec.stored_shape(role)), self._part(role)
        return stored if part is None else stored.rows(part)

    def end(self, name: str) -> PackedLinear:
        """The embedding or the head [vocab, hidden] by its full name, as it is stored."""
        if name == self.spec.names.embedding and name in self.checkpoint.linears:
            raise CheckpointError(f"{name} is packed, and embeddings never are")
        return self._checked(name, (self.spec.vocab, self.spec.hidden))

    def bias(self, layer: int, role: str) -> Tensor | None:
        """The bias [N] of a linear of a block, if the spec gives it one."""
        if role not in self.spec.biased:
            return None
        name = f"{self.spec.linear_name(layer, role)}.bias"
        bias, part = self.matrix(name, self.spec.stored_shape(role)[:1]), self._part(role)
        return bias if part is None else bias[part]

    def _checked(self, name: str, shape: tuple[int, int]) -> PackedLinear:
        found = self.checkpoint.linear_shape(name)
        if found != shape:
            raise CheckpointError(
                f"linear {name}: config.json says {list(shape)}, found {list(found)}"
            )
        return self.checkpoint.linear(name)

    def _part(self, role: str) -> Tensor | None:
        """Which rows of the stored linear are this one's; None for all."""
        part = self.spec.names.linears[role].part
        if part is None:
            return None
        rows = torch.arange(3 * self.spec.shape(role)[0])
        return rows.view(-1, 3, self.spec.head_dim)[:, part].flatten()
