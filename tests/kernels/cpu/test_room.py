"""Weights lie where they are read fast: one behind the other, on large pages."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from halfweave.kernels.cpu import room as room_module
from halfweave.kernels.cpu.packed import linear, pack_weight, round_weight
from halfweave.kernels.cpu.room import Room, aligned_bytes
from halfweave.kernels.formats import Int8
from support.cpu_levels import LEVELS_HERE, at_level

PIECE = 2**26


def test_what_is_taken_begins_on_a_line_and_is_nobody_elses() -> None:
    room = Room()
    sizes = [1, 64, 65, 1000, 2**20, PIECE - 2**19, PIECE + 1, 3]  # pieces end in between
    taken = [room.take(size) for size in sizes]
    for i, each in enumerate(taken):
        assert len(each) == sizes[i]
        assert each.data_ptr() % 64 == 0
        each.fill_(i)
    assert all(bool((each == i).all()) for i, each in enumerate(taken))
    assert taken[1].data_ptr() == taken[0].data_ptr() + 64


def test_weights_in_a_room_are_those_on_the_heap() -> None:
    library, room = at_level(LEVELS_HERE[0]), Room()
    floats, x = torch.randn(40, 100), torch.randn(3, 100)
    for make in (
        lambda room: pack_weight(library, Int8.from_dense(floats), room),
        lambda room: round_weight(library, floats, 4, room),
    ):
        packed, alone = make(room), make(None)
        assert torch.equal(packed.data, alone.data)
        assert torch.equal(linear(library, packed, x, None), linear(library, alone, x, None))


def is_mapped(address: int) -> bool:
    ranges = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()
    ]
    return any(int(first, 16) <= address < int(last, 16) for first, last in ranges)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at memory as Linux does")
def test_memory_is_given_back_when_all_that_lay_in_it_is_gone() -> None:
    room = Room()
    first, second = room.take(2**20), room.take(2**20)
    where = first.data_ptr()
    del room, first
    gc.collect()
    assert is_mapped(where)  # `second` lies behind
    second.fill_(1)
    del second
    gc.collect()
    assert not is_mapped(where)


def test_without_large_pages_all_is_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(room_module.mmap, "MADV_HUGEPAGE", raising=False)
    taken = Room().take(1000)
    assert taken.data_ptr() % 64 == 0 and len(aligned_bytes(0)) == 0
    taken.fill_(1)
