"""Four-bit fields in bytes: the 2:4 index nibbles and the int4 codes.

The low nibble of a byte always comes first. An index nibble names the two kept positions of one
aligned group of four: first in its low two bits, second in its high two, first < second. Of the 16
nibbles six are legal. Knows only integers; what a code is worth is said in formats.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError

# Smallest normal fp16: a scale below it would lose precision or become zero.
SMALLEST_SCALE = 2.0**-14
_PADDING_NIBBLE = 0x4  # positions 0 and 1: fills the last byte when K/4 is odd
_LEGAL = [first | second << 2 for second in range(4) for first in range(second)]
_LEGAL_BYTES = bytes(low | high << 4 for low in _LEGAL for high in _LEGAL)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack uint8 [N, C] of values 0..15, C even, into uint8 [N, C/2]."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Undo `pack_nibbles`: uint8 [N, C/2] to uint8 [N, C]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)


def kept_indices(weight: Tensor, name: str) -> Tensor:
    """Positions (first < second) kept in each aligned group of four: uint8 [N, K/4, 2].

    The non-zeros of a group, topped up with its leftmost zeros when there are fewer than two.

    Raises:
        CheckpointError: K is not a multiple of 4, or a group has more than two non-zeros.
    """
    rows, columns = weight.shape
    if columns % 4:
        raise CheckpointError(f"{name}: K = {columns} is not a multiple of 4")
    nonzero = (weight != 0).view(rows, columns // 4, 4)
    crowded = nonzero.sum(dim=-1) > 2
    if bool(crowded.any()):
        row, group = torch.nonzero(crowded)[0].tolist()
        raise CheckpointError(
            f"{name} is not 2:4: over two non-zeros in row {row}, the four columns at {4 * group}"
        )
    # Stable order: non-zeros first, each kind from left to right; then the two winners sorted.
    order = torch.argsort(nonzero.to(torch.uint8), dim=-1, descending=True, stable=True)
    return order[..., :2].sort(dim=-1).values.to(torch.uint8)


def gather_kept(weight: Tensor, indices: Tensor) -> Tensor:
    """Kept elements [N, K/2] of [N, K], left to right."""
    rows, columns = weight.shape
    return weight.view(rows, columns // 4, 4).gather(-1, indices.long()).flatten(1)


def scatter_kept(values: Tensor, indices: Tensor) -> Tensor:
    """Undo `gather_kept`: [N, K/2] to [N, K] with zeros elsewhere."""
    rows, groups = indices.shape[:2]
    full = torch.zeros(rows, groups, 4, dtype=values.dtype, device=values.device)
    full.scatter_(-1, indices.long(), values.reshape(rows, groups, 2))
    return full.flatten(1)


def pack_meta(indices: Tensor) -> Tensor:
    """Index pairs uint8 [N, K/4, 2] to meta bytes uint8 [N, ceil(K/8)]."""
    meta = indices[..., 0] | (indices[..., 1] << 2)
    if meta.shape[1] % 2:
        meta = torch.nn.functional.pad(meta, (0, 1), value=_PADDING_NIBBLE)
    return pack_nibbles(meta).contiguous()


def unpack_meta(meta: Tensor, columns: int) -> Tensor:
    """Undo `pack_meta`: uint8 [N, ceil(K/8)] to uint8 [N, K/4, 2]."""
    pairs = unpack_nibbles(meta)[:, : columns // 4]
    return torch.stack((pairs & 3, pairs >> 2), dim=-1)


def check_meta(name: str, meta: Tensor, rows: int, columns: int) -> None:
    """Prove that every nibble names two increasing positions.

    One pass over the bytes; afterwards a kernel may use the indices without looking at them.

    Raises:
        CheckpointError: wrong dtype or shape, or an illegal nibble (named by row and column).
    """
    expected = (rows, -(-columns // 8))
    if meta.dtype != torch.uint8 or tuple(meta.shape) != expected or columns % 4:
        raise CheckpointError(
            f"{name}.meta: expected torch.uint8 {list(expected)} for K = {columns}, "
            f"found {meta.dtype} {list(meta.shape)}"
        )
    padded = meta[:, columns // 8 :] >> 4 if columns % 8 else meta[:, :0]
    if _left_of(meta, _LEGAL_BYTES) or _left_of(padded, bytes([_PADDING_NIBBLE])):
        raise CheckpointError(f"{name}.meta: {_first_illegal(meta, columns // 4)}")


def _left_of(values: Tensor, taken: bytes) -> bytes:
    """The bytes that are none of `taken`; by Python's own loop, a tenth of torch's passes."""
    return values.numpy().tobytes().translate(None, taken)


def _first_illegal(meta: Tensor, groups: int) -> str:
    pairs = unpack_nibbles(meta)
    illegal = (pairs & 3) >= (pairs >> 2)
    illegal[:, groups:] |= pairs[:, groups:] != _PADDING_NIBBLE
    row, group = torch.nonzero(illegal)[0].tolist()
    return (
        f"nibble {int(pairs[row, group]):#x} in row {row}, group {group} "
        "does not name two increasing positions of four"
    )
