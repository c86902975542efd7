"""Which tiles the sparse product comes in, and which of them a shape gets. Knows numbers only.

The rule is a static one: fewest tokens that hold the batch, a tile of rows that divides them, and
splits of K until every multiprocessor has two programs. What a GPU measures is to overrule it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .targets import Architecture

_HALF_BYTES = 2
_PROGRAMS_WANTED = 2  # for every multiprocessor
_LEAST_STEPS = 8  # of a split: fewer do not pay for filling the pipeline
_MOST_SPLITS = 16


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

    def shared_bytes(self, group: int) -> int:
        """Shared memory of a program: its stages, or the parts of its warps along K."""
        columns = 64 * self.WK
        tokens = _HALF_BYTES * self.BM * columns
        kept = self.BN * columns // 2
        weights = kept // 2 if group else kept * _HALF_BYTES
        metadata = self.BN * columns // 8
        parts = 4 * self.WK * self.BM * self.BN if self.WK > 1 else 0
        return max(self.stages * (tokens + weights + metadata), parts)


# In the order in which `choose` tries them.
_DECODE = (
    Tile(64, 8, 1, 2, 1, 4, registers=128),
    Tile(64, 16, 1, 2, 1, 4, registers=168),
    Tile(64, 32, 1, 2, 1, 4),
)
_PREFILL = (
    Tile(128, 64, 2, 1, 1, 4),
    Tile(256, 128, 4, 1, 2, 3),
    Tile(128, 128, 2, 1, 2, 3),
)
TILES = (*_DECODE, *_PREFILL)


@dataclass(frozen=True)
class Variant:
    """All that the sparse product is compiled for.

    Attributes:
        kind: of tokens, outputs and float weights: f16 or bf16.
        group: columns that share a scale; 0 where weights are floats.
        whole_k: K is a multiple of 128, so that no columns of tokens are missing.
        splits: whether K is parted among programs, whose fp32 parts are added by another kernel.
        bias, residual: what is added to the result before it is rounded.
    """

    tile: Tile
    kind: str
    group: int
    whole_k: bool
    splits: bool
    bias: bool = False
    residual: bool = False

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
    def stored(self) -> int:
        """Neighbouring results of a lane: 16 bytes."""
        return 4 if self.splits else 8


@dataclass(frozen=True)
class Product:
    """A product to be computed: x [M, K] and a weight [N, K]; see Variant for the rest."""

    M: int
    N: int
    K: int
    kind: str
    group: int


@dataclass(frozen=True)
class Choice:
    """A tile, and among how many programs K is parted."""

    tile: Tile
    splits: int


def choose(product: Product, arch: Architecture, multiprocessors: int) -> Choice:
    """The tile of a product on a GPU of so many multiprocessors."""
    tile = next(
        (tile for tile in _DECODE if product.M <= tile.BM),
        None,
    ) or _prefill_tile(product, arch)
    if tile.BM >= 64:
        return Choice(tile, 1)
    programs = -(-product.N // tile.BN) * -(-product.M // tile.BM)
    steps, splits = -(-product.K // (64 * tile.WK)), 1
    while (
        programs * splits < _PROGRAMS_WANTED * multiprocessors
        and steps // (2 * splits) >= _LEAST_STEPS
        and splits < _MOST_SPLITS
    ):
        splits *= 2
    return Choice(tile, splits)


def _prefill_tile(product: Product, arch: Architecture) -> Tile:
    """The smallest batch that holds the tokens, then the widest tile of rows that divides N."""
    fitting = [
        tile for tile in _PREFILL if tile.shared_bytes(product.group) <= arch.shared_per_program
    ]
    enough = [tile for tile in fitting if min(product.M, 128) <= tile.BM]
    least = min(tile.BM for tile in enough)
    same = [tile for tile in enough if least == tile.BM]
    dividing = [tile for tile in same if product.N % tile.BN == 0]
    return (dividing or same[-1:])[0]


def all_variants(arch: Architecture) -> Iterator[Variant]:
    """What `choose` can lead to on an architecture: plain, and with all that may come on top.

    That is columns of tokens that are missing and, where K is not parted, a bias and a residual.
    """
    for tile in TILES:
        for kind in ("f16", "bf16"):
            for group in (0, 128, 64, 32):
                if tile.shared_bytes(group) > arch.shared_per_program:
                    continue
                for splits in (False, True) if tile in _DECODE else (False,):
                    yield Variant(tile, kind, group, whole_k=True, splits=splits)
                    yield Variant(tile, kind, group, False, splits, not splits, not splits)
