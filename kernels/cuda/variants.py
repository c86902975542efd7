"""Which tiles the sparse product comes in, and which of them a shape gets. Knows numbers only.

The rule is what a sweep over tiles and splits on an H200 came to (docs/gpu.md): warps along K where
K has room for them; splits of K until there are programs enough to keep memory busy, of which codes
need several times those that floats do, since half of their time is not loading; and for prompts
two tiles. Other architectures get the same tiles, with fewer steps in shared memory where that is
smaller; nothing was measured there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product as product_of

from .targets import Architecture

_HALF_BYTES = 2
_MOST_SPLITS = 8
# Tokens, where dense products have faster instructions; and for dense weights everywhere.
_MOST_CODED, _MOST_FLOATS, _MOST_DENSE = 256, 640, 64
_DEEP_COLUMNS = 256  # of a step of tiles with four warps along K


@dataclass(frozen=True)
class Tile:
    """How a program's work is cut; the names are those of sparse_gemm.py.

    `stages` steps of 64 WK columns are in shared memory at once; `registers` are the most that a
    thread may have. Without a limit ptxas saves some for programs that shared memory does not
    admit, and spills for that.
    """

    BN: int
    BM: int
    WN: int
    WK: int
    WM: int
    stages: int
    registers: int = 255

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return self.WN * self.WK * self.WM

    def shared_bytes(self, group: int, dense: bool = False) -> int:
        """Shared memory of a program: its stages, or the parts of its warps along K."""
        columns = 64 * self.WK
        tokens = _HALF_BYTES * self.BM * columns
        kept = self.BN * columns // 2
        weights = kept // 2 if group else kept * _HALF_BYTES
        metadata = 0 if dense else self.BN * columns // 8
        parts = 4 * self.WK * self.BM * self.BN if self.WK > 1 else 0
        return max(self.stages * (tokens + weights + metadata), parts)


_DEEP = (
    Tile(64, 8, 1, 4, 1, 4, registers=128),
    Tile(64, 16, 1, 4, 1, 4, registers=168),
    Tile(64, 32, 1, 4, 1, 4),
)
_SHALLOW = (  # for K that is no multiple of 256
    Tile(64, 8, 1, 2, 1, 4, registers=128),
    Tile(64, 16, 1, 2, 1, 4, registers=168),
    Tile(64, 32, 1, 2, 1, 4),
)
_NARROW, _WIDE = Tile(128, 64, 2, 2, 1, 3), Tile(256, 64, 4, 1, 1, 4)
TILES = (*_DEEP, *_SHALLOW, _NARROW, _WIDE)


@dataclass(frozen=True)
class Variant:
    """All that the sparse product is compiled for.

    Attributes:
        kind: of tokens, outputs and float weights: f16 or bf16.
        group: columns that share a scale; 0 where weights are floats.
        whole_k: K is a multiple of 128, so that no columns of tokens are missing.
        splits: whether K is parted among programs, whose fp32 parts are added by another kernel.
        bias, residual: what is added to the result before it is rounded.
        dense: the weight is two 2:4 ones (fragments.py); K is that of both.
        gated: rows of a gate and of what it lets through take turns, eight of each (linear.py);
            the result is their product. Not with splits or a residual.
    """

    tile: Tile
    kind: str
    group: int
    whole_k: bool
    splits: bool
    bias: bool = False
    residual: bool = False
    dense: bool = False
    gated: bool = False

    @property
    def BN(self) -> int:  # noqa: N802
        """Rows of W of a program. (Gluon reads sizes as attributes of the variant.)"""
        return self.tile.BN

    @property
    def BM(self) -> int:  # noqa: N802
        """Tokens of a program."""
        return self.tile.BM

    @property
    def WN(self) -> int:  # noqa: N802
        """Warps along rows."""
        return self.tile.WN

    @property
    def WK(self) -> int:  # noqa: N802
        """Warps along K."""
        return self.tile.WK

    @property
    def WM(self) -> int:  # noqa: N802
        """Warps along tokens."""
        return self.tile.WM

    @property
    def stages(self) -> int:
        """Steps in shared memory."""
        return self.tile.stages

    @property
    def scale_sums(self) -> bool:
        """Whether scales are applied to sums: exact, and twice the registers for sums."""
        return self.BM < 64

    @property
    def scaled_columns(self) -> int:
        """Columns of x that share a scale: 64 serve for 128 too where the weight is dense."""
        return 64 if self.dense and self.group > 64 else self.group

    @property
    def step_words(self) -> int:
        """Pairs of columns of a token in a step."""
        return 16 * self.WK if self.dense else 32 * self.WK

    @property
    def extras(self) -> list[str]:
        """What tells it from others of its tile and format, in words."""
        kinds = ("split", self.splits), ("ragged", not self.whole_k), ("gated", self.gated)
        return [word for word, there in kinds if there]

    @property
    def width(self) -> int:
        """Results of a program for each of its tokens."""
        return self.BN // 2 if self.gated else self.BN

    @property
    def stored(self) -> int:
        """Neighbouring results of a lane: 16 bytes."""
        return 4 if self.splits else 8

    @property
    def summed(self) -> int:
        """Neighbouring sums of a lane, of which these results are made."""
        return 2 * self.stored if self.gated else self.stored


@dataclass(frozen=True)
class Product:
    """A product to be computed: x [M, K] and a weight [N, K]; see Variant for the rest.

    Where it is `dense`, K is that of the two 2:4 weights, twice that of x.
    """

    M: int
    N: int
    K: int
    kind: str
    group: int
    dense: bool = False


@dataclass(frozen=True)
class Choice:
    """A tile, and among how many programs K is parted.

    No tile: the weight is written out as a dense matrix and multiplied by torch.
    """

    tile: Tile | None
    splits: int

    @property
    def name(self) -> str:
        """What tells it from the other `candidates` of a product."""
        tile = self.tile
        if tile is None:
            return "written out"
        return f"{tile.BN}x{tile.BM} w{tile.WN}x{tile.WK}x{tile.WM} s{self.splits}"


def choose(product: Product, arch: Architecture, multiprocessors: int) -> Choice:
    """The tile of a product on a GPU of so many multiprocessors."""
    if _most_tokens(product, arch) < product.M:
        return Choice(None, 1)
    tile = _decode_tile(product) if product.M <= 32 else _prefill_tile(product, multiprocessors)
    programs = -(-product.N // tile.BN) * -(-product.M // tile.BM)
    steps, splits = -(-product.K // (64 * tile.WK)), 1
    wanted = _programs_wanted(tile, product.group) * multiprocessors
    while 2 * splits * programs <= wanted and 4 * splits <= steps and splits < _MOST_SPLITS:
        splits *= 2
    return Choice(_fitting(tile, product.group, product.dense, arch), splits)


def candidates(product: Product, arch: Architecture) -> list[Choice]:
    """What `choose` may be overruled by: all that `all_variants` builds and that serves a product.

    Of tiles for few tokens those of the fewest that hold the batch.
    """
    wanted = tokens_held(product.M)
    found = [Choice(None, 1)]
    for tile in TILES:
        if wanted != tile.BM or not _is_built(tile, product.group, product.dense):
            continue
        steps, columns = -(-product.K // (64 * tile.WK)), -(-product.K // 128) * 128
        if columns % (64 * tile.WK):
            continue
        fitting, most = _fitting(tile, product.group, product.dense, arch), _most_splits(tile)
        parts = (1 << power for power in range(most.bit_length()))
        found += [Choice(fitting, splits) for splits in parts if splits == 1 or 2 * splits <= steps]
    return found


def tokens_held(tokens: int) -> int:
    """Tokens of the tiles that serve so many: numbers with the same share their candidates."""
    return next((tile.BM for tile in _DEEP if tokens <= tile.BM), _WIDE.BM)


def _is_built(tile: Tile, group: int, dense: bool) -> bool:
    """Codes and many sums leave no registers; nor do two weights in a wide tile."""
    return not (tile == _DEEP[2] and group) and not (tile == _WIDE and dense)


def _most_splits(tile: Tile) -> int:
    return 1 if tile == _WIDE else _MOST_SPLITS


def _most_tokens(product: Product, arch: Architecture) -> float:
    """From more on it is faster to write the weight out as a dense matrix."""
    if product.dense:
        return _MOST_DENSE
    if not arch.wide_products:
        return math.inf
    return _MOST_CODED if product.group else _MOST_FLOATS


def _decode_tile(product: Product) -> Tile:
    """The fewest tokens that hold the batch. Many sums and codes leave no registers for more."""
    crowded = product.group and product.M > 16
    deep = -(-product.K // 128) * 128 % _DEEP_COLUMNS == 0 and not crowded
    return next(tile for tile in (_DEEP if deep else _SHALLOW) if product.M <= tile.BM)


def _prefill_tile(product: Product, multiprocessors: int) -> Tile:
    """The wide one where it gives every multiprocessor something to do."""
    programs = -(-product.N // _WIDE.BN) * -(-product.M // _WIDE.BM)
    enough = programs >= multiprocessors and product.N % _WIDE.BN == 0
    return _WIDE if enough and not product.dense else _NARROW


def _programs_wanted(tile: Tile, group: int) -> float:
    """For every multiprocessor, at most."""
    if tile.BM >= 64 or not group:
        return 1.5
    return 3 if tile.BM == 16 else 4


def _fitting(tile: Tile, group: int, dense: bool, arch: Architecture) -> Tile:
    """The tile with as many steps in shared memory as there is room for."""
    while tile.shared_bytes(group, dense) > arch.shared_per_program:
        tile = replace(tile, stages=tile.stages - 1)
    return tile


def all_variants(arch: Architecture) -> Iterator[Variant]:
    """What `choose` can lead to on an architecture: plain, and with all that may come on top.

    That is columns of tokens that are missing and, where K is not parted, a bias and a residual, or
    a gate.
    """
    formats = ((0, False), (128, False), (64, False), (32, False), (128, True), (32, True))
    for tile, kind, (group, dense) in product_of(TILES, ("f16", "bf16"), formats):
        if not _is_built(tile, group, dense):
            continue
        fitting = _fitting(tile, group, dense, arch)
        for splits in (False, True) if _most_splits(tile) > 1 else (False,):
            yield Variant(fitting, kind, group, True, splits, dense=dense)
            yield Variant(fitting, kind, group, False, splits, not splits, not splits, dense)
        yield Variant(fitting, kind, group, False, False, bias=True, dense=dense, gated=True)
