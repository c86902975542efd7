"""The pruner on real weights: two blocks of SmolLM2-135M, whose layers have what random ones lack
(outliers, correlated inputs, columns that hardly speak)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from halfweave.files import read_json
from halfweave.pruner.calibrate import BUILTIN_EVAL, load_text
from halfweave.pruner.pipeline import prune
from halfweave.pruner.recipe import Recipe
from halfweave.pruner.recovery import Recovery, recover
from halfweave.runtime.eval import evaluate
from halfweave.runtime.model import load_model
from support.smollm2 import cut

pytestmark = pytest.mark.timeout(
    2400
)  # two minutes on two fast cores, a quarter of an hour on slow
WAYS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "sparsegpt": {"method": "sparsegpt"},
    "ours": {},
    "sparsegpt-int4": {"method": "sparsegpt", "bits": 4},
    "ours-int4": {"bits": 4},
}


@pytest.fixture(scope="module")
def dense(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(smollm2, tmp_path_factory.mktemp("cut") / "dense")


@pytest.fixture(scope="module")
def made(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint for each way, and one that was recovered."""
    torch.set_num_threads(2)  # these matrices are large enough to gain by it
    place = tmp_path_factory.mktemp("pruned")
    for name, changes in WAYS.items():
        prune(dense, place / name, Recipe(calib_windows=16, calib_length=256, group=64, **changes))
    recovery = Recovery(tokens=12288, bits=4, group=64)
    recover(place / "ours", dense, place / "distilled", recovery)
    torch.set_num_threads(1)
    return {name: place / name for name in (*WAYS, "distilled")}


@pytest.fixture(scope="module")
def kl(dense: Path, made: dict[str, Path]) -> dict[str, float]:
    """KL from the dense cut, on text that nothing was fitted to."""
    text, parent, found = load_text(BUILTIN_EVAL).text[:20000], load_model(dense), {}
    for name, path in made.items():
        result = evaluate(load_model(path), text, window=256, max_windows=12, against=parent)
        assert result.kl is not None
        found[name] = result.kl
    return found


def test_methods_are_in_their_known_order(kl: dict[str, float]) -> None:
    assert kl["ours"] < kl["sparsegpt"] < kl["magnitude"]


def test_ours_is_well_below_sparsegpt_and_codes_cost_little(kl: dict[str, float]) -> None:
    assert kl["ours"] < 0.8 * kl["sparsegpt"]
    assert kl["ours-int4"] < 0.8 * kl["sparsegpt-int4"]
    assert kl["ours-int4"] < 1.2 * kl["ours"]


def test_distillation_helps(kl: dict[str, float]) -> None:
    # Twelve steps, eight of which warm up; what an hour gives is in docs/results/quality.md.
    assert kl["distilled"] < 0.98 * kl["ours-int4"]


@pytest.mark.parametrize("name", ["ours", "ours-int4"])
def test_no_linear_is_worse_than_sparsegpt_on_held_out_windows(
    made: dict[str, Path], name: str
) -> None:
    for entry in read_json(made[name] / "halfweave.json")["linears"].values():
        assert entry["held_out_error"] <= entry["baseline_error"]
