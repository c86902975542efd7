"""Graphs of steps, on a GPU that is not there: how they are captured, and what a replay gives."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from halfweave.runtime.gpu_graphs import Recorder, StepBuffers, StepGraphs
from halfweave.runtime.paged import Part
from torch import Tensor

Captures = list[dict[str, Any]]
SECOND = torch.device("cuda", 1)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Of what torch was asked to capture, the arguments by name; nothing is recorded."""
    signature, seen = inspect.signature(torch.cuda.graph), []

    def graph(*given: Any, **named: Any) -> nullcontext[None]:
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        seen.append(bound.arguments)
        return nullcontext()

    def stream(device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(device=device, wait_stream=lambda other: None)

    made = SimpleNamespace(replay=lambda: None)
    for name, fake in (
        ("graph", graph),
        ("Stream", stream),
        ("current_stream", stream),
        ("current_device", lambda: 1),
        ("stream", lambda of: nullcontext()),
        ("CUDAGraph", lambda: made),
        ("graph_pool_handle", object),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    return seen


def test_graphs_are_captured_on_their_own_gpu_and_share_their_memory(captures: Captures) -> None:
    recorder = Recorder(SECOND)
    done: list[Tensor] = []

    def work() -> Tensor:
        done.append(torch.ones(1))
        return done[-1]

    again = recorder.recorded(work)
    assert again() is again() is done[2]  # twice before the capture, and not since
    recorder.recorded(work)
    Recorder(SECOND).recorded(work)
    first, second, other = captures
    assert first["stream"].device == SECOND
    assert first["stream"] is second["stream"] and first["pool"] is second["pool"]
    assert other["stream"] is not first["stream"] and other["pool"] is not first["pool"]
    assert first["pool"] is not None
    assert {each["capture_error_mode"] for each in captures} == {"thread_local"}


def test_timers_capture_on_one_stream_of_the_current_gpu(captures: Captures) -> None:
    pytest.importorskip("triton")
    from halfweave.bench import kernel_gpu

    kernel_gpu._capture_stream.cache_clear()
    for _ in range(2):
        kernel_gpu.graph_timer([lambda: torch.ones(1)])
    kernel_gpu._capture_stream.cache_clear()
    first, second = captures
    assert first["stream"] is second["stream"] and first["stream"].device == 1
    assert {each["capture_error_mode"] for each in captures} == {"thread_local"}


def test_what_a_step_gave_stays_when_another_size_writes_to_the_same_place() -> None:
    place = torch.zeros(8, 1)

    def step(newest: StepBuffers) -> Tensor:
        place[: len(newest.ids), 0] = newest.ids.float()
        return place[: len(newest.ids)]

    graphs = StepGraphs(step, width=1, nobody=3, device=torch.device("cpu"))
    first = graphs.run([Part([5], 0, [0])])
    second = graphs.run([Part([token], 0, [0]) for token in (6, 7, 8)])
    assert (first.flatten().tolist(), second.flatten().tolist()) == ([5], [6, 7, 8])
