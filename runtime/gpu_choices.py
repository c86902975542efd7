"""Which tile each 2:4 linear of a model would get on a GPU, told without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..kernels.cuda.roofs import sparse_roof
from ..kernels.cuda.targets import ARCHITECTURES, CARDS, Card
from ..kernels.cuda.variants import Product, choose
from ..kernels.formats import Sparse24, Sparse24Int4
from .inspection import LinearReport

TOKENS = (1, 8, 32, 128, 512)


@dataclass(frozen=True)
class GpuChoice:
    """One shape and format of `count` linears with so many tokens.

    `roof_us` is the least time that the card's memory and tensor cores allow, not a measured one.
    No tile: the weight is written out as a dense matrix for the product.
    """

    format: str
    shape: tuple[int, int]
    group: int
    count: int
    tokens: int
    tile: tuple[int, int, int] | None  # rows of W, tokens, columns
    warps: int
    splits: int
    roof_us: float


def gpu_choices(linears: Sequence[LinearReport], card: str) -> list[GpuChoice]:
    """Of every kind of 2:4 linear, for some numbers of tokens.

    Raises:
        UsageError: the card is not known.
    """
    if card not in CARDS:
        raise UsageError(f"card {card!r} is none of {', '.join(CARDS)}")
    kinds = Counter(
        (row.format, row.shape, row.group or 0)
        for row in linears
        if row.format in (Sparse24.kind, Sparse24Int4.kind)
    )
    return [
        _choice(*kind, count, tokens, CARDS[card])
        for kind, count in kinds.items()
        for tokens in TOKENS
    ]


def _choice(
    format_: str, shape: tuple[int, int], group: int, count: int, tokens: int, card: Card
) -> GpuChoice:
    product = Product(tokens, *shape, "f16", group)
    chosen = choose(product, ARCHITECTURES[card.arch], card.multiprocessors)
    tile = chosen.tile
    return GpuChoice(
        format=format_,
        shape=shape,
        group=group,
        count=count,
        tokens=tokens,
        tile=None if tile is None else (tile.BN, tile.BM, 64 * tile.WK),
        warps=0 if tile is None else tile.warps,
        splits=chosen.splits,
        roof_us=sparse_roof(product, card).us,
    )
