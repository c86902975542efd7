"""The most tokens a second that memory allows on this machine, before anything has run."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CheckpointError
from ..kernels.cpu.bandwidth import read_bandwidth
from ..kernels.cpu.library import Library, library
from ..kernels.cpu.packed import CODED, packed_bytes
from ..kernels.formats import FLOAT_DTYPES, FORMATS, Dense, Int8
from .checkpoint import Checkpoint
from .fused import rounds_end
from .spec import DecoderSpec


@dataclass(frozen=True)
class Roof:
    """Decoding one sequence reads every weight once a token, so memory sets a limit.

    `level` and `threads` are the kernels'; `token_bytes` are those of all linears and the head as
    packed, without keys and values; `read_bytes_per_second` was measured. Of `experts`, (chosen,
    all), where there are some, the chosen ones are counted.
    """

    level: str
    threads: int
    token_bytes: int
    read_bytes_per_second: float
    experts: tuple[int, int] | None = None

    @property
    def tokens_per_second(self) -> float:
        """The limit at an empty cache; weights that the processor can hold may pass it."""
        return self.read_bytes_per_second / self.token_bytes


def find_roof(checkpoint: Checkpoint, spec: DecoderSpec) -> Roof | None:
    """Measure for a tenth of a second; None without the CPU kernels, or memory to read.

    Raises:
        CheckpointError: a weight is stored in a dtype that no weight has.
    """
    native = library()
    if native is None:
        return None
    total = token_bytes(native, checkpoint, spec)
    experts = None if spec.experts is None else (spec.experts.chosen, spec.experts.count)
    try:
        return Roof(native.level, native.threads, total, read_bandwidth(native), experts)
    except RuntimeError:  # torch's word for memory that there is not
        return None


def token_bytes(native: Library, checkpoint: Checkpoint, spec: DecoderSpec) -> int:
    """Bytes of all linears that one token reads, as packed: of experts, those of the chosen ones.

    Raises as `find_roof`.
    """
    linears = (linear for layer in range(spec.layers) for linear in spec.linears(layer))
    total = sum(
        linear.read * _stored_bytes(native, checkpoint, linear.name, linear.shape)
        for linear in linears
    )
    for name, shape in spec.never_packed.items():
        total += _stored_bytes(native, checkpoint, name, shape)
    head, ends = spec.head_name, (spec.vocab, spec.embedded)
    if rounds_end(checkpoint, spec, head):
        return round(total) + packed_bytes(native, Int8.kind, ends)
    return round(total) + _stored_bytes(native, checkpoint, head, ends)


def _stored_bytes(
    native: Library, checkpoint: Checkpoint, name: str, shape: tuple[int, int]
) -> int:
    """Of a linear of `shape`, which may be a part of the stored one."""
    entry = checkpoint.linears.get(name)
    kind, group = (Dense.kind, None) if entry is None else (entry.format, entry.group)
    floats = f"{name}.{FORMATS[kind].suffixes[0]}"
    dtype = None if kind in CODED else checkpoint.tensors.dtype(floats)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{name}: {dtype} is no dtype for weights")
    return packed_bytes(native, kind, shape, group, dtype)
