"""Recovery with bf16 products: the faster precision is found, told, kept to, and trains as well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from halfweave.errors import UsageError
from halfweave.pruner.recipe import Recipe
from halfweave.pruner.recover import precision as module
from halfweave.pruner.recover.distill import distill
from halfweave.pruner.recover.fused_kl import fused_kl
from halfweave.pruner.recover.network import Network
from halfweave.pruner.recover.precision import Dither, resolved
from halfweave.pruner.recover.settings import Distillation, DistillProgress, DistillResult
from halfweave.pruner.source import Source
from safetensors.torch import load_file, save_file
from support.pruning import TEXT, everything
from support.tiny import pack_directory, write_manifest

CPU = torch.device("cpu")
NAME = "model.layers.0.mlp.up_proj.weight"
SETTINGS = Distillation(
    tokens=64 * 8,
    length=32,
    batch_tokens=64,
    micro_tokens=64,
    held_out=4,
    hidden_blocks=2,
    learning_rate=0.02,
    warmup_steps=4,
    save_minutes=0.0,
)


def measured(speedup: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which bf16 products are so many times as fast as fp32 ones."""
    monkeypatch.setattr(module, "_speedup", lambda: speedup)


def train(
    student: Path, parent: Path, out: Path, precision: str, **changes: float
) -> DistillResult:
    out.mkdir(exist_ok=True)
    settings = replace(SETTINGS, precision=precision, **changes)  # type: ignore[arg-type]
    return distill(student, Source.open(parent), out, TEXT.read_text(), settings, resume=True)


def in_bf16(student: Path) -> Path:
    """Store what it kept as bf16 values, as real checkpoints do."""
    path = student / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith(".values"):
            tensors[name] = tensors[name].bfloat16()
    save_file(tensors, path, {"format": "pt"})
    (student / "halfweave.json").unlink()
    write_manifest(student)
    return student


def told_precision(out: Path) -> str:
    manifest = json.loads((out / "halfweave.json").read_text())
    found: str = manifest["provenance"]["recovery"]["settings"]["precision"]
    return found


def test_auto_is_the_faster_one_by_a_clear_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    for speedup, expected in ((2.0, "bfloat16"), (1.1, "float32"), (0.5, "float32")):
        measured(speedup, monkeypatch)
        assert resolved("auto", CPU) == expected
        assert resolved("bfloat16", CPU) == "bfloat16"
        assert resolved("float32", CPU) == "float32"


def test_the_speedup_is_the_ratio_of_the_fastest_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which they take 6 s and 2 s, but for one slow one of each."""
    taken = [60.0, 20.0] + [6.0, 2.0] * 7
    times = [time for each in taken for time in (0.0, each)]
    monkeypatch.setattr(module.time, "perf_counter", iter(times).__next__)
    assert module._speedup() == 3.0


def test_other_precisions_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"float16.*auto, float32, bfloat16"):
        Recipe(recover_precision="float16")
    with pytest.raises(UsageError, match=r"float16.*auto, float32, bfloat16"):
        Distillation(precision="float16")


def test_hidden_states_are_fp32_and_the_products_are_not(tiny_model: Path) -> None:
    source = Source.open(tiny_model)
    network = Network(source, source.tensors.read, taps=[0])
    tokens = torch.arange(24)[None]
    exact, _ = network.forward(tokens)
    rounded, tapped = network.forward(tokens, "bfloat16")
    assert rounded.dtype == tapped[0].dtype == torch.float32
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.03  # bf16 keeps 8 bits


def test_the_loss_of_bf16_heads_is_that_of_fp32_ones_but_for_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, head = (torch.randn(n, 64, generator=generator) for n in (40, 300))
    student = (dense + 0.3 * torch.randn(40, 64, generator=generator)).requires_grad_(True)
    targets = torch.full((40,), -1)
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        heads = (head.to(dtype), head.to(dtype))
        loss, _ = fused_kl(student, dense, heads, targets)
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.dtype == torch.float32
        losses.append(float(loss.detach()))
        gradients.append(gradient)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.03


def test_dithered_rounding_keeps_bf16_values_and_the_mean_of_others() -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(256, 384, generator=generator).bfloat16().float()
    stored[::3] = 0
    weight, dither = stored.clone(), Dither(stored, seed=7)
    dither.round_(weight)
    assert torch.equal(weight, stored)
    moved = stored * (1 + 2**-12)  # an eighth to a sixteenth of the way to the next bf16 value
    dither.round_(weight.copy_(moved))
    assert torch.equal(weight, weight.bfloat16().float())
    assert torch.equal(weight == 0, stored == 0)
    mean_move = float((weight - stored).abs().sum() / stored.abs().sum())
    assert mean_move == pytest.approx(2**-12, rel=0.05)
    assert torch.equal(moved.bfloat16().float(), stored)  # to nearest, none would have moved


def test_passes_see_small_moves_that_rounding_to_nearest_would_hide(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = in_bf16(pack_directory(tiny_model, tmp_path / "student", "sparse24"))
    seen: list[torch.Tensor] = []
    forward = Network.forward

    def watched(network: Network, windows: torch.Tensor, precision: str = "float32") -> object:
        if precision == "bfloat16" and network.parameters[NAME].requires_grad:
            seen.append(network.parameters[NAME].detach().clone())
        return forward(network, windows, precision)

    monkeypatch.setattr(Network, "forward", watched)
    train(student, tiny_model, tmp_path / "out", "bfloat16", learning_rate=3e-4)
    first, second = seen[:2]
    assert torch.equal(second, second.bfloat16().float())
    moved = first != second
    assert torch.equal(first == 0, second == 0)
    # A ninth of the rate in the first step: 3e-5 of the mean weight, where the next bf16 value of
    # a weight is up to 1/128 of it away.
    assert 0.001 < float(moved.float().mean()) < 0.1


def test_training_in_bf16_recovers_as_much(
    tiny_model: Path, packed_model: Path, tmp_path: Path
) -> None:
    exact = train(packed_model, tiny_model, tmp_path / "exact", "float32")
    fast = train(packed_model, tiny_model, tmp_path / "fast", "bfloat16")
    again = train(packed_model, tiny_model, tmp_path / "again", "bfloat16")
    gained = exact.before - exact.after
    assert gained > 0
    assert fast.before == exact.before  # what is measured is measured in fp32
    assert fast.after == pytest.approx(exact.after, abs=0.1 * gained)
    assert (told_precision(tmp_path / "exact"), told_precision(tmp_path / "fast")) == (
        "float32",
        "bfloat16",
    )
    weights = {
        name: everything(tmp_path / name)["model.safetensors"]
        for name in ("exact", "fast", "again")
    }
    assert weights["fast"] == weights["again"] != weights["exact"]
    assert again.after == fast.after


def test_a_stopped_run_goes_on_in_the_precision_it_began_with(
    tiny_model: Path, packed_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(packed_model, tiny_model, whole, "bfloat16")

    def stop(note: DistillProgress) -> None:
        if note.tokens == 64 * 5:
            raise KeyboardInterrupt

    broken.mkdir()
    measured(2.0, monkeypatch)
    source, text = Source.open(tiny_model), TEXT.read_text()
    with pytest.raises(KeyboardInterrupt):
        distill(packed_model, source, broken, text, SETTINGS, progress=stop)
    measured(0.5, monkeypatch)
    train(packed_model, tiny_model, broken, "auto")
    assert everything(broken) == everything(whole)
