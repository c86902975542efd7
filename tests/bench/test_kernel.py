"""Products of a model: figures follow from samples, and dispatch goes by what was measured."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from halfweave.bench import kernel as kernel_module
from halfweave.bench.candidates import Candidate, Sampler, copies_of, native_candidate
from halfweave.bench.cold import LEAST_BYTES, cold_bytes
from halfweave.bench.kernel import KernelPlan, KernelResult, bench_kernel
from halfweave.bench.products import model_products
from halfweave.errors import UsageError
from halfweave.kernels.cpu.library import Library, library
from halfweave.kernels.cpu.packed import PackedWeight, pack_weight
from halfweave.kernels.formats import Dense
from halfweave.kernels.measured import VARIABLE, Product, cpu_device, find_table
from halfweave.runtime.checkpoint import Checkpoint
from support.command import Command, assert_error

PLAN = KernelPlan(tokens=(1, 8), repetitions=5)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny weights would need ten thousand copies to be out of the caches."""
    monkeypatch.setattr("halfweave.bench.candidates.cold_bytes", lambda: 2**16)
    monkeypatch.setattr("halfweave.bench.candidates._BURST_S", 0.0001)


@pytest.fixture(scope="module")
def result(packed_model: Path) -> KernelResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halfweave.bench.candidates.cold_bytes", lambda: 2**16)
        patch.setattr("halfweave.bench.candidates._BURST_S", 0.0001)
        return bench_kernel(str(packed_model), PLAN)


def test_every_shape_is_measured_for_every_number_of_tokens(result: KernelResult) -> None:
    """Two layers of q and o, k and v, gate and up, down; and a tied head, rounded to 8 bits."""
    found = [(row.format, row.N, row.K, row.M, row.count) for row in result.rows]
    coded = [(72, 72, 4), (24, 72, 4), (136, 72, 4), (72, 136, 2)]
    wanted = [("sparse24_int4", n, k, m, count) for n, k, count in coded for m in (1, 8)]
    assert found == [*wanted, *(("int8", 320, 72, m, 1) for m in (1, 8))]
    assert [row.rounded_head for row in result.rows] == 8 * [False] + 2 * [True]


def test_figures_follow_from_the_samples(result: KernelResult) -> None:
    for row in result.rows:
        assert len(row.samples_us) == 5
        assert row.us.median == statistics.median(row.samples_us)
        dense = {n: o for n, o in row.others.items() if n != "int4"}
        assert set(dense) == {"torch-float32", "torch-bfloat16", "native-dense"}
        fastest = min(statistics.median(other.samples_us) for other in dense.values())
        assert row.to_dense == pytest.approx(fastest / row.us.median)
        flops = 2 * row.M * row.N * row.K
        assert row.gflop_per_s == pytest.approx(flops / row.us.median / 1000)
        assert row.bandwidth_share == pytest.approx(row.gb_per_s / result.read_gb_per_s)
        assert (row.to_int4 is None) == row.rounded_head
        assert 0 < row.error < 0.02  # inputs in 8 bits
    assert result.read_gb_per_s == max(result.read_samples_gb_per_s)


def test_the_document_has_every_sample(result: KernelResult) -> None:
    body = json.loads(json.dumps(result.body(), allow_nan=False))
    row = body["rows"][0]
    assert set(row) >= {"us", "gb_per_s", "gflop_per_s", "kernel", "wins", "samples_us", "others"}
    assert len(row["others"]["int4"]["samples_us"]) == 5
    assert "256 MiB" in body["read_how"]


def test_a_dense_model_has_no_int4_to_beat(tiny_model: Path) -> None:
    rows = bench_kernel(str(tiny_model), KernelPlan(tokens=(4,), repetitions=5)).rows
    assert {(row.format, row.dtype, row.to_int4) for row in rows} == {("dense", "float32", None)}
    assert all(set(row.others) == {"torch-float32", "torch-bfloat16"} for row in rows)
    assert all(row.error < 1e-5 for row in rows)


def slowed(name: str, library: Library, packed: PackedWeight) -> Candidate:
    """As native_candidate, but what is called sparse waits a while."""
    made = native_candidate(name, library, packed)
    if name != "sparse":
        return made
    bind = made.bind

    def slow(x: torch.Tensor) -> Any:
        run = bind(x)

        def waiting(copy: int) -> torch.Tensor:
            time.sleep(0.002)
            return run(copy)

        return waiting

    made.bind = slow
    return made


def test_a_row_that_loses_is_shown_and_dispatched_to_the_winner(
    monkeypatch: pytest.MonkeyPatch, packed_model: Path
) -> None:
    monkeypatch.setattr(kernel_module, "native_candidate", slowed)
    found = bench_kernel(str(packed_model), PLAN)
    assert len(found.rows) == 10
    for row in found.rows:
        assert not row.wins and row.to_dense < 1
        if row.rounded_head:
            assert row.kernel == "sparse"
            continue
        assert row.kernel == min(
            (name for name in row.others if name != "int4"),
            key=lambda name: row.others[name].us.median,
        )
    table = found.table()
    assert Product("int8", None, None, 320, 72) not in table
    for rows in table.values():
        assert [(row.M, row.choice) for row in rows] == [(1, "dense"), (8, "dense")]
        assert all("int4" not in row.us and row.us["sparse"] > 2000 for row in rows)


def test_copies_are_more_than_a_cache_holds() -> None:
    assert copies_of(2**15) * 2**15 >= 2**16
    assert copies_of(2**20) == 1
    assert cold_bytes() >= 2**27


def test_copies_are_equal_and_take_turns() -> None:
    native = library()
    assert native is not None
    weight = torch.randn(64, 64)
    made = native_candidate("sparse", native, pack_weight(native, Dense(weight)))
    run = made.bind(x := torch.randn(3, 64))
    wanted = torch.nn.functional.linear(x, weight)
    for copy in range(made.copies):
        torch.testing.assert_close(run(copy), wanted)
    sampler = Sampler(made, x)
    sampler.calls, sampler.bursts, made.turn = 3, 9, made.copies - 1
    assert sampler.seconds() > 0
    assert made.turn == (made.copies - 1 + 9 * 3) % made.copies


def test_products_read_their_weights(packed_model: Path) -> None:
    products = model_products(Checkpoint.open(packed_model))
    for each in products[:-1]:
        assert Product.of(each.weight()) == each.product
    assert products[-1].weight().shape == (320, 72)
    assert model_products(Checkpoint.open(packed_model), 4)[-1].product.format == "int4"


@pytest.mark.parametrize("wrong", [{"repetitions": 4}, {"tokens": ()}, {"tokens": (0,)}])
def test_a_plan_that_measures_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be at least"):
        KernelPlan(**wrong)


# ---- the command


def test_what_was_measured_is_kept_for_dispatch_and_inspect_says_so(
    halfweave: Command,
    monkeypatch: pytest.MonkeyPatch,
    copy_of: Any,
    packed_model: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("halfweave.bench.quiet.others_at_work", lambda: {0: 0.0})
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = copy_of(packed_model)
    static = halfweave("inspect", model).out
    assert "(static: multiplied as packed, inputs in 8 bits)" in static
    ran = halfweave("bench", model, "kernel", "--tokens", 1, "--tokens", 4, "--repetitions", 5)
    assert ran.code == 0
    *table, last = ran.out.splitlines()
    document = json.loads(last)
    assert (document["kind"], document["schema_version"], len(document["rows"])) == (
        "kernel",
        2,
        10,
    )
    assert json.loads((model / "measured" / "kernel.json").read_text()) == document
    assert all(len(line) <= 100 for line in table if str(tmp_path) not in line)
    native = library()
    assert native is not None
    kept = find_table(cpu_device(native))
    assert kept is not None and len(kept.rows) == 4
    measured = halfweave("inspect", model, "--json").document["result"]["linears"]
    assert all(linear["why"].startswith("measured: ") for linear in measured)
    monkeypatch.setenv(VARIABLE, "off")
    again = halfweave("inspect", model).out
    assert "(static: multiplied as packed, inputs in 8 bits)" in again and "(measured" not in again


def test_a_busy_machine_changes_no_dispatch(
    halfweave: Command, monkeypatch: pytest.MonkeyPatch, packed_model: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("halfweave.bench.quiet.others_at_work", lambda: {0: 1.0})
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "kernel.json"
    words = ("bench", packed_model, "kernel", "--tokens", 1, "--repetitions", 5, "--out", out)
    assert_error(halfweave(*words), 3, "the machine is busy", "--even-if-busy")
    assert not out.exists()
    ran = halfweave(*words, "--even-if-busy", "--json")
    notes = ran.document["notes"]
    assert any("the machine was busy" in note for note in notes)
    assert any("dispatch goes on as before" in note for note in notes)
    assert json.loads(out.read_text()) == ran.document
    assert not (tmp_path / "cache").exists()


def test_copies_of_weights_are_more_than_all_caches_hold(tmp_path: Path) -> None:
    """Two last caches of two CPUs each, and a first one that is of no account."""
    assert cold_bytes(tmp_path) == LEAST_BYTES
    for cpu in os.sched_getaffinity(0):
        for index, (level, size) in enumerate(((1, "32K"), (3, "393216K"))):
            folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            folder.mkdir(parents=True)
            (folder / "level").write_text(f"{level}\n")
            (folder / "size").write_text(f"{size}\n")
            (folder / "shared_cpu_list").write_text("0-63\n")
    assert cold_bytes(tmp_path) == 2 * 384 * 2**20
    for cpu in os.sched_getaffinity(0):
        cache = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cache/index1"
        (cache / "shared_cpu_list").write_text(f"{cpu}\n")
    assert cold_bytes(tmp_path) == 2 * 384 * 2**20 * len(os.sched_getaffinity(0))
    (cache / "size").write_text("much\n")
    assert cold_bytes(tmp_path) >= LEAST_BYTES
