"""Models in turns: the same requests of each, alone and in batches, and how fast memory is then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from ..errors import HalfweaveError
from ..kernels.cpu.bandwidth import read_bandwidth
from ..kernels.cpu.library import library
from ..runtime.engine_settings import EngineSettings
from ..runtime.model import LoadSettings, Model
from ..runtime.threads import in_passing_thread
from .batches import BatchSample, one_batch
from .offline_plan import BenchPlan
from .progress import Progress
from .requests import carry_out

STEP_TOKENS = EngineSettings().tokens_per_step


@dataclass(frozen=True)
class Sample:
    """One request as its caller saw it. A gap may end with several tokens when they coalesce."""

    ttft_ms: float
    prefill_ms: float
    gaps_ms: tuple[float, ...]
    gap_tokens: tuple[int, ...]

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first over the time they took."""
        return 1000 * sum(self.gap_tokens) / sum(self.gaps_ms)


class ReadBandwidth:
    """Bytes a second that this process's threads read; nothing without the kernels, or on a GPU.

    Looked at in every round, since the weights are then read as fast as memory is at that time.
    """

    def __init__(self, settings: LoadSettings) -> None:
        self._native = library() if settings.device == "cpu" else None
        self.samples: list[float] = []

    def look(self) -> None:
        """Measure for a tenth of a second."""
        native = self._native
        if native is not None:
            self.samples.append(in_passing_thread(lambda: read_bandwidth(native)))

    @property
    def best(self) -> float | None:
        """The one that others disturbed least."""
        return max(self.samples, default=None)


@dataclass(frozen=True)
class Turn:
    """One look at every model, by name; None where a batch had no room to run side by side."""

    alone: Mapping[str, Sample]
    batches: Mapping[str, Mapping[int, BatchSample | None]]


def take_turn(
    models: Mapping[str, Model],
    prompt: tuple[int, ...],
    plan: BenchPlan,
    told: Callable[[str], None] = lambda what: None,
) -> Turn:
    """One request of every model, and then one batch of every size, A B A B."""
    alone: dict[str, Sample] = {}
    batches: dict[str, dict[int, BatchSample | None]] = {name: {} for name in models}
    for name, model in models.items():
        alone[name] = _one_request(model, prompt, plan.new_tokens)
        told(name)
    for batch in plan.batches:
        for name, model in models.items():
            batches[name][batch] = one_batch(model, prompt, batch, plan.new_tokens, STEP_TOKENS)
            told(f"{name} x{batch}")
    return Turn(alone, batches)


def take_turns(
    models: Mapping[str, Model],
    prompt: tuple[int, ...],
    plan: BenchPlan,
    tell: Progress,
    read: ReadBandwidth,
) -> tuple[dict[str, list[Sample]], dict[str, dict[int, list[BatchSample]]]]:
    """So that whatever the machine does falls on all models alike.

    A batch has as many samples as there are turns, or none: comparisons pair them by turn.
    """
    turns: list[Turn] = []
    in_turn = len(models) * (1 + len(plan.batches))
    steps = count(1)

    def told(what: str) -> None:
        warming = len(turns) < plan.warmups
        tell(next(steps), plan.turns * in_turn, f"{'warm up' if warming else 'measure'} {what}")

    for _ in range(plan.turns):
        read.look()
        turns.append(take_turn(models, prompt, plan, told))
    kept = turns[plan.warmups :]
    return (
        {name: [turn.alone[name] for turn in kept] for name in models},
        {name: _complete([turn.batches[name] for turn in kept]) for name in models},
    )


def _complete(
    turns: Sequence[Mapping[int, BatchSample | None]],
) -> dict[int, list[BatchSample]]:
    """By batch, without those for which a turn had no room."""
    by_batch = {batch: [turn[batch] for turn in turns] for batch in turns[0]}
    return {
        batch: [sample for sample in samples if sample is not None]
        for batch, samples in by_batch.items()
        if None not in samples
    }


def _one_request(model: Model, prompt: tuple[int, ...], new_tokens: int) -> Sample:
    """Send one request and time what comes back.

    Raises:
        HalfweaveError: the engine did not carry it out to the end.
    """
    answer = carry_out(model, [prompt], new_tokens)[0]
    if len(answer.arrivals) < 2 or answer.timings is None:
        raise HalfweaveError(f"{model.name} sent all its tokens at once: nothing to measure")
    times = [at for at, _ in answer.arrivals]
    return Sample(
        ttft_ms=1000 * (times[0] - answer.sent),
        prefill_ms=answer.timings.prefill_ms,
        gaps_ms=tuple(1000 * (b - a) for a, b in pairwise(times)),
        gap_tokens=tuple(count for _, count in answer.arrivals[1:]),
    )
