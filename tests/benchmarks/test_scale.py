"""The proof at scale, at a scale that a test can afford."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import scale
import scale_page


@pytest.fixture
def options(tmp_path: Path, tiny_model: Path) -> argparse.Namespace:
    return argparse.Namespace(
        work=tmp_path,
        tokenizer=tiny_model,
        method="sparsegpt",
        windows=2,
        length=32,
        keep=True,
        blocks=2,
    )


def test_blocks_are_made_pruned_and_timed(options: argparse.Namespace, tmp_path: Path) -> None:
    opt = scale.Opt(hidden=64, ffn=256, heads=4, vocab=320, positions=64)
    found = scale.measure(options, opt)
    assert len(found["seconds_each_block"]) == len(found["bytes_per_block"]) == 2
    assert found["seconds_per_block"] * 96 / 3600 == pytest.approx(
        found["projected_hours_96_blocks"], abs=0.1
    )
    assert 0.1 < found["peak_rss_gib"] < 4
    assert len(found["relative_errors"]) == 12
    weights = 4 * 64 * 64 + 2 * 64 * 256
    assert 9 / 16 < found["bytes_per_block"][0] / (2 * weights) < 0.75  # 9 bits of every 16


def test_a_run_may_end_after_its_first_block(options: argparse.Namespace, tmp_path: Path) -> None:
    options.blocks = 1
    found = scale.measure(options, scale.Opt(hidden=64, ffn=256, heads=4, vocab=320, positions=64))
    assert (found["blocks"], len(found["seconds_each_block"])) == (1, 1)
    assert len(found["relative_errors"]) in (6, 12)  # a small model is sooner done than stopped


def test_a_plan_is_made_of_headers_and_the_page_says_what_it_is(
    options: argparse.Namespace, tmp_path: Path
) -> None:
    bloom = scale.plan_bloom(options, scale.Bloom(hidden=64, heads=4, blocks=70, vocab=320))
    assert bloom["blocks"] == 70
    assert not (tmp_path / "bloom-176b-headers").exists()
    opt = scale.measure(options, scale.Opt(hidden=64, ffn=256, heads=4, vocab=320, positions=64))
    document = {
        "command": "make scale",
        "hardware": "a machine",
        "versions": {"torch": "2"},
        "date": "2026-01-01",
        "note": "Others were at work.",
        "opt_175b_block": opt,
        "bloom_176b_plan": bloom,
    }
    (tmp_path / "scale.json").write_text(json.dumps(document))
    scale_page.write_page(tmp_path)
    page = (tmp_path / "scale.md").read_text()
    assert "Nobody has run this" in page
    assert "Others were at work." in page
    assert f"{opt['peak_rss_gib']:.2f} GiB" in page


def test_bloom_is_as_large_as_it_says() -> None:
    """176 billion parameters (2211.05100, table 1)."""
    shapes = scale.Bloom().tensors().values()
    total = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)
    assert total == pytest.approx(176.2e9, rel=0.002)


def test_opt_is_as_large_as_it_says() -> None:
    """175 billion parameters (2205.01068, table 1)."""
    opt = scale.Opt()

    def count(shapes: dict[str, tuple[int, ...]]) -> int:
        return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values())

    assert count(opt.outside()) + 96 * count(opt.block()) == pytest.approx(174.6e9, rel=0.005)
