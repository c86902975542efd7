"""Reads a decoder's weights under their names, against the shapes that its spec expects."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.dispatch import LinearFunction, prepare
from ..kernels.formats import FLOAT_DTYPES, PackedLinear
from .checkpoint import Checkpoint
from .norms import Norm
from .spec import DecoderSpec, LearnedSpec, Linear


@dataclass(frozen=True)
class Loader:
    """Tensors come as `dtype` on `device`, linears as they are stored.

    Every method raises CheckpointError for what is missing, illegal or of another shape.
    """

    checkpoint: Checkpoint
    spec: DecoderSpec
    dtype: torch.dtype
    device: torch.device

    def matrix(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A float tensor of any number of dimensions; of `dtype`, if that is another one."""
        found = self.checkpoint.shape(name)
        if found != shape:
            raise CheckpointError(
                f"tensor {name}: config.json says {list(shape)}, found {list(found)}"
            )
        tensor = self.checkpoint.tensor(name)
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"tensor {name}: expected a float dtype, found {tensor.dtype}")
        return tensor.to(device=self.device, dtype=dtype or self.dtype)

    def embedding(self, as_stored: bool = False) -> Tensor:
        """[vocab, embedded]; of the dtype it is stored in, if asked."""
        name, shape = f"{self.spec.names.embedding}.weight", (self.spec.vocab, self.spec.embedded)
        dtype = self.checkpoint.tensors.dtype(name) if as_stored else None
        return self.matrix(name, shape, dtype)

    def positions(self) -> Tensor | None:
        """The table of learned positions [rows, hidden], if there is one."""
        spec = self.spec
        if not isinstance(spec.positions, LearnedSpec):
            return None
        rows = spec.positions.first + spec.max_positions
        return self.matrix(f"{spec.names.positions}.weight", (rows, spec.hidden))

    def norm(self, name: str) -> Norm:
        """A norm of hidden states by its full name."""
        spec, size = self.spec, (self.spec.hidden,)
        bias = self.matrix(f"{name}.bias", size) if spec.norm.kind == "layer" else None
        return Norm(self._gain(name, size), bias, spec.norm.eps)

    def block_norm(self, layer: int, short: str) -> Norm:
        """A norm of a block by its name inside it."""
        return self.norm(f"{self.spec.names.blocks}.{layer}.{short}")

    def head_norm(self, layer: int, short: str) -> Norm | None:
        """An RMSNorm [head_dim] of every head; None where it has no name."""
        if not short:
            return None
        name = f"{self.spec.names.blocks}.{layer}.{short}"
        return Norm(self._gain(name, (self.spec.head_dim,)), None, self.spec.norm.eps)

    def linear(self, layer: int, role: str, expert: int | None = None) -> PackedLinear:
        """A linear of a block, as it is stored; its own rows, where others are stored with it."""
        linear = self.spec.linear(layer, role, expert)
        stored = self._checked(linear.name, linear.stored_shape, linear.stored.transposed)
        rows = self._rows(linear)
        return stored if rows is None else stored.rows(rows)

    def bound(
        self, layer: int, role: str, exact: bool, expert: int | None = None
    ) -> LinearFunction:
        """A linear of a block with its bias, on the kernel that is chosen for it (dispatch.py)."""
        weight, bias = self.linear(layer, role, expert), self.bias(layer, role, expert)
        return self.bind(weight, bias, exact)

    def bind(self, weight: PackedLinear, bias: Tensor | None, exact: bool) -> LinearFunction:
        """A weight on the kernel that is chosen for it."""
        return prepare(weight, bias, self.device, self.dtype, exact)

    def never_packed(self, name: str, exact: bool) -> LinearFunction:
        """As `bound`, for one of the spec's linears that are never packed, by its full name."""
        if name in self.checkpoint.linears:
            raise CheckpointError(f"{name} is packed, and only linears of attention and MLPs are")
        return self.bind(self._checked(name, self.spec.never_packed[name]), None, exact)

    def end(self, name: str) -> PackedLinear:
        """The embedding or the head [vocab, embedded] by its full name, as it is stored."""
        if name == self.spec.names.embedding and name in self.checkpoint.linears:
            raise CheckpointError(f"{name} is packed, and embeddings never are")
        return self._checked(name, (self.spec.vocab, self.spec.embedded))

    def bias(self, layer: int, role: str, expert: int | None = None) -> Tensor | None:
        """The bias [N] of a linear of a block, if the spec gives it one."""
        linear = self.spec.linear(layer, role, expert)
        if not linear.biased:
            return None
        bias, rows = self.matrix(f"{linear.name}.bias", linear.stored_shape[:1]), self._rows(linear)
        return bias if rows is None else bias[rows.to(bias.device)]

    def _checked(self, name: str, shape: tuple[int, int], transposed: bool = False) -> PackedLinear:
        found = self.checkpoint.linear_shape(name, transposed)
        if found != shape:
            raise CheckpointError(
                f"linear {name}: config.json says {list(shape)}, found {list(found)}"
            )
        return self.checkpoint.linear(name, transposed)

    def _gain(self, name: str, size: tuple[int]) -> Tensor:
        """With an offset in fp32: 16 bits would round away most of what is stored."""
        offset = self.spec.norm.offset
        if not offset:
            return self.matrix(f"{name}.weight", size)
        return self.matrix(f"{name}.weight", size, torch.float32) + offset

    def _rows(self, linear: Linear) -> Tensor | None:
        """Which rows of the stored linear are this one's; None for all."""
        beside, count = linear.stored.beside, linear.stored_shape[0]
        if not beside:
            return None
        part, rows = beside.index(linear.role), torch.arange(count)
        if linear.stored.by_head:
            return rows.view(-1, len(beside), self.spec.head_dim)[:, part].flatten()
        before = sum(self.spec.shape(role)[0] for role in beside[:part])
        return rows[before : before + linear.shape[0]]
