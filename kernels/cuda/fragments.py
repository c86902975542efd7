"""2:4 weights in the order in which sparse tensor cores read them.

`mma.sp.m16n8k32` multiplies 16 rows of W, 32 columns of which 16 are stored, by 32 columns of 8
tokens. Weights are its first operand, so a kernel computes W x^T: the padding that a small batch
needs is of tokens, in eights, and never of weights.

A warp's block is 64 rows x 64 columns: four tiles `i` of 16 rows, two steps `s` of 32 columns. With
g = lane / 4 and t = lane % 4 a lane holds of every tile and step eight kept values, in four 32-bit
registers:

        kept columns   2t  2t+1    8+2t  8+2t+1
    row g               a0  a1      a4    a5
    row g + 8           a2  a3      a6    a7

and of every tile one word that says which columns those are, for both steps: four bits for every
four columns, the first kept position in the lower two, those of row g in the lower 16 bits. Lane t
of a quad has the word of step t / 2 and, within it, of columns 16 (t % 2) and on.

What lies behind each other is what one lane reads at once, 16 bytes, and then the lanes of a warp:

    values  int32 [N/64, K/64, s, i, lane, 4]      16 bits a value
    codes   int32 [N/64, K/64, s, lane, i]         4 bits: a0 a2 a4 a6 a1 a3 a5 a7, lowest first
    meta    int32 [N/64, K/64, lane, i]
    scales  int32 [N/64, groups, g, i]             fp16: row g, and row g + 8 in the upper half

A dense weight of codes is two 2:4 ones: the first pair of every four columns, and the second. Their
blocks take turns along K, which is twice as long, and both are multiplied by the same tokens. Which
columns are kept is known, so that there are no words for it.

Codes stand in that order so that one mask takes out a pair of them for a register. (PTX ISA,
"Matrix fragments for sparse mma.m16n8k32". A test shows that torch's CUTLASS converter makes the
same words of metadata.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from .. import nibbles
from ..formats import Int4, Sparse24, Sparse24Int4
from ..groups import expand_groups

BLOCK_ROWS, BLOCK_COLUMNS = 64, 64
# Two warps share a step of K, so columns are filled up to pairs of blocks.
WHOLE_COLUMNS = 2 * BLOCK_COLUMNS
_CODE_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # bits of a0, a1, ... in a word of codes
_PADDING = (0, 1)  # positions that a padded group of four keeps; its values are zero


@dataclass(frozen=True)
class FragmentWeight:
    """A weight [N, K] in fragment order, filled up with zeros to [rows, columns].

    Attributes:
        shape: (N, K) of the weight it stands for.
        values: int32; 16-bit values of `dtype`, or codes where there are `scales`.
        meta: int32, which columns are kept.
        scales: int32, pairs of fp16; None where values are floats.
        group: columns that share a scale; 0 where values are floats.
        dtype: of stored floats, float16 or bfloat16; None where values are codes.
        dense: two 2:4 weights whose blocks take turns; `meta` is empty then, and a group counts
            columns of both.
    """

    shape: tuple[int, int]
    values: Tensor
    meta: Tensor
    scales: Tensor | None
    group: int
    dtype: torch.dtype | None
    dense: bool = False

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of 64 rows, and of 64 columns."""
        return int(self.meta.shape[0]), int(self.meta.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that are read when the weight is."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.values.nbytes + self.meta.nbytes + scales

    def copy(self) -> FragmentWeight:
        """The same in memory of its own."""
        scales = None if self.scales is None else self.scales.clone()
        return replace(self, values=self.values.clone(), meta=self.meta.clone(), scales=scales)

    def to(self, device: torch.device) -> FragmentWeight:
        """The same on a device."""
        scales = None if self.scales is None else self.scales.to(device)
        return replace(
            self, values=self.values.to(device), meta=self.meta.to(device), scales=scales
        )


def from_sparse24(weight: Sparse24) -> FragmentWeight:
    """Of a weight with 16-bit values; fp32 values are rounded to fp16."""
    values = weight.values
    if values.dtype == torch.float32:
        values = values.to(torch.float16)
    indices = nibbles.unpack_meta(weight.meta, weight.shape[1])
    padded, positions = _padded(values, indices)
    fragments = _to_fragments(padded.view(torch.int16))
    words = fragments.contiguous().view(torch.int32)
    return FragmentWeight(weight.shape, words, pack_meta(positions), None, 0, values.dtype)


def from_sparse24_int4(weight: Sparse24Int4) -> FragmentWeight:
    """Of a weight of codes, one scale per row and `group` columns."""
    columns = weight.shape[1]
    codes = nibbles.unpack_nibbles(weight.values)  # code + 8, so that a padded one is 8
    indices = nibbles.unpack_meta(weight.meta, columns)
    padded, positions = _padded(codes, indices, fill=8)
    groups = 2 * padded.shape[1] // weight.group
    scales = _filled(weight.scale, padded.shape[0], groups, 0)
    return FragmentWeight(
        weight.shape,
        pack_codes(padded),
        pack_meta(positions),
        pack_scales(scales),
        weight.group,
        None,
    )


def from_int4(weight: Int4) -> FragmentWeight:
    """Of a dense weight of codes, one scale per row and `group` columns."""
    rows, columns = weight.shape
    filled = -(-columns // BLOCK_COLUMNS) * BLOCK_COLUMNS
    codes = _filled(nibbles.unpack_nibbles(weight.values), rows, filled, 8)
    pairs = codes.view(rows, filled // 64, 16, 2, 2).transpose(2, 3).reshape(rows, filled)
    padded = _filled(pairs, -(-rows // BLOCK_ROWS) * BLOCK_ROWS, filled, 8)
    # Both pairs have the scale of their columns: of 32, or of 64.
    each = min(weight.group, BLOCK_COLUMNS)
    known = expand_groups(weight.scale, weight.group // each, -(-columns // each))
    scales = _filled(known, rows, filled // each, 0)
    if each < BLOCK_COLUMNS:
        halves = scales.view(rows, filled // 64, 1, 2).expand(-1, -1, 2, -1)
        scales = halves.reshape(rows, filled // 16)
    scales = _filled(scales, padded.shape[0], scales.shape[1], 0)
    blocks = padded.shape[0] // BLOCK_ROWS, filled // BLOCK_COLUMNS * 2
    none = weight.values.new_empty(*blocks, 0, dtype=torch.int32)
    group = WHOLE_COLUMNS if each == BLOCK_COLUMNS else each
    return FragmentWeight(
        weight.shape, pack_codes(padded), none, pack_scales(scales), group, None, dense=True
    )


def pack_meta(indices: Tensor) -> Tensor:
    """Kept positions uint8 [N, K/4, 2] of whole blocks to int32 [N/64, K/64, 32, 4]."""
    rows, fours = indices.shape[:2]
    nibble = (indices[..., 0] | indices[..., 1] << 2).to(torch.int32).view(rows, fours // 4, 4)
    shifts = 4 * torch.arange(4, dtype=torch.int32, device=indices.device)
    halves = (nibble << shifts).sum(-1, dtype=torch.int32)
    # block, tile, row half, g, block of columns, t = (step, half of its columns)
    halves = halves.view(rows // 64, 4, 2, 8, fours // 16, 4)
    words = halves[:, :, 0] | halves[:, :, 1] << 16
    return words.permute(0, 3, 2, 4, 1).reshape(rows // 64, fours // 16, 32, 4).contiguous()


def pack_codes(codes: Tensor) -> Tensor:
    """Codes + 8, uint8 [N, K/2] of whole blocks, to int32 [N/64, K/64, 2, 32, 4]."""
    fragments = _to_fragments(codes).to(torch.int32)
    shifts = torch.tensor(_CODE_SHIFTS, dtype=torch.int32, device=codes.device)
    words = (fragments << shifts).sum(-1, dtype=torch.int32)  # no two share a bit
    return words.transpose(3, 4).contiguous()


def pack_scales(scales: Tensor) -> Tensor:
    """Scales fp16 [N, groups] of whole blocks to int32 [N/64, groups, 8, 4]."""
    rows, groups = scales.shape
    bits = scales.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    bits = bits.view(rows // 64, 4, 2, 8, groups)
    words = bits[:, :, 0] | bits[:, :, 1] << 16
    return words.permute(0, 3, 2, 1).contiguous()


def unpack(weight: FragmentWeight, dtype: torch.dtype) -> Tensor:
    """The dense weight of whole blocks, [64 blocks of rows, 64 blocks of columns], in `dtype`.

    What the kernel multiplies by, for machines without it: floats are of `dtype`, codes are scaled
    in fp32 and rounded once. A dense one has half of the columns.
    """
    rows, columns = 64 * weight.blocks[0], 64 * weight.blocks[1]
    values = weight.values
    if weight.scales is None:
        fragments = values.view(dtype).view(*values.shape[:-1], 8)
        return nibbles.scatter_kept(_from_fragments(fragments), _positions(weight.meta))
    shifts = torch.tensor(_CODE_SHIFTS, device=values.device)
    codes = _from_fragments((values.transpose(3, 4)[..., None] >> shifts & 15) - 8).float()
    words = weight.scales.permute(0, 3, 2, 1)  # block of rows, tile, g, group
    both = torch.stack((words & 0xFFFF, words >> 16 & 0xFFFF), 2)
    floats = both.to(torch.int16).view(torch.float16).reshape(rows, -1).float()
    kept = codes * floats.repeat_interleave(weight.group // 2, 1)
    if weight.dense:
        pairs = kept.view(rows, columns // 128, 2, 16, 2).transpose(2, 3)
        return pairs.reshape(rows, columns // 2).to(dtype)
    return nibbles.scatter_kept(kept, _positions(weight.meta)).to(dtype)


def _positions(meta: Tensor) -> Tensor:
    """Undo `pack_meta`."""
    rows, columns = 64 * meta.shape[0], 64 * meta.shape[1]
    halves = meta.transpose(2, 3).reshape(-1, columns // 64, 4, 8, 4).permute(0, 2, 3, 1, 4)
    # block of rows, tile, g, block of columns, t; the halves of a word are of rows g and g + 8
    both = torch.stack((halves & 0xFFFF, halves >> 16 & 0xFFFF), 2)
    nibbles_ = both[..., None] >> 4 * torch.arange(4, device=meta.device) & 15
    pairs = nibbles_.reshape(rows, columns // 4)
    return torch.stack((pairs & 3, pairs >> 2), -1)


def _from_fragments(fragments: Tensor) -> Tensor:
    """Undo `_to_fragments`."""
    blocks, columns = fragments.shape[:2]
    split = fragments.reshape(blocks, columns, 2, 4, 8, 4, 2, 2, 2)
    # block, tile, row half, g, block of columns, step, column half, t, pair
    return split.permute(0, 3, 7, 4, 1, 2, 6, 5, 8).reshape(64 * blocks, 32 * columns)


def _to_fragments(kept: Tensor) -> Tensor:
    """Kept values [N, K/2] to [N/64, K/64, step, tile, lane, 8], in order a0 to a7."""
    rows, half = kept.shape
    # block, tile, row half, g, block of columns, step, column half, t, pair
    split = kept.reshape(rows // 64, 4, 2, 8, half // 32, 2, 2, 4, 2)
    ordered = split.permute(0, 4, 5, 1, 3, 7, 6, 2, 8)
    return ordered.reshape(rows // 64, half // 32, 2, 4, 32, 8)


def _padded(values: Tensor, indices: Tensor, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Values [N, K/2] and positions [N, K/4, 2] of whole blocks, and of pairs of blocks of K."""
    rows = -(-values.shape[0] // BLOCK_ROWS) * BLOCK_ROWS
    columns = -(-2 * values.shape[1] // WHOLE_COLUMNS) * WHOLE_COLUMNS
    kept = torch.tensor(_PADDING, dtype=torch.uint8, device=indices.device)
    positions = kept.expand(rows, columns // 4, 2).clone()
    positions[: indices.shape[0], : indices.shape[1]] = indices
    return _filled(values, rows, columns // 2, fill), positions


def _filled(matrix: Tensor, rows: int, columns: int, fill: int) -> Tensor:
    added = (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
    return functional.pad(matrix, added, value=fill)
