"""The most tokens a second that memory allows on this machine, before anything has run."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.cpu.bandwidth import read_bandwidth
from ..kernels.cpu.library import Library, library
from ..kernels.cpu.packed import CODED, packed_bytes
from ..kernels.formats import Dense, Int8
from ..kernels.shards import ShardedTensors
from .checkpoint import Checkpoint
from .fused import rounds_ends
from .loading import EMBEDDING, HEAD
from .spec import DecoderSpec


@dataclass(frozen=True)
class Roof:
    """Decoding one sequence reads every weight once a token, so memory sets a limit.

    `level` and `threads` are the kernels'; `token_bytes` are those of all linears and the head as
    packed, without keys and values; `read_bytes_per_second` was measured.
    """

    level: str
    threads: int
    token_bytes: int
    read_bytes_per_second: float

    @property
    def tokens_per_second(self) -> float:
        """The limit at an empty cache; weights that the processor can hold may pass it."""
        return self.read_bytes_per_second / self.token_bytes


def find_roof(checkpoint: Checkpoint, spec: DecoderSpec) -> Roof | None:
    """Measure for a tenth of a second; None where the CPU kernels are not installed."""
    native = library()
    if native is None:
        return None
    tensors = ShardedTensors.open(checkpoint.path)
    names = [f"model.layers.{i}.{name}" for i in range(spec.layers) for name in spec.linear_shapes]
    total = sum(_linear_bytes(native, checkpoint, tensors, name) for name in names)
    total += _head_bytes(native, checkpoint, tensors, spec)
    return Roof(native.level, native.threads, total, read_bandwidth(native))


def _linear_bytes(
    native: Library, checkpoint: Checkpoint, tensors: ShardedTensors, name: str
) -> int:
    entry, shape = checkpoint.linears.get(name), checkpoint.linear_shape(name)
    if entry is None:
        return packed_bytes(native, Dense.kind, shape, dtype=tensors.dtype(f"{name}.weight"))
    dtype = None if entry.format in CODED else tensors.dtype(f"{name}.values")
    return packed_bytes(native, entry.format, shape, entry.group, dtype)


def _head_bytes(
    native: Library, checkpoint: Checkpoint, tensors: ShardedTensors, spec: DecoderSpec
) -> int:
    name = EMBEDDING if spec.tied else HEAD
    if name not in checkpoint.linears and rounds_ends(checkpoint):
        return packed_bytes(native, Int8.kind, (spec.vocab, spec.hidden))
    return _linear_bytes(native, checkpoint, tensors, name)
