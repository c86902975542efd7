"""The sparse product, compiled for GPUs and emulated, against the torch oracle."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import triton
from halfweave.kernels.cuda.launch import MOST_PROGRAMS
from halfweave.kernels.cuda.targets import ARCHITECTURES
from halfweave.kernels.cuda.variants import TILES, Product, Tile, candidates
from ptx.numbers import PTXError
from support.emulated import BOUNDS, Case, built, error_of, far_error

D8, D16, D32, T8, T16, T32, NARROW, WIDE = TILES
# On sm_80, where every tile has all its steps in shared memory.
CASES = [
    Case(T8, 5, 128, 512),
    Case(T8, 8, 64, 640, group=128),
    Case(T8, 8, 128, 576, group=64),
    Case(T8, 1, 64, 512, "bf16", 32),
    Case(T8, 8, 192, 576, "bf16", bias=True, residual=True),
    Case(T8, 3, 80, 1152, group=64, splits=2),
    Case(T16, 13, 64, 512, group=128, bias=True),
    Case(T32, 40, 64, 256, group=32),
    Case(D8, 5, 128, 768),
    Case(D8, 8, 64, 1000, group=64),
    Case(D8, 1, 80, 1536, "bf16", 128, splits=2),
    Case(D16, 13, 64, 512, group=32, bias=True),
    Case(D32, 32, 64, 512, "bf16", residual=True),
    Case(D8, 8, 64, 512, group=64, dense=True),
    Case(D8, 5, 80, 384, group=32, dense=True, splits=2),
    Case(T8, 3, 64, 576, "bf16", 128, dense=True, bias=True),
    Case(T16, 13, 64, 200, group=64, dense=True),
    Case(NARROW, 40, 128, 192, group=32, dense=True, residual=True),
    Case(NARROW, 64, 192, 384, group=64),
    Case(NARROW, 70, 128, 512, splits=2),
    Case(WIDE, 130, 256, 192, "bf16", 128, residual=True),
    Case(T8, 5, 160, 512, group=64, gated=True),
    Case(D8, 1, 64, 1536, "bf16", 128, bias=True, gated=True),
    Case(D16, 13, 64, 512, gated=True),
    Case(NARROW, 40, 96, 384, "bf16", 64, bias=True, gated=True),
    Case(WIDE, 70, 256, 128, gated=True),
    Case(T16, 16, 96, 256, group=64, dense=True, gated=True),
]

# Tiles that are cut to the shared memory of consumer cards: two steps of three or four, and three.
SMALL = [
    Case(replace(NARROW, stages=2), 40, 128, 640, residual=True, arch=86),
    Case(replace(NARROW, stages=2), 33, 128, 256, "bf16", arch=89),
    Case(replace(D32, stages=2), 20, 64, 1280, splits=2, arch=86),
    Case(replace(D16, stages=3), 13, 64, 1280, bias=True, arch=86),
    Case(replace(WIDE, stages=3), 66, 256, 384, arch=86),
    Case(T8, 5, 64, 640, group=64, arch=86),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_those_of_the_oracle(case: Case) -> None:
    assert error_of(case) < BOUNDS[case.kind]


@pytest.mark.parametrize("steps", range(1, 10))
@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("tile", [T8, D8], ids=["two along K", "four along K"])
def test_any_number_of_steps_fits_the_stages(tile: Tile, steps: int, group: int) -> None:
    assert error_of(Case(tile, 8, 64, 64 * tile.WK * steps, group=group)) < BOUNDS["f16"]


def test_parts_of_a_split_sum_are_exact_in_fp32() -> None:
    assert error_of(Case(T8, 8, 64, 1152, splits=4)) < 1e-6  # nine steps: 3, 3, 3 and none


@pytest.mark.parametrize("group", [0, 64])
def test_memory_is_read_without_waste(group: int) -> None:
    """Whole sectors, no bank conflicts but those of the sum over warps, and nothing twice."""
    seen: dict[str, tuple[int, int, int]] = {}
    case = Case(T8, 8, 64, 1024, group=group)
    error_of(case, look=lambda emulator: seen.update(emulator.traffic))
    for what in ("cp.async.global", "cp.async.shared", "ldmatrix"):
        _, taken, least = seen[what]
        assert taken == least, what
    bits = 64 * 1024 * (3 if group else 9) + 8 * 1024 * 16
    assert seen["cp.async.global"][2] * 32 == bits // 8


def drop(pattern: str, which: int) -> Callable[[str], str]:
    """Take one match out of a program."""

    def mutate(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))
        return ptx[: found[which].start()] + ptx[found[which].end() :]

    return mutate


def change(pattern: str, to: str) -> Callable[[str], str]:
    """Replace the first match in a program."""

    def mutate(ptx: str) -> str:
        changed = re.sub(pattern, to, ptx, count=1)
        assert changed != ptx
        return changed

    return mutate


MUTANTS = {
    "a wait relaxed": change(r"cp\.async\.wait_group\s+2", "cp.async.wait_group 3"),
    "a wrong selector": change(r"(mma\.sp[^;]*), 1;", r"\1, 0;"),
    "a wrong mask": change("0x00f000f0", "0x000f000f"),
    "a transposed ldmatrix": change(r"m8n8\.x4\.shared", "m8n8.x4.trans.shared"),
    "a copy of nothing": change(r"0x10, 0x10", "0x10, 0x0"),
    "wrong metadata": change(r"(mma\.sp[^;]*\}), (%r\d+), 0;", r"\1, %r1, 0;"),
    "a scale of another row": change("0x1010", "0x3232"),
}


def case_of(name: str) -> Case:
    """A product that a mutant spoils."""
    if "scale" in name:
        return Case(NARROW, 64, 128, 256, group=64)
    return Case(T8, 8, 64, 640, group=64)


def caught(case: Case, mutate: Callable[[str], str]) -> bool:
    try:
        return not error_of(case, mutate) < BOUNDS[case.kind]
    except PTXError:
        return True


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_program_is_seen(name: str) -> None:
    assert caught(case_of(name), MUTANTS[name])


def barriers(ptx: str) -> Iterator[int]:
    yield from range(len(re.findall(r"bar\.sync[^;]*;", ptx)))


@pytest.mark.parametrize("group", [0, 64])
def test_a_program_without_barriers_is_seen(group: int) -> None:
    case = Case(T8, 8, 64, 640, group=group)
    assert caught(case, lambda ptx: re.sub(r"bar\.sync[^;]*;", "", ptx))


@pytest.mark.skipif(
    triton.__version__.startswith(("3.7", "3.8")),
    reason="Triton before 3.9 puts in two barriers a step, each of which makes up for the other",
)
@pytest.mark.parametrize("group", [0, 64])
def test_every_barrier_is_needed_and_its_absence_seen(group: int) -> None:
    """Which one is needed depends on how many steps there are beyond whole turns of the stages."""
    cases = [Case(T8, 8, 64, 128 * steps, group=group) for steps in (4, 5, 6, 7)]
    ptx = built(cases[0].variant, 80).compiled.ptx
    surviving = [
        which
        for which in barriers(ptx)
        if not any(caught(case, drop(r"bar\.sync[^;]*;", which)) for case in cases)
    ]
    # Behind the last wait the compiler puts one that only other shapes need.
    assert len(surviving) <= 1


def test_offsets_beyond_32_bits_do_not_wrap() -> None:
    """The last tokens of the longest grid: over 2^31 words of x, and results, before them."""
    tokens = MOST_PROGRAMS * NARROW.BM
    case = Case(NARROW, tokens, 576, 1152, residual=True)
    assert min(case.K // 2, case.N) * (tokens - NARROW.BM) > 2**31
    assert far_error(case) < BOUNDS["f16"]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_cards_of_less_shared_memory_have_fewer_steps_in_it(case: Case) -> None:
    """As many as `choose` leaves there; steps of K go once around them, and further."""
    M, N, K = case.M, case.N, case.K
    product = Product(M, N, K, case.kind, case.group, case.dense)
    assert case.tile in [choice.tile for choice in candidates(product, ARCHITECTURES[case.arch])]
    assert error_of(case) < BOUNDS[case.kind]
