"""The `marlin-24` layout, which others wrote and nobody reads any more, back to codes in rows.

A weight [N, K] of 4-bit codes, two of every four columns kept, is stored as

    weight_packed  int32 [K/32, 2N]   the kept codes + 8, transposed, in tiles of 16 x 16, and
                                      within each four of those in the order of `_tile_order`
    meta           int16 [K/32, 2N]   which columns are kept, in CUTLASS's interleaved order, but
                                      with another order of rows within 64 than torch's has
    scale_packed   fp16 [K/128, N]    or [1, N]; columns permuted within 64 or not at all

(compressed-tensors 0.11, `marlin_24.py`, and vLLM's kernel of that name; CUTLASS, host_reorder.h.)
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = 16
_INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)  # codes of a word
_SCALE_ORDER = tuple(8 * block + at for block in range(8) for at in (0, 4, 1, 5, 2, 6, 3, 7))
_META_COLUMNS = 16  # that a word of metadata stands for


def kept_codes(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Kept codes -8 to 7, int8 [rows, columns/2], of `weight_packed`."""
    shifts = 4 * torch.arange(8)
    nibbles = (packed.to(torch.int64)[..., None] >> shifts) & 15
    order = _tile_order()
    shuffled = nibbles.reshape(-1, len(order))
    tiles = torch.empty_like(shuffled)
    tiles[:, order] = shuffled
    half = columns // 2
    split = tiles.reshape(half // _TILE, rows // _TILE, _TILE, _TILE)
    return (split.transpose(1, 2).reshape(half, rows).T - 8).to(torch.int8)


def kept_positions(meta: Tensor, rows: int, columns: int) -> Tensor:
    """Which two of every four columns are kept, first < second: uint8 [rows, columns/4, 2]."""
    words = meta.reshape(-1)[_meta_places(rows, columns // _META_COLUMNS)]
    nibbles = (words.to(torch.int32)[..., None] >> 4 * torch.arange(4)) & 15
    pairs = nibbles.reshape(rows, columns // 4)
    return torch.stack((pairs & 3, pairs >> 2), -1).to(torch.uint8)


def scales(packed: Tensor, columns: int) -> Tensor:
    """Scales [rows, groups] of `scale_packed`; one group where a row has one scale."""
    groups, rows = packed.shape
    # Their writer compares the group with the number of kept columns.
    if groups == 1 or columns // groups >= columns // 2:
        return packed.T.contiguous()
    shuffled = packed.reshape(-1, len(_SCALE_ORDER))
    ordered = torch.empty_like(shuffled)
    ordered[:, torch.tensor(_SCALE_ORDER)] = shuffled
    return ordered.reshape(groups, rows).T.contiguous()


def _tile_order() -> Tensor:
    """Where the codes of 16 kept columns x 64 rows come from, in the order in which they stand."""
    found = []
    for lane in range(32):
        column = lane // 4
        start = column // 2 * 256 + column % 2 * 8
        kept = [2 * (lane % 4), 2 * (lane % 4) + 1, 2 * (lane % 4) + 8, 2 * (lane % 4) + 9]
        places = [16 * k + start + 4 * block for block in (0, 1) for k in kept]
        for step in range(4):
            found += [places[at] + step for at in _INTERLEAVE]
    return torch.tensor(found)


def _meta_places(rows: int, words: int) -> Tensor:
    """Where the word of a row and 16 columns stands in the flat metadata: int64 [rows, words]."""
    row, word = torch.arange(rows)[:, None], torch.arange(words)[None, :]
    row = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
    row, word = row.expand(rows, words), word.expand(rows, words)
    # Blocks of 2 x 2 are transposed.
    right = ((row % 2 == 0) & (word % 2 == 1)).long()
    below = ((row % 2 == 1) & (word % 2 == 0)).long()
    row, word = row + right - below, word - right + below
    return word // 2 * (2 * rows) + row * 2 + word % 2
