"""Which tile each packed product of a model would get on a GPU, told without one.

Products are those of the decoder for GPUs (gpu_decoder.py), which multiplies by q, k and v
together, and by gate and up, where they are stored alike. They are known by the names of its
models' linears, so that a model which that decoder lacks is told of as if it had it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..kernels.cuda.fragments import BLOCK_COLUMNS, WHOLE_COLUMNS
from ..kernels.cuda.roofs import sparse_roof
from ..kernels.cuda.targets import ARCHITECTURES, CARDS, Card
from ..kernels.cuda.variants import Product, choose
from ..kernels.formats import Int4, Sparse24, Sparse24Int4
from .inspection import LinearReport

TOKENS = (1, 8, 32, 128, 512)
_PACKED = (Sparse24.kind, Sparse24Int4.kind, Int4.kind)
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_Kind = tuple[str, tuple[int, int], int]  # format, shape, group


@dataclass(frozen=True)
class GpuChoice:
    """One shape and format of `count` products with so many tokens.

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
    """Of every kind of packed product, for some numbers of tokens.

    Raises:
        UsageError: the card is not known.
    """
    known = {name.lower(): name for name in CARDS}
    if card.lower() not in known:
        raise UsageError(f"card {card!r} is none of {', '.join(CARDS)}")
    card = known[card.lower()]
    kinds = Counter(kind for kind in _products(linears) if kind[0] in _PACKED)
    return [
        _choice(kind, count, tokens, CARDS[card])
        for kind, count in kinds.items()
        for tokens in TOKENS
    ]


def _products(linears: Sequence[LinearReport]) -> Iterator[_Kind]:
    """What is multiplied by, in the order of the linears; of several together, of their first."""
    known = {row.name: _kind(row) for row in linears}
    done = set[str]()
    for name, (format_, (rows, columns), group) in known.items():
        if name in done:
            continue
        parent, _, last = name.rpartition(".")
        names = next((each for each in _TOGETHER if last in each), (last,))
        every = [f"{parent}.{each}" if parent else each for each in names]
        alike = [known.get(each) for each in every]
        if {kind and (kind[0], kind[1][1], kind[2]) for kind in alike} == {
            (format_, columns, group)
        }:
            done.update(every)
            rows = sum(kind[1][0] for kind in alike if kind)
        yield format_, (rows, columns), group


def _kind(row: LinearReport) -> _Kind:
    return row.format, row.shape, row.group or 0


def _choice(kind: _Kind, count: int, tokens: int, card: Card) -> GpuChoice:
    format_, (rows, columns), group = kind
    if dense := format_ == Int4.kind:
        group = WHOLE_COLUMNS if group >= BLOCK_COLUMNS else group  # as fragments have it
    product = Product(tokens, rows, 2 * columns if dense else columns, "f16", group, dense)
    chosen = choose(product, ARCHITECTURES[card.arch], card.multiprocessors)
    tile = chosen.tile
    return GpuChoice(
        format=format_,
        shape=(rows, columns),
        group=kind[2],
        count=count,
        tokens=tokens,
        tile=None if tile is None else (tile.BN, tile.BM, 64 * tile.WK),
        warps=0 if tile is None else tile.warps,
        splits=chosen.splits,
        roof_us=sparse_roof(product, card).us,
    )
