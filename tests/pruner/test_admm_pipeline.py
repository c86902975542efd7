"""What the pipeline adds to our own method: stages in order, the guard, tuning, mixed formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from halfweave.errors import UsageError
from halfweave.pruner.calibrate import load_text, sample_windows
from halfweave.pruner.masks import is_n_of_m
from halfweave.pruner.pipeline import prune
from halfweave.pruner.recipe import Recipe
from halfweave.pruner.recovery import Recovery, recover
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.eval import evaluate
from halfweave.runtime.model import load_model
from halfweave.runtime.tokenizer import Tokenizer
from support.pruning import TEXT, everything, recipe
from support.tiny import dense_model
from torch import Tensor

BLOCK = "model.layers.0."


def windows_of(model: Path, chosen: Recipe) -> Tensor:
    ids = Tokenizer.open(model).encode(load_text(TEXT).text, special=False)
    return sample_windows(ids, chosen.calib_windows, chosen.calib_length, chosen.seed)


def error_behind(model: Path, out: Path, pruned: list[str], name: str, windows: Tensor) -> float:
    """Layer error of `name`, its inputs coming from the dense model with `pruned` put in."""
    checkpoint, dense, seen = Checkpoint.open(out), dense_model(model), []
    for linear in pruned:
        dense.get_submodule(linear).weight.data = checkpoint.linear(linear).unpack()
    module = dense.get_submodule(name)
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        dense(windows)
    x, original = torch.cat(seen).double(), module.weight.detach().double()
    lost = (original - checkpoint.linear(name).unpack().double()) @ x.T
    return float(lost.square().sum() / (original @ x.T).square().sum())


@pytest.mark.parametrize("bits", [16, 4])
def test_each_stage_is_calibrated_behind_the_pruned_ones_before_it(
    tiny_model: Path, tmp_path: Path, bits: int
) -> None:
    chosen = recipe(bits=bits, group=32, reorder=False)
    result = prune(tiny_model, tmp_path / "out", chosen)
    windows = windows_of(tiny_model, chosen)
    before: list[str] = []
    for name in [name for name in result.linears if name.startswith(BLOCK)]:
        expected = error_behind(tiny_model, tmp_path / "out", before, name, windows)
        assert result.linears[name].relative_error == pytest.approx(expected, rel=1e-3), name
        if not name.endswith(("q_proj", "k_proj", "gate_proj")):  # the stage goes on
            before = [other for other in result.linears if other.startswith(BLOCK)]
            before = before[: before.index(name) + 1]


def test_ours_loses_less_than_sparsegpt_in_the_same_pipeline(
    tiny_model: Path, tmp_path: Path
) -> None:
    mean = {}
    for method in ("admm", "sparsegpt"):
        chosen = recipe(method=method, calib_windows=15, fast=True, bits=4, group=32)
        result = prune(tiny_model, tmp_path / method, chosen)
        errors = [record.relative_error or 0 for record in result.linears.values()]
        mean[method] = sum(errors) / len(errors)
    assert mean["admm"] < 0.9 * mean["sparsegpt"]


def test_with_enough_windows_the_manifest_shows_that_no_linear_is_worse_than_sparsegpt(
    tiny_model: Path, tmp_path: Path
) -> None:
    result = prune(tiny_model, tmp_path / "out", recipe(calib_windows=32))
    for record in result.linears.values():
        assert record.held_out_error is not None and record.baseline_error is not None
        assert record.held_out_error <= record.baseline_error
        assert record.method in ("admm", "sparsegpt")
    assert any(record.method == "admm" for record in result.linears.values())


@pytest.mark.parametrize("bits", [16, 4])
def test_tuning_blocks_brings_the_model_nearer_to_the_dense_one(
    tiny_model: Path, tmp_path: Path, bits: int
) -> None:
    distance = {}
    dense, text = load_model(tiny_model), load_text("builtin-eval").text[:4000]
    for kind in ("none", "blocks"):
        chosen = recipe(recover=kind, bits=bits, group=32, calib="builtin", calib_windows=96)
        prune(tiny_model, tmp_path / kind, chosen)
        result = evaluate(load_model(tmp_path / kind), text, window=32, against=dense)
        distance[kind] = result.kl or 0.0
    assert 0 < distance["blocks"] < distance["none"]
    before, after = (Checkpoint.open(tmp_path / kind) for kind in distance)
    for name in after.linears:
        tuned = after.linear(name).unpack()
        assert is_n_of_m(tuned, 2, 4)
        assert not torch.equal(tuned, before.linear(name).unpack())


@pytest.mark.parametrize("changes", [{"recover": "blocks"}, {"mix": 0.5}], ids=str)
def test_a_killed_run_with_dense_activations_resumes_to_the_same_bytes(
    tiny_model: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    class KilledError(Exception):
        pass

    def kill(progress: object) -> None:
        if getattr(progress, "done", 0) == 9:
            raise KilledError

    chosen = recipe(**changes)
    prune(tiny_model, tmp_path / "whole", chosen)
    with pytest.raises(KilledError):
        prune(tiny_model, tmp_path / "killed", chosen, progress=kill)
    result = prune(tiny_model, tmp_path / "killed", chosen, resume=True)
    assert result.resumed_blocks == 1
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_blocks_are_tuned_for_every_method_and_the_manifest_tells_by_how_much(
    tiny_model: Path, tmp_path: Path, method: str
) -> None:
    chosen = recipe(method=method, recover="blocks", calib="builtin", calib_windows=96)
    result = prune(tiny_model, tmp_path / "out", chosen)
    for record in result.linears.values():
        assert record.method == method
        assert record.note.startswith("tuned with its block, held-out error ")
        before, after = (float(word) for word in record.note.split()[-3::2])
        assert after < before
        assert record.held_out_error is None and record.baseline_error is None


def test_a_linear_that_stays_dense_is_not_tuned_either(tiny_model: Path, tmp_path: Path) -> None:
    choices = {
        f"model.layers.{layer}.{short}": "sparse24"
        for layer in (0, 1)
        for short in ("self_attn.q_proj", "mlp.up_proj", "mlp.gate_proj")
    }
    chosen = recipe(recover="blocks", calib="builtin", calib_windows=96, choices=choices)
    prune(tiny_model, tmp_path / "out", chosen)
    found, original = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tiny_model)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weight = f"model.layers.0.{name}.weight"
        assert torch.equal(found.tensor(weight), original.tensor(weight))
    gain = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(found.tensor(gain), original.tensor(gain))


@pytest.mark.parametrize("pattern", ["4:8", "50%"])
def test_recovered_codes_keep_a_mask_that_has_no_slots(
    tiny_model: Path, tmp_path: Path, pattern: str
) -> None:
    prune(tiny_model, tmp_path / "pruned", recipe(pattern=pattern, bits=4, group=32))
    asked = Recovery(calib="builtin", tokens=2048 * 16)
    recover(tmp_path / "pruned", tiny_model, tmp_path / "out", asked)
    before, after = Checkpoint.open(tmp_path / "pruned"), Checkpoint.open(tmp_path / "out")
    changed = 0
    for name in before.linears:
        old, new = before.linear(name).unpack(), after.linear(name).unpack()
        assert not new[old == 0].any()
        changed += int((old != new).sum())
    assert changed


def test_mix_changes_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    for mix in (0.0, 0.5):
        prune(tiny_model, tmp_path / str(mix), recipe(mix=mix))
    shards = [tmp_path / mix / "model-00003-of-00003.safetensors" for mix in ("0.0", "0.5")]
    assert shards[0].read_bytes() != shards[1].read_bytes()


def test_choices_give_every_linear_its_own_format_and_the_result_is_served(
    tiny_model: Path, tmp_path: Path
) -> None:
    kinds = ["sparse24_int4", "sparse24", "int4", "int8", "dense"]
    names = [
        f"model.layers.{layer}.{short}"
        for layer in (0, 1)
        for short in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    choices = {name: kinds[i % len(kinds)] for i, name in enumerate(names)}
    result = prune(tiny_model, tmp_path / "out", recipe(choices=choices, group=32))
    for name, record in result.linears.items():
        assert record.format == choices.get(name, "dense")
    assert load_model(tmp_path / "out") is not None


def test_impossible_recipes_say_what_is_wrong() -> None:
    for changes, words in (
        ({"recover": "magic"}, "none, blocks, distill"),
        ({"recover": "blocks", "calib_windows": 1}, "one of them judges"),
        ({"bits": 8}, "pattern dense only"),
        ({"max_ppl_ratio": 0.9}, "above 1"),
        ({"target_bytes": 1.5}, "below 1"),
        ({"max_ppl_ratio": 1.2, "target_bytes": 0.5}, "two budgets"),
        ({"choices": {"a": "int3"}}, "int3"),
        ({"choices": {"a": ["int4"]}}, "name of a format"),
        ({"seed": -1}, "seed must lie between 0 and 4294967295"),
        ({"seed": 2**32}, "seed must lie"),
        ({"mix": 2.0}, "between 0 and 1"),
        ({"block_epochs": 0}, "at least 1"),
    ):
        with pytest.raises(UsageError, match=words):
            recipe(**changes)
