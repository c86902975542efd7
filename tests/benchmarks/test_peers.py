"""The comparison with other engines: workers answer, rows are made of what they say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import page
import prepare
import products
import pytest
from engines import TASKS, measure_engines
from prepare import PLANS, Contender
from support.tiny import Tiny, pack_directory, save_tiny

PEERS = Path(page.__file__).parent


@pytest.fixture(scope="module")
def contenders(tmp_path_factory: pytest.TempPathFactory) -> list[Contender]:
    folder = tmp_path_factory.mktemp("peers")
    dense = save_tiny(folder / "dense", Tiny(positions=1024))
    packed = pack_directory(dense, folder / "packed", "sparse24_int4")
    script = PEERS / "halfweave_engine.py"
    return [
        Contender("halfweave", name, Path(sys.executable), script, model)
        for name, model in (("dense", dense), ("2:4+int4", packed))
    ]


def test_every_contender_gets_a_row_for_every_task(contenders: list[Contender]) -> None:
    broken = replace(contenders[0], model=contenders[0].model / "none")
    rows, missing = measure_engines([*contenders, broken], threads=1, rounds=3)
    assert [str(broken.model) in one.reason for one in missing] == [True]
    assert len(rows) == len(contenders) * len(TASKS)
    for row in rows:
        least, greatest = row["spread"]
        assert 0 < least <= row["tokens_per_s"] <= greatest
        assert row["peak_rss_mib"] > 50 and row["load_s"] > 0
    assert {(r["phase"], r["depth"], r["batch"]) for r in rows} == set(page.TASKS)


def test_products_are_measured_at_every_shape_and_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SHAPES", ((48, 64), (16, 128)))
    monkeypatch.setattr(products, "_COLD_BYTES", 1 << 16)
    ours = (Path(sys.executable), PEERS / "halfweave_kernels.py")
    rows = products.measure_products(ours, None, threads=1, rounds=2)
    assert len(rows) == 2 * len(products.TOKENS) * len(products.FORMATS)
    for row in rows:
        assert row["us"] > 0 and row["read_gb_per_s"] > 0
        assert row["ratio_to_ggml_q4_0"] is None


def test_the_page_divides_by_the_baseline(tmp_path: Path) -> None:
    def row(engine: str, stored: str, rate: float) -> dict[str, object]:
        task = {"phase": "decode", "depth": 0, "batch": 1, "threads": 2}
        return {
            **{"engine": engine, "format": stored, "version": "1", "load_s": 0.5},
            **{**task, "tokens_per_s": rate, "spread": [rate - 1, rate + 1], "peak_rss_mib": 100},
        }

    document = {
        **{"hardware": "here", "level": "avx2", "date": "today", "versions": {}, "rounds": 5},
        "rows": [row("halfweave", "2:4+int4 g64", 300.0), row("llama.cpp", "Q4_0", 120.0)],
        "kernels": [],
        "missing": [{"engine": "OpenVINO", "format": "int4", "reason": "no wheel"}],
    }
    (tmp_path / "cpu.json").write_text(json.dumps(document))
    page.write_page(tmp_path)
    text = (tmp_path / "cpu.md").read_text()
    assert "300 (299-301) [2.50x]" in text
    assert "120 (119-121) |" in text
    assert "Not measured: OpenVINO int4: no wheel" in text


def test_what_does_not_install_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real commands that fail: there is no such package, and no dense model to prune."""
    nothing = (("install", "--no-index", "halfweave-has-no-such-peer"),)
    peers = [plan for plan in PLANS if plan.environment in ("", "llama_cpp")]
    monkeypatch.setattr(prepare, "PLANS", peers)
    monkeypatch.setattr(prepare, "ENVIRONMENTS", {"llama_cpp": nothing})
    found, missing = prepare.prepare(tmp_path, tmp_path / "dense", tmp_path / "no.gguf")
    assert [one.format for one in found] == ["dense bf16"]  # made of nothing but the path
    reasons = {one.format: one.reason for one in missing}
    assert "halfweave-has-no-such-peer" in reasons["Q4_0"]
    assert reasons["Q8_0"] == reasons["Q4_0"]  # tried once
    assert len(reasons) == len(peers) - 1
