"""What is no finite number must stay none: a token that has one gives nothing that looks like an
answer, and no other token notices."""

from __future__ import annotations

import pytest
import torch
from halfweave.kernels.cpu.packed import PackedWeight, linear, pack_weight, round_weight
from halfweave.kernels.formats import Int4, Int8, Sparse24Int4
from support.cpu_levels import LEVELS_HERE, at_level
from torch import Tensor

ROWS, COLUMNS = 20, 100  # a ragged last tile, and a ragged last block
AT = (0, 5, 31, 40, 63, 99)  # every lane, and every step of a block, has its way through


def packed(kind: str, level: str) -> PackedWeight:
    library = at_level(level)
    generator = torch.Generator().manual_seed(3)
    if kind.startswith("rounded"):  # as a head is
        weight = torch.randn(ROWS, COLUMNS, generator=generator)
        return round_weight(library, weight, int(kind.split()[1]))
    if kind == Int8.kind:
        return pack_weight(
            library, Int8.from_dense(torch.randn(ROWS, COLUMNS, generator=generator))
        )
    codes = torch.randint(-8, 8, (ROWS, COLUMNS), generator=generator)
    scale = torch.ones(ROWS, -(-COLUMNS // 32)).half()
    if kind == Int4.kind:
        return pack_weight(library, Int4.from_codes(codes, scale, 32))
    keep = (torch.arange(COLUMNS) % 4 < 2).expand(ROWS, COLUMNS)  # drops half of AT
    return pack_weight(library, Sparse24Int4.from_codes(codes, keep, scale, 32))


def tokens_with(value: float, column: int, tokens: int) -> Tensor:
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(column))
    x[-1, column] = value
    return x


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize(
    "kind", [Sparse24Int4.kind, Int4.kind, Int8.kind, "rounded 8", "rounded 4"]
)
@pytest.mark.parametrize("value", [float("nan"), float("-nan"), float("inf"), float("-inf")])
def test_an_input_that_is_no_number_makes_every_output_of_its_token_none(
    value: float, kind: str, level: str
) -> None:
    library, weight = at_level(level), packed(kind, level)
    for column in AT:
        for tokens in (1, 2, 9):
            x = tokens_with(value, column, tokens)
            found = linear(library, weight, x, torch.zeros(ROWS))
            assert not found[-1].isfinite().any(), (column, tokens)
            wanted = linear(library, weight, x[:-1], torch.zeros(ROWS))
            assert torch.equal(found[:-1], wanted), (column, tokens)
