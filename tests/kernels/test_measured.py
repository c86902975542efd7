"""A table of measurements decides between kernels, and can never do harm."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from halfweave.kernels.cpu.library import library
from halfweave.kernels.dispatch import prepare, settled
from halfweave.kernels.formats import PackedLinear, Sparse24, Sparse24Int4
from halfweave.kernels.measured import (
    VARIABLE,
    Device,
    Measured,
    Product,
    cpu_device,
    find_table,
    row_at,
    table_path,
    write_table,
)
from halfweave.runtime.engine import Engine
from halfweave.runtime.fused import FusedDecoder
from halfweave.runtime.model import load_model

CPU = torch.device("cpu")
WHERE = Device("a card", "a build")
PRODUCT = Product("sparse24_int4", 64, None, 128, 64)
ROW = Measured(1, "sparse", "sparse", {"sparse": 2.0, "torch-float32": 3.0})


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def weight() -> Sparse24:
    dense = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([True, False, True, False]).repeat(16)
    return Sparse24.from_dense((dense * keep).bfloat16())


def here() -> Device:
    native = library()
    assert native is not None
    return cpu_device(native)


# ---- the file


def test_a_table_is_found_again_and_what_else_was_measured_stays() -> None:
    assert find_table(WHERE) is None
    write_table(WHERE, {PRODUCT: [ROW]})
    other = Product("sparse24", None, "bfloat16", 8, 8)
    later = Measured(8, "dense", "torch-float32", {"sparse": 5.0, "torch-float32": 4.0})
    path = write_table(WHERE, {other: [later, ROW]})
    found = find_table(WHERE)
    assert path == table_path(WHERE)
    assert found is not None
    assert found.rows == {PRODUCT: (ROW,), other: (ROW, later)}
    again = Measured(2, "sparse", "sparse", {"sparse": 1.0})
    write_table(WHERE, {PRODUCT: [again]})
    found = find_table(WHERE)
    assert found is not None and found.rows[PRODUCT] == (ROW, again)
    faster = Measured(ROW.M, "sparse", "sparse", {"sparse": 0.5})
    write_table(WHERE, {PRODUCT: [faster]})
    found = find_table(WHERE)
    assert found is not None and found.rows[PRODUCT] == (faster, again)


def test_a_number_of_tokens_takes_the_row_below_it() -> None:
    rows = [Measured(m, "sparse", "sparse", {"sparse": 1.0}) for m in (2, 8, 64)]
    taken = {tokens: row_at(rows, tokens) for tokens in (1, 2, 7, 8, 63, 64, 9999)}
    assert {tokens: row.M for tokens, row in taken.items() if row} == {
        1: 2, 2: 2, 7: 2, 8: 8, 63: 8, 64: 64, 9999: 64
    }  # fmt: skip
    assert row_at([], 1) is None


def test_another_build_or_device_has_another_table() -> None:
    write_table(WHERE, {PRODUCT: [ROW]})
    assert find_table(Device("a card", "another build")) is None
    assert find_table(Device("another card", "a build")) is None


def test_off_ignores_the_table_and_a_name_takes_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = write_table(WHERE, {PRODUCT: [ROW]})
    monkeypatch.setenv(VARIABLE, "off")
    assert find_table(WHERE) is None
    named = tmp_path / "named.json"
    kept.rename(named)
    monkeypatch.setenv(VARIABLE, str(named))
    assert find_table(WHERE) is not None
    assert find_table(Device("a card", "a newer build")) is not None  # it was named


def spoilt(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(schema_version=0),
        lambda d: d.update(device="another card"),
        lambda d: d.update(key="of another build"),
        lambda d: d.update(rows={}),
        lambda d: d["rows"].append([]),
        lambda d: d["rows"][0].pop("M"),
        lambda d: d["rows"][0].update(M=0),
        lambda d: d["rows"][0].update(N="8"),
        lambda d: d["rows"][0].update(group=-1),
        lambda d: d["rows"][0].update(dtype=16),
        lambda d: d["rows"][0].update(kernel="unknown"),
        lambda d: d["rows"][0].update(us={"sparse": -1.0}),
        lambda d: d["rows"][0].update(us={"sparse": True}),
        lambda d: d["rows"][0].update(more=1),
    ],
)
def test_a_table_that_is_damaged_or_foreign_is_ignored_with_one_warning(
    change: Callable[[dict[str, Any]], Any], caplog: pytest.LogCaptureFixture
) -> None:
    spoilt(write_table(WHERE, {PRODUCT: [ROW]}), change)
    with caplog.at_level(logging.WARNING):
        assert [find_table(WHERE) for _ in range(3)] == [None, None, None]
    assert len(caplog.records) == 1
    assert "is ignored" in caplog.records[0].getMessage()


def test_no_json_and_no_file_are_ignored_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    write_table(WHERE, {PRODUCT: [ROW]}).write_text("{")
    with caplog.at_level(logging.WARNING):
        assert find_table(WHERE) is find_table(WHERE) is None
        assert len(caplog.records) == 1
        monkeypatch.setenv(VARIABLE, str(tmp_path / "none.json"))
        assert find_table(WHERE) is find_table(WHERE) is None
    assert len(caplog.records) == 2
    assert "is not there" in caplog.records[1].getMessage()


# ---- what it decides


def keep(product: Product, *rows: tuple[int, str]) -> None:
    """A table of this machine, with such a winner for so many tokens."""
    measured = [
        Measured(m, "sparse" if name == "sparse" else "dense", name, {"sparse": 2.0, name: 1.0})
        for m, name in rows
    ]
    write_table(here(), {product: measured})


@pytest.mark.parametrize("name", ["torch-float32", "torch-bfloat16", "native-dense"])
def test_each_number_of_tokens_goes_to_the_winner(name: str) -> None:
    stored, bias = weight(), torch.randn(40)
    x = torch.randn(8, 64)
    static = prepare(stored, bias, CPU, torch.float32)
    few, many = static(x[:7]), static(x)
    keep(Product.of(stored), (1, "sparse"), (8, name))
    apply = prepare(stored, bias, CPU, torch.float32)
    assert torch.equal(apply(x[:7]), few)
    exact = torch.nn.functional.linear(x, stored.unpack(), bias)
    found = apply(x)
    assert found.dtype == torch.float32
    if name == "torch-float32":
        assert torch.equal(found, exact)
        assert not torch.equal(found, many)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.1)
    assert apply(x.view(2, 4, 64)).shape == (2, 4, 40)


def test_a_table_of_prompts_says_nothing_of_fewer_tokens() -> None:
    stored, x = weight(), torch.randn(8, 64)
    static = prepare(stored, None, CPU, torch.float32)
    few = static(x[:7])
    keep(Product.of(stored), (8, "native-dense"))
    assert settled(Product.of(stored)).why.startswith("static: ")
    apply = prepare(stored, None, CPU, torch.float32)
    assert torch.equal(apply(x[:7]), few)
    assert not torch.equal(apply(x), static(x))


def test_what_is_exact_asks_no_table() -> None:
    stored = weight()
    x = torch.randn(3, 64)
    exact = prepare(stored, None, CPU, torch.float32, exact=True)(x)
    keep(Product.of(stored), (1, "torch-bfloat16"))
    assert torch.equal(prepare(stored, None, CPU, torch.float32, exact=True)(x), exact)


def test_a_product_is_known_by_format_group_dtype_and_shape() -> None:
    assert Product.of(weight()) == Product("sparse24", None, "bfloat16", 40, 64)
    codes = torch.zeros(8, 64, dtype=torch.int64)
    mask = torch.tensor([True, True, False, False]).repeat(8, 16)
    coded: PackedLinear = Sparse24Int4.from_codes(codes, mask, torch.ones(8, 2).half(), 32)
    assert Product.of(coded) == Product("sparse24_int4", 32, None, 8, 64)


def test_one_form_of_a_weight_is_that_for_one_token() -> None:
    product = Product.of(weight())
    assert not settled(product).expand
    assert settled(product).why.startswith("static: ")
    keep(product, (1, "sparse"), (512, "native-dense"))
    assert not settled(product).expand  # nothing is known of our dense kernel for one token
    keep(product, (1, "native-dense"), (512, "sparse"))
    found = settled(product)
    assert found.expand and found.kernel.endswith(", expanded")
    assert found.why == "measured: 2.0 us as packed, 1.0 dense, for one token"


def test_a_model_holds_dense_copies_where_they_are_faster_and_says_so(packed_model: Path) -> None:
    before = load_model(packed_model)
    assert isinstance(before.decoder, FusedDecoder)
    assert before.decoder.expanded_bytes == 0
    keep(Product("sparse24_int4", 32, None, 136, 72), (1, "native-dense"))
    after = load_model(packed_model)
    assert isinstance(after.decoder, FusedDecoder)
    # Gate and up of two layers: fp16, in rows and columns that are filled up.
    assert 4 * (2 - 3 / 8) * 136 * 72 * 0.9 < after.decoder.expanded_bytes < 4 * 3 * 144 * 128
    with Engine(before) as plain, Engine(after) as grown:
        assert "dense copies" not in plain.memory_plan.line
        assert "MiB more for dense copies, measured as faster" in grown.memory_plan.line


def test_neighbours_do_not_change_a_token_of_a_model_with_dense_copies(packed_model: Path) -> None:
    keep(Product("sparse24_int4", 32, None, 136, 72), (1, "native-dense"), (8, "torch-float32"))
    from halfweave import LLM, SamplingParams

    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    prompts = ["Two weights", "The quick brown fox jumps over", "A small model"]
    with LLM(packed_model) as llm:
        alone = [llm.generate(prompt, greedy)[0].token_ids for prompt in prompts]
        together = [answer.token_ids for answer in llm.generate(prompts, greedy)]
    assert together == alone
