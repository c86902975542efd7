"""Layer errors: what is read off the made-up models, and the table made of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import layer_error
import layer_inputs
import pytest
import torch
from halfweave.pruner.methods import METHODS
from layer_error import Goal, measure, summary
from layer_inputs import FAMILIES, Layer, Size, real_layers, tiny_layers, weight_of
from torch import nn
from transformers.pytorch_utils import Conv1D

SMALL = Size(hidden=64, ffn=128, heads=4, windows=8, length=32)
LINEARS = {"llama": 7, "qwen2": 7, "gemma": 7, "opt": 6, "gpt2": 4, "bloom": 4}


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    return tiny_layers("gpt2", SMALL)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_linears_of_one_block(family: str) -> None:
    layers = tiny_layers(family, SMALL)
    assert len(layers) == LINEARS[family]
    for layer in layers:
        columns = layer.weight.shape[1]
        for statistics in (layer.fit, layer.held_out):
            assert statistics.hessian.shape == (columns, columns)
            assert statistics.tokens == 8 * 32
            assert bool(torch.isfinite(statistics.hessian).all())
        assert not torch.equal(layer.fit.hessian, layer.held_out.hessian)


def test_a_conv1d_is_turned_round() -> None:
    conv, x = Conv1D(6, 4), torch.randn(3, 4)
    with torch.no_grad():
        expected = conv(x) - conv.bias
    torch.testing.assert_close(nn.functional.linear(x, weight_of(conv)), expected)


def test_the_hessian_is_that_of_the_inputs(layers: list[Layer]) -> None:
    """The power of a linear's outputs, by its statistics, against the outputs themselves."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = FAMILIES["gpt2"](SMALL).eval()
    with torch.no_grad():
        layer_inputs._make_less_trivial(model, generator)
    tokens = layer_inputs._tokens(SMALL, generator)
    module = model.get_submodule("transformer.h.1.mlp.c_fc")
    outputs: list[torch.Tensor] = []
    module.register_forward_hook(lambda _, args, out: outputs.append(out - module.bias))
    with torch.no_grad():
        model(input_ids=tokens)
    layer = next(each for each in layers if each.name.endswith("mlp.c_fc"))
    power = ((layer.weight @ layer.fit.hessian) * layer.weight).sum()
    assert float(power) == pytest.approx(float(outputs[0].square().sum()) / tokens.numel(), 1e-4)


def test_linears_that_read_the_same_share_statistics() -> None:
    layers = {layer.name.split(".")[-1]: layer for layer in tiny_layers("llama", SMALL)}
    assert layers["q_proj"].fit is layers["v_proj"].fit
    assert layers["gate_proj"].fit is layers["up_proj"].fit
    assert layers["q_proj"].fit is not layers["o_proj"].fit


def test_the_same_seed_gives_the_same_layers(layers: list[Layer]) -> None:
    for ours, again in zip(layers, tiny_layers("gpt2", SMALL), strict=True):
        assert torch.equal(ours.weight, again.weight)
        assert torch.equal(ours.held_out.hessian, again.held_out.hessian)


def test_sparsegpt_beats_magnitude_on_tokens_it_has_not_seen(layers: list[Layer]) -> None:
    methods = {name: METHODS[name] for name in ("sparsegpt", "magnitude")}
    errors, _ = measure(layers, [Goal("2:4", 16)], methods)
    rows = {row["method"]: row for row in summary("gpt2", errors)}
    assert rows["sparsegpt"]["to_sparsegpt"] == 1
    assert rows["magnitude"]["to_sparsegpt"] > 1.5
    assert rows["magnitude"]["linears"] == 4


def test_the_summary_is_a_geometric_mean_and_names_the_worst() -> None:
    errors = {
        "goal": {
            "a": {"sparsegpt": 0.1, "other": 0.05},
            "b": {"sparsegpt": 0.1, "other": 0.2},
            "c": {"sparsegpt": 0.2, "other": 0.2},
        }
    }
    row = summary("family", errors)[1]
    assert row["to_sparsegpt"] == pytest.approx(1)
    assert row["worst_to_sparsegpt"] == pytest.approx(2)
    assert row["worst_linear"] == "b"


def test_a_real_model_is_read_from_its_directory(tiny_model: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog and keeps two of every four weights. " * 40
    layers = real_layers(tiny_model, text, [1], windows=4, length=16)
    assert {layer.name.split(".")[2] for layer in layers} == {"1"}
    assert len(layers) == 7
    assert layers[0].fit.tokens == 64


def test_the_command_writes_the_page_and_its_json_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ["--hidden", "64", "--ffn", "128", "--windows", "8", "--length", "32"]
    few = ["--families", "opt", "--methods", "magnitude", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["layer_error.py", *few, *sizes])
    layer_error.main()
    document = json.loads((tmp_path / "layer_error.json").read_text())
    assert len(document["rows"]) == 5 * 2  # goals, and the baseline with every method
    assert len(document["errors"]["opt"]["2:4, 16 bits"]) == 6
    page = (tmp_path / "layer_error.md").read_text()
    assert page.count("\n| opt | 6 | ") == 5
