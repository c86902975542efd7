"""Another device than the CPU: what works on one may create no tensor anywhere but there.

Without a GPU that is shown by a default device that holds no data ("meta"): a tensor made without
saying where is then refused by the first real one that it meets, as a tensor in the CPU's memory is
by one in a GPU's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from halfweave.errors import UsageError
from halfweave.kernels.formats import Dense, Int4, Int8, PackedLinear, Sparse24, Sparse24Int4
from halfweave.pruner.block import BlockPruner
from halfweave.pruner.budget.head import Head
from halfweave.pruner.methods import METHODS
from halfweave.pruner.methods.base import InputStatistics, Target
from halfweave.pruner.pipeline import prune
from halfweave.pruner.plan import make_plan
from halfweave.pruner.recipe import Pattern
from halfweave.pruner.recover.distill import make_trainer
from halfweave.pruner.recover.latents import Latent
from halfweave.pruner.recover.precision import Dither
from halfweave.pruner.recover.settings import Distillation
from halfweave.pruner.recover.windows import Windows
from halfweave.pruner.recovery import Recovery, recover
from halfweave.pruner.solvers.supports import choose_support
from halfweave.pruner.source import Source
from halfweave.pruner.stream import BlockStream
from halfweave.runtime.checkpoint import Checkpoint
from support.pruning import TEXT, recipe

ELSEWHERE = torch.device("meta")
TARGETS = [("2:4", 16), ("2:4", 4), ("4:8", 16), ("50%", 16), ("50%", 4), ("dense", 4)]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def statistics(columns: int) -> InputStatistics:
    x = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(1))
    drift = x.T @ torch.roll(x, 1, 0) / len(x) / 10
    return InputStatistics(x.T @ x / len(x), len(x), drift)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("pattern", "bits"), TARGETS)
def test_methods_work_where_their_inputs_are(method: str, pattern: str, bits: int) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    target = Target(Pattern.parse(pattern), bits, 32, 0.01, 0.5)
    expected = METHODS[method](weight, statistics(64), target)
    inputs = statistics(64)
    with ELSEWHERE:
        found = METHODS[method](weight, inputs, target)
    assert torch.equal(found.weight, expected.weight)


@pytest.mark.parametrize("recover", ["none", "blocks"])
@pytest.mark.parametrize("bits", [16, 4])
def test_a_block_is_pruned_where_its_source_is(tiny_model: Path, recover: str, bits: int) -> None:
    asked = recipe(bits=bits, group=32, recover=recover, block_epochs=1, calib_windows=16)
    source = Source.open(tiny_model)
    pruner = BlockPruner(source, asked, make_plan(source, asked), lambda *_: None)
    windows = torch.arange(16 * 32).view(16, 32) % 250
    stream = BlockStream(source, windows, pruner.held_out, pruner.needs_parent)
    with ELSEWHERE:
        stored, records = pruner.prune(0, stream)
        stream.advance(stream.load_block(1, source.block_tensors(1)), pruner.parent(1, stream))
    assert len(records) == 7
    assert all(tensor.device.type == "cpu" for tensor in stored.values())


def test_scores_are_made_where_the_head_is(tiny_model: Path) -> None:
    source = Source.open(tiny_model)
    head, tokens = Head(source), torch.arange(12)
    hidden = torch.randn(12, source.config["hidden_size"])
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    expected = head.loss(hidden, tokens), head.sampled_gradient(hidden, generators[0])
    with ELSEWHERE:
        found = head.loss(hidden, tokens), head.sampled_gradient(hidden, generators[1])
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("kind", [Sparse24, Sparse24Int4, Int4, Int8, Dense])
def test_latents_are_made_where_the_weights_are(kind: type[PackedLinear]) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    keep = choose_support(weight.abs(), Pattern.parse("2:4"))
    codes, scale = (weight * 3).round().clamp(-8, 7), torch.full((8, 2), 0.25).half()
    stored = {
        Sparse24: lambda: Sparse24.from_dense(weight * keep),
        Sparse24Int4: lambda: Sparse24Int4.from_codes(codes * keep, keep, scale, 32),
        Int4: lambda: Int4.from_codes(codes, scale, 32),
        Int8: lambda: Int8.from_dense(weight),
        Dense: lambda: Dense(weight),
    }[kind]()
    with ELSEWHERE:
        latent = Latent.of(stored, near=weight, pruned=True)
        latent.write_weight(found := torch.empty_like(weight))
    assert torch.equal(found, stored.unpack(torch.float32))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("hidden_weight", [0.0, 1.0])
def test_training_happens_where_the_source_is(
    packed_model: Path, tiny_model: Path, hidden_weight: float, precision: str
) -> None:
    settings = Distillation(
        tokens=128,
        length=32,
        batch_tokens=64,
        micro_tokens=32,
        held_out=2,
        hidden_blocks=2,
        hidden_weight=hidden_weight,
        precision=precision,
    )
    source = Source.open(tiny_model)
    windows = Windows.cut(torch.arange(10 * 32).remainder(250).tolist(), 32, 2)
    checkpoints = (Checkpoint.open(packed_model), None)
    with ELSEWHERE:
        Dither(torch.ones(3, 4, device="cpu"), seed=0)
    trainer, _ = make_trainer(source, checkpoints, windows, settings, 2**20)
    with ELSEWHERE:
        before = trainer.held_out_kl()
        for index in range(4):
            trainer.step(index, 4)
        assert trainer.held_out_kl() != before
        trainer.restore(trainer.tensors(), 4)
        trainer.step(4, 8)


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(tiny_model: Path, device: str) -> None:
    with pytest.raises(UsageError, match=device):
        Source.open(tiny_model, device)


@gpu
@pytest.mark.parametrize("changes", [{"bits": 4, "group": 32}, {"recover": "blocks"}])
def test_a_gpu_prunes_as_the_cpu_does(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Sums differ in their last bits, so a close call may fall the other way; errors agree."""
    errors = {}
    for device in ("cpu", "cuda"):
        result = prune(tiny_model, tmp_path / device, recipe(**changes), device=device)
        errors[device] = [record.relative_error for record in result.linears.values()]
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.02)


@gpu
def test_a_gpu_recovers(tiny_model: Path, tmp_path: Path) -> None:
    prune(tiny_model, tmp_path / "pruned", recipe(), device="cuda")
    recovery = Recovery(calib=str(TEXT), tokens=4096, bits=4, group=32)
    result = recover(tmp_path / "pruned", tiny_model, tmp_path / "out", recovery, device="cuda")
    assert result.after < result.before
