"""The C++ kernels against the plain oracle, at every level that this machine can run."""

from __future__ import annotations

import ctypes.util
import hashlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from halfweave.errors import HalfweaveError, UsageError
from halfweave.kernels import reference
from halfweave.kernels.cpu import library as library_module
from halfweave.kernels.cpu.bandwidth import read_bandwidth, read_sum
from halfweave.kernels.cpu.library import LEVELS, Library, WeightStruct, load, open_level
from halfweave.kernels.cpu.packed import (
    CODED,
    PackedWeight,
    linear,
    pack_weight,
    round_weight,
)
from halfweave.kernels.formats import Dense, Int4, Int8, PackedLinear, Sparse24, Sparse24Int4
from support.cpu_levels import LEVELS_HERE, UNDER_TEST, at_level, native_levels
from torch import Tensor
from torch.nn import functional

# (N, K, group): whole tiles and ragged ones, short last groups, K that is no multiple of a block,
# pieces of more than one of the kernel's own, one row, one block.
SHAPES = [
    (16, 32, 32),
    (48, 576, 64),
    (37, 576, 128),
    (100, 136, 64),
    (72, 72, 32),
    (20, 1540, 128),
    (1, 4, 32),
    (33, 1024, 64),
]
TOKENS = (1, 2, 7, 8, 9, 40)
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = [*sorted(CODED), *(f"{kind} {name}" for kind in ("sparse24", "dense") for name in FLOATS)]


@pytest.fixture(params=LEVELS_HERE)
def library(request: pytest.FixtureRequest) -> Library:
    return at_level(request.param)


def example(kind: str, rows: int, columns: int, group: int, seed: int = 0) -> PackedLinear:
    generator = torch.Generator().manual_seed(seed)
    if kind not in CODED:
        return float_example(kind, torch.randn(rows, columns, generator=generator))
    if kind == Int8.kind:
        return Int8.from_dense(torch.randn(rows, columns, generator=generator))
    codes = torch.randint(-8, 8, (rows, columns), generator=generator)
    scale = (torch.rand(rows, -(-columns // group), generator=generator) / 100 + 0.001).half()
    if kind == Int4.kind:
        return Int4.from_codes(codes, scale, group)
    keep = random_masks(torch.rand(rows, columns, generator=generator))
    return Sparse24Int4.from_codes(codes, keep, scale, group)


def float_example(kind: str, weight: Tensor) -> PackedLinear:
    name, dtype = kind.split()
    values = weight.to(FLOATS[dtype])
    if name == Dense.kind:
        return Dense(values)
    return Sparse24.from_dense(torch.where(random_masks(weight), values, 0))


def random_masks(order: Tensor) -> Tensor:
    """The two largest of every four: bool [N, K]."""
    chosen = order.unflatten(1, (-1, 4)).topk(2, dim=-1).indices
    keep = torch.zeros(*chosen.shape[:2], 4, dtype=torch.bool)
    return keep.scatter_(-1, chosen, True).flatten(1)


def in_8_bits(x: Tensor) -> Tensor:
    """What the kernels make of their inputs: 255 levels per token and 32 columns."""
    groups = functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    step = groups.abs().amax(dim=-1, keepdim=True) / 127
    return (torch.round(groups / step.clamp_min(1e-30)) * step).flatten(-2)[..., : x.shape[-1]]


def inputs(tokens: int, columns: int) -> Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
    return x * (1 + 20 * (torch.arange(columns) % 50 == 3))  # some channels are loud


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_linears_are_those_of_the_oracle_on_the_inputs_that_the_kernels_see(
    library: Library, kind: str, shape: tuple[int, int, int]
) -> None:
    rows, columns, group = shape
    weight = example(kind, rows, columns, group)
    packed = pack_weight(library, weight)
    bias = torch.randn(rows)
    for tokens in TOKENS:
        x = inputs(tokens, columns)
        found = linear(library, packed, x, bias)
        seen = in_8_bits(x) if kind in CODED else x
        wanted = seen.double() @ weight.unpack().double().T + bias.double()
        assert (found - wanted).abs().max() < 2e-6 * wanted.abs().max(), tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_gets_the_same_bits_whatever_stands_beside_it(library: Library, kind: str) -> None:
    packed = pack_weight(library, example(kind, 50, 1540, 64))
    x, bias = inputs(37, 1540), torch.randn(50)
    together = linear(library, packed, x, bias)
    assert torch.equal(together, torch.cat([linear(library, packed, t, bias) for t in x.split(1)]))
    assert torch.equal(together, torch.cat([linear(library, packed, t, bias) for t in x.split(5)]))


@pytest.mark.parametrize("kind", sorted(CODED))
def test_the_most_extreme_codes_and_inputs_do_not_overflow(library: Library, kind: str) -> None:
    """Every product as large as it gets and of one sign: 16-bit sums are at their limit."""
    rows, columns = 16, 256
    scale = torch.ones(rows, columns // 32).half()
    if kind == Int8.kind:
        weight: PackedLinear = Int8(
            torch.full((rows, columns), -127, dtype=torch.int8), scale[:, :1]
        )
    elif kind == Int4.kind:
        weight = Int4.from_codes(torch.full((rows, columns), -8), scale, 32)
    else:
        keep = (torch.arange(columns) % 4 < 2).expand(rows, columns)
        weight = Sparse24Int4.from_codes(torch.full((rows, columns), -8), keep, scale, 32)
    for sign in (1.0, -1.0):
        x = torch.full((9, columns), sign)
        found = linear(library, pack_weight(library, weight), x, None)
        torch.testing.assert_close(found, reference.linear(x, weight), rtol=1e-5, atol=0)


def test_levels_agree_to_the_last_bits() -> None:
    x = inputs(11, 576)
    for kind in KINDS:
        weight = example(kind, 100, 576, 64)
        found = []
        for library in map(at_level, LEVELS_HERE):
            found.append(linear(library, pack_weight(library, weight), x, None))
        for other in found[1:]:
            torch.testing.assert_close(
                found[0], other, rtol=1e-5, atol=1e-5 * float(other.abs().max())
            )


def test_inputs_that_are_zero_or_next_to_it_give_the_bias(library: Library) -> None:
    packed = pack_weight(library, example("sparse24_int4", 20, 64, 32))
    bias = torch.randn(20)
    for size in (0.0, 1e-38, 1e-42):
        found = linear(library, packed, torch.full((3, 64), size), bias)
        torch.testing.assert_close(found, bias.expand(3, 20), rtol=0, atol=1e-30)


def test_any_shape_of_inputs_and_none_at_all(library: Library) -> None:
    weight = example("int4", 20, 64, 32)
    packed = pack_weight(library, weight)
    x = inputs(6, 64)
    assert torch.equal(
        linear(library, packed, x.view(2, 3, 64), None),
        linear(library, packed, x, None).view(2, 3, 20),
    )
    assert linear(library, packed, torch.empty(0, 64), None).shape == (0, 20)
    sliced = inputs(6, 128)[:, ::2]
    assert torch.equal(
        linear(library, packed, sliced, None), linear(library, packed, sliced.contiguous(), None)
    )


@pytest.mark.parametrize("dtype", FLOATS.values())
def test_a_float_weight_in_8_bits_takes_the_nearest_of_255_levels(
    library: Library, dtype: torch.dtype
) -> None:
    weight = torch.randn(50, 100).to(dtype)  # a short last group
    weight[3] = 0
    packed = round_weight(library, weight, 8)
    groups = functional.pad(weight.float(), (0, 28)).unflatten(1, (-1, 32))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp_min(2**-14).half().float()
    wanted = (torch.round(groups / scale).clamp(-127, 127) * scale).flatten(1)[:, :100]
    found = linear(library, packed, torch.eye(100), None).T
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_float_weight_in_4_bits_takes_the_best_of_some_scales(library: Library) -> None:
    weight = torch.randn(50, 100)
    groups = functional.pad(weight, (0, 28)).unflatten(1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True)
    tried = []
    for i in range(8):
        scale = ((0.7 + 0.05 * i) * largest / 7).half().float()
        tried.append(torch.round((groups / scale).clamp(-8, 7)) * scale)
    errors = torch.stack([(each - groups).square().sum(-1) for each in tried])
    found = linear(library, round_weight(library, weight, 4), torch.eye(100), None).T
    rest = functional.pad(found, (0, 28)).unflatten(1, (-1, 32)) - groups
    torch.testing.assert_close(rest.square().sum(-1), errors.amin(0), rtol=1e-3, atol=1e-5)
    assert rest.square().sum() < 0.9 * errors[6].sum()  # than by the largest alone


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_does_not_become_one(
    library: Library, value: float, bits: int
) -> None:
    weight = torch.randn(20, 64)
    weight[3, 40] = value
    found = linear(library, round_weight(library, weight, bits), torch.ones(1, 64), None)[0]
    assert not torch.isfinite(found[3])
    assert torch.isfinite(found[torch.arange(20) != 3]).all()


def test_all_of_a_buffer_is_read(library: Library) -> None:
    data = torch.randint(0, 256, (128 * 1001,), dtype=torch.uint8)
    assert read_sum(library, data) == int(data.view(torch.int64).sum()) % 2**64
    assert read_bandwidth(library) > 1e8
    for size in (0, -128, 130):
        arguments = (data.data_ptr(), size, byref(ctypes.c_uint64()))
        assert library.functions.hw_read(library.pool, *arguments) == 3


@pytest.mark.parametrize(
    ("changes", "from_kind", "code"),
    [({}, 5, 2), ({}, 9, 2), ({"kind": 0}, 8, 2), ({"group": 64}, 8, 2), ({"rows": 100}, 8, 3)],
)
def test_rounding_refuses_what_it_cannot_do(
    library: Library, changes: dict[str, int | None], from_kind: int, code: int
) -> None:
    packed = round_weight(library, torch.randn(16, 32), 8)
    struct, values = struct_of(packed, **changes), torch.zeros(16, 32)
    arguments = (struct, from_kind, values.data_ptr(), packed.data.data_ptr())
    assert library.functions.hw_round(library.pool, *arguments) == code


def test_inputs_that_do_not_fit_are_refused(library: Library) -> None:
    packed = pack_weight(library, example("int4", 20, 64, 32))
    with pytest.raises(ValueError, match="63 columns does not fit 20 x 64"):
        linear(library, packed, torch.zeros(1, 63), None)
    with pytest.raises(ValueError, match="does not fit"):
        linear(library, packed, torch.zeros(1, 64), torch.zeros(19))
    with pytest.raises(HalfweaveError, match="a weight of 0 x 4 cannot be packed"):
        pack_weight(library, Dense(torch.zeros(0, 4)))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (Dense(torch.zeros(8, 8, dtype=torch.float64)), "weights of torch.float64"),
        (Dense(torch.zeros(8, 8, device="meta")), "values .* on meta"),
        (replace(example("int8", 8, 8, 32), scale=torch.zeros(8, 1)), "scale is torch.float32"),
        (replace(example("int8", 8, 8, 32), values=torch.zeros(8, 8)), "values is torch.float32"),
        (replace(example("int4", 8, 64, 32), scale=torch.zeros(8, 1).half()), r"scale .* \[8, 1\]"),
        (
            replace(example("sparse24 bf16", 8, 64, 32), meta=torch.zeros(8, 4).byte()),
            r"meta .* \[8, 4\]",
        ),
        (
            replace(example("sparse24_int4", 8, 64, 32), meta=torch.zeros(8, 8)),
            "meta is torch.float32",
        ),
    ],
)
def test_weights_that_the_library_would_misread_are_refused(
    library: Library, weight: PackedLinear, message: str
) -> None:
    with pytest.raises(HalfweaveError, match=message):
        pack_weight(library, weight)


def test_a_library_of_another_build_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = ctypes.util.find_library("m")
    assert found is not None
    assert load.__wrapped__(Path(found)) is None  # it has not one of the functions
    monkeypatch.setattr(library_module, "ABI", library_module.ABI + 1)
    assert load.__wrapped__(library_module.FILE) is None
    assert [record.message.count("of another build") for record in caplog.records] == [1, 1]


def test_the_interface_has_the_number_of_its_declarations() -> None:
    """Whoever changes one raises HW_ABI, and then this table."""
    text = (library_module.FILE.parent / "native" / "api.h").read_text()
    said = " ".join(re.sub(r"/\*.*?\*/", "", text, flags=re.S).split())
    assert f"HW_ABI = {library_module.ABI} " in said
    assert hashlib.sha256(said.encode()).hexdigest()[:12] == {1: "703e722db4b6"}[library_module.ABI]


def test_a_level_that_is_forced_without_a_library_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Row 30."""
    monkeypatch.setattr(library_module, "FILE", tmp_path / "none.so")
    assert library_module.library.__wrapped__() is None
    monkeypatch.setenv(library_module.LEVEL_VARIABLE, "portable")
    with pytest.raises(UsageError, match="portable: the CPU kernels are not installed"):
        library_module.library.__wrapped__()


def test_what_is_not_in_this_machines_memory_is_refused(library: Library) -> None:
    packed, away = pack_weight(library, example("int4", 20, 64, 32)), torch.device("meta")
    x, bias = torch.zeros(1, 64), torch.zeros(20)
    with pytest.raises(HalfweaveError, match=r"an input .* on meta"):
        linear(library, packed, x.to(away), bias)
    with pytest.raises(HalfweaveError, match=r"a bias .* on meta"):
        linear(library, packed, x, bias.to(away))
    with pytest.raises(HalfweaveError, match=r"a weight .* on meta"):
        round_weight(library, torch.zeros(20, 64, device=away), 8)
    with pytest.raises(HalfweaveError, match=r"weights of torch\.int8"):
        round_weight(library, torch.zeros(20, 64, dtype=torch.int8), 8)


def struct_of(packed: PackedWeight, **changes: int | None) -> WeightStruct:
    struct = WeightStruct.from_buffer_copy(packed.struct)
    for name, value in changes.items():
        setattr(struct, name, value)
    return struct


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"data": None}, 1),
        ({"kind": 9}, 2),
        ({"kind": 8}, 3),  # known, and of other bytes
        ({"kind": -1}, 2),
        ({"group": 48}, 2),
        ({"group": 0}, 2),
        ({"rows": 0}, 2),
        ({"rows": -16}, 2),
        ({"rows": 2**62}, 2),
        ({"columns": 2**62}, 2),
        ({"columns": 66}, 2),
        ({"rows": 2**20}, 3),
        ({"columns": 2**20}, 3),
        ({"bytes": 1}, 3),
        ({"bytes": 2**62}, 3),
    ],
)
def test_the_library_checks_again_and_refuses(
    library: Library, changes: dict[str, int | None], code: int
) -> None:
    """What the binding never does: sizes that would read and write beyond every buffer."""
    packed = pack_weight(library, example("sparse24_int4", 32, 64, 32))
    struct = struct_of(packed, **changes)
    x, y = torch.zeros(1, 64), torch.zeros(1, 32)
    arguments = (library.level_pointer, library.pool, byref(struct), x.data_ptr())
    assert library.functions.hw_linear(*arguments, 1, None, y.data_ptr()) == code
    if "data" not in changes:
        stored = torch.zeros(1 << 12, dtype=torch.uint8).data_ptr()
        out = packed.data.data_ptr()
        assert library.functions.hw_pack(library.pool, struct, stored, stored, stored, out) == code


@pytest.mark.parametrize("tokens", [0, -1, 2**40])
def test_the_library_refuses_numbers_of_tokens(library: Library, tokens: int) -> None:
    packed = pack_weight(library, example("int8", 16, 32, 64))
    x = torch.zeros(1, 32)
    arguments = (library.level_pointer, library.pool, byref(packed.struct), x.data_ptr())
    assert library.functions.hw_linear(*arguments, tokens, None, x.data_ptr()) == 2


def test_random_sizes_are_answered_and_never_fatal(library: Library) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = pack_weight(library, example("sparse24_int4", 32, 64, 32))
    x, y = torch.zeros(1, 64), torch.zeros(1, 32)
    for _ in range(2000):
        kind, group, bits, sign = torch.randint(-2, 140, (4,), generator=generator).tolist()
        size = (1 << (bits % 63)) * (1 if sign % 2 else -1)
        struct = struct_of(packed, kind=kind % 12, group=group, rows=size, columns=size ^ sign)
        arguments = (library.level_pointer, library.pool, byref(struct), x.data_ptr())
        assert library.functions.hw_linear(*arguments, 1, None, y.data_ptr()) in (2, 3)
        assert library.functions.hw_packed_bytes(kind, group, size, size) >= -1


def test_the_environment_chooses_the_level() -> None:
    code = (
        "from halfweave.kernels.cpu.library import library\nfound = library(); print(found.level)"
    )

    def ask(level: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HALFWEAVE_CPU_LEVEL": level}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert ask("portable").stdout == "portable\n"
    assert ask("").stdout == f"{native_levels()[0]}\n"
    refused = ask("sse9")
    assert refused.returncode != 0
    assert "'sse9' is none of avx512_vnni, avx2, portable" in refused.stderr


def test_a_level_that_the_machine_lacks_is_refused_by_name() -> None:
    functions = load(UNDER_TEST)
    assert functions is not None
    missing = sorted(set(LEVELS) - set(native_levels())) or ["neon"]
    with pytest.raises(UsageError, match=f"cannot run the CPU kernels' level {missing[0]}"):
        open_level(functions, missing[0])


def test_without_the_library_all_is_expanded_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from halfweave.kernels.dispatch import choose, prepare

    monkeypatch.setattr(library_module, "FILE", tmp_path / "none.so")
    library_module.library.cache_clear()
    try:
        assert choose("int4", "cpu").name == "torch-dense"
        weight, x = example("int4", 20, 64, 32), inputs(3, 64)
        found = prepare(weight, None, torch.device("cpu"), torch.float32)(x)
        torch.testing.assert_close(found, reference.linear(x, weight))
        assert len([r for r in caplog.records if "C++ compiler" in r.message]) == 1
    finally:
        library_module.library.cache_clear()


def test_callers_in_several_threads_do_not_disturb_each_other() -> None:
    """Two models in one process share the library; its threads must serve one call at a time."""
    library = at_level(LEVELS_HERE[0])
    weights = [
        pack_weight(library, example("sparse24_int4", 400, 512, 64, seed)) for seed in (1, 2)
    ]
    x = inputs(3, 512)
    alone = [linear(library, weight, x, None) for weight in weights]

    def ask(which: int) -> bool:
        return torch.equal(linear(library, weights[which % 2], x, None), alone[which % 2])

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(ask, range(400)))


def test_pools_of_any_size_start_work_and_end() -> None:
    functions = load(UNDER_TEST)
    assert functions is not None
    weight = example("int8", 200, 64, 64)
    x = inputs(5, 64)
    answers = []
    level = functions.hw_level(b"portable")
    for threads in (1, 2, 3, 7):
        library = Library(functions, level, threads)
        packed = pack_weight(library, weight)
        answers += [linear(library, packed, x, None) for _ in range(50)]
    assert all(torch.equal(answers[0], other) for other in answers)
    for threads in (0, -1, 5000):
        assert not functions.hw_pool_new(ctypes.c_int32(threads))
