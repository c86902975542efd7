"""Models in turns: the same requests of each, alone and in batches, and how fast memory is then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

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


def take_turns(
    models: Mapping[str, Model],
    prompt: tuple[int, ...],
    plan: BenchPlan,
    tell: Progress,
    read: ReadBandwidth,
) -> tuple[dict[str, list[Sample]], dict[str, dict[int, list[BatchSample]]]]:
    """In turns, A B A B of every batch, so that whatever the machine does falls on all alike.

    A batch has as many samples as there are turns, or none: comparisons pair them by turn.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in models}
    batches: dict[str, dict[int, list[BatchSample | None]]] = {
        name: {batch: [] for batch in plan.batches} for name in models
    }
    turns, done = plan.warmups + plan.repetitions, 0
    total = turns * len(models) * (1 + len(plan.batches))

    def told(turn: int, name: str, size: str = "") -> None:
        nonlocal done
        done += 1
        tell(done, total, f"{'measure' if turn >= plan.warmups else 'warm up'} {name}{size}")

    for turn in range(turns):
        read.look()
        for name, model in models.items():
            samples[name].append(_one_request(model, prompt, plan.new_tokens))
            told(turn, name)
        for batch in plan.batches:
            for name, model in models.items():
                found = one_batch(model, prompt, batch, plan.new_tokens, STEP_TOKENS)
                batches[name][batch].append(found)
                told(turn, name, f" x{batch}")
    return (
        {name: found[plan.warmups :] for name, found in samples.items()},
        {name: _complete(found, plan.warmups) for name, found in batches.items()},
    )


def _complete(
    found: Mapping[int, Sequence[BatchSample | None]], warmups: int
) -> dict[int, list[BatchSample]]:
    """Without warm-ups, and without batches for which a turn had no room."""
    measured = {batch: each[warmups:] for batch, each in found.items()}
    return {
        batch: [sample for sample in each if sample is not None]
        for batch, each in measured.items()
        if None not in each
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
