"""The way through a block: a pass goes on where it waits, and computes what it would anew."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from halfweave.errors import CheckpointError
from halfweave.pruner import walk as walk_module
from halfweave.pruner.families import family_of
from halfweave.pruner.pausing import PausingPass, stops
from halfweave.pruner.pipeline import prune
from halfweave.pruner.source import Source
from halfweave.pruner.stream import BlockStream
from halfweave.pruner.walk import Walk
from support.pruning import everything, recipe
from torch import Tensor, nn

STAGES = family_of({"model_type": "llama", "num_hidden_layers": 1}).stages
FIRST = STAGES[0][0]


class Steps(nn.Module):
    """Two linears, one behind the other, that count their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.calls: list[str] = []
        for name, linear in (("first", self.first), ("second", self.second)):
            linear.register_forward_hook(lambda *_, name=name: self.calls.append(name))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return x + self.second(y.relu())  # type: ignore[no-any-return]


@pytest.fixture
def steps() -> Steps:
    torch.manual_seed(0)
    return Steps().requires_grad_(False)


def test_a_pass_goes_on_with_the_weights_of_the_moment(steps: Steps) -> None:
    x = torch.randn(3, 8)
    with stops([steps.first, steps.second]):
        once = PausingPass(lambda: steps(x))
        assert torch.equal(once.until(steps.first), x)
        steps.first.weight.mul_(2)
        assert torch.equal(once.until(steps.second), steps.first(x).relu())
        steps.second.weight.mul_(3)
        steps.calls.clear()
        found = once.output()
        assert steps.calls == ["second"]
        assert torch.equal(found, steps(x))
        assert torch.equal(once.output(), found)  # as new again


def test_calls_that_are_no_pass_do_not_stop(steps: Steps) -> None:
    x = torch.randn(3, 8)
    expected = steps(x)
    with stops([steps.first]):
        waiting = PausingPass(lambda: steps(x))
        waiting.until(steps.first)
        assert torch.equal(steps(x), expected)
        waiting.drop()
    assert torch.equal(steps(x), expected)


def test_a_stop_that_is_never_reached_is_named_an_error(steps: Steps) -> None:
    with stops([steps.first]):
        passing = PausingPass(lambda: steps.first(torch.ones(1, 8)))
        with pytest.raises(CheckpointError, match="never called"):
            passing.until(steps.second)


def test_an_error_in_the_middle_comes_out_and_a_drop_gives_memory_back(steps: Steps) -> None:
    held: list[weakref.ref[Tensor]] = []

    def run() -> Tensor:
        local = torch.ones(1, 8)
        held.append(weakref.ref(local))
        steps(local)
        raise ZeroDivisionError

    with stops([steps.second]):
        passing = PausingPass(run)
        passing.until(steps.second)
        assert held[0]() is not None
        passing.drop()
        gc.collect()
        assert held[0]() is None
        with pytest.raises(ZeroDivisionError):
            passing.output()


def walked(source: Source, waits: bool) -> tuple[list[Tensor], int]:
    """All that is observed of a block whose stages change, what leaves it, and calls of its q."""
    windows = torch.arange(9 * 32).view(9, 32) % 250
    stream = BlockStream(source, windows, held_out=2, parallel=True)
    stream._batch = 2
    block = stream.load_block(0, source.block_tensors(0))
    parent = stream.load_copy(0, source.block_tensors(0))
    calls: list[int] = []
    block.get_submodule(FIRST).register_forward_hook(lambda *_: calls.append(1))
    seen = []
    with Walk(stream, block, parent, waits) as walk:
        for stage in STAGES:
            for name, found in walk.observe([stage]).items():
                assert found.check is not None
                for part in (found.fit, found.check):
                    seen += [part.hessian, part.drift]
                block.get_submodule(name).get_parameter("weight").mul_(0.5)
        walk.finish()
    assert stream.dense is not None
    return [*seen, stream.hidden, stream.dense], len(calls)


def test_waiting_changes_nothing_but_the_work(tiny_model: Path) -> None:
    source = Source.open(tiny_model)
    (waited, once), (anew, often) = (walked(source, waits) for waits in (True, False))
    batches = 4 + 1  # of 7 and 2 windows
    assert (once, often) == (batches, 4 * batches)
    for a, b in zip(waited, anew, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_without_memory_for_waiting_the_bytes_are_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    chosen = recipe(calib_windows=48, calib="builtin", calib_length=250)
    prune(tiny_model, tmp_path / "waiting", chosen)
    monkeypatch.setattr(walk_module, "waiting_share", lambda *_: share)
    prune(tiny_model, tmp_path / "anew", chosen)
    assert everything(tmp_path / "waiting") == everything(tmp_path / "anew")


def test_linears_of_a_stage_share_the_mean_of_their_inputs_squares(tiny_model: Path) -> None:
    """In units of a token: a budget and a starved expert compare them with others."""
    source = Source.open(tiny_model)
    windows = torch.arange(9 * 32).view(9, 32) % 250
    stream = BlockStream(source, windows, held_out=2)
    block = stream.load_block(0, source.block_tensors(0))
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        linear = block.get_submodule(name)
        linear.register_forward_pre_hook(lambda _, args: inputs.__setitem__(name, args[0]))

    for name in source.family.linears:
        keep(name)
    with Walk(stream, block) as walk:
        seen = walk.observe(source.family.stages)
    fitted = []
    for window in stream.hidden[:7]:
        stream.run(block, window[None])
        fitted.append({name: x.flatten(0, -2) for name, x in inputs.items()})
    for stage in source.family.stages:
        assert all(seen[name] is seen[stage[0]] for name in stage)
        x = torch.cat([each[stage[0]] for each in fitted])
        found = seen[stage[0]].fit
        assert found.tokens == 7 * 32
        assert torch.allclose(found.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
