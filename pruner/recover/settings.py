"""What a recovery is asked to do, what it tells on the way, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import UsageError
from .precision import PRECISIONS
from .windows import MOST_SEED

# Steps that are run before the number of steps is known; their rates must not depend on it.
TIMED_STEPS = 4
# Where what is trained ends in codes (pruner/staged.py): in how many parts blocks are rounded, and
# how many of the calibration tokens are enough for that.
ROUNDING_PARTS, ROUNDING_TOKENS = 3, 2**15


@dataclass(frozen=True)
class Distillation:
    """Settings of `distill`.

    The rate of the weights and the loss are the best found for SmolLM2-135M at 2:4, trained as
    floats (docs/pruning.md); what ends in codes is trained by several of these (staged.py).

    Attributes:
        minutes: time for the training loop. Used once: a few steps are timed, the number of tokens
            that fits is resolved from them, and from there on only that number matters.
        tokens: train on exactly so many tokens (rounded down to whole steps); `minutes` is ignored.
        length: tokens in a window, fewer where the model's context is shorter; a window never
            crosses into a held-out one.
        batch_tokens: tokens in an optimizer step, a multiple of `length`.
        micro_tokens: tokens that run through the model at a time; less needs less memory.
        learning_rate: of the weights, in units of each linear's root mean square kept weight.
        code_share: of that rate, for weights that are stored as codes.
        scale_rate: of the logarithm of the 4-bit and 8-bit scales; 0 keeps the scales.
        gain_rate: of norm gains and biases.
        hidden_weight: weight of the normalised distance of block outputs; 0 leaves them out.
        hidden_blocks: at how many evenly spaced blocks that distance is taken.
        ce: weight of the cross entropy of the text's own next token.
        betas: of Adam.
        warmup_steps: steps over which the rates rise; they then fall as a cosine.
        final_rate: share of the rates that is left at the end.
        held_out: windows that are measured and never trained on.
        curve_points: how often the held-out windows are measured during training.
        save_minutes: at least so long passes between two saves of the state; 0 saves at each step.
        precision: of the training's matrix products, one of PRECISIONS (precision.py); what is
            measured is measured in fp32.
        seed: of the order of windows.
    """

    minutes: float = 30.0
    tokens: int = 0
    length: int = 512
    batch_tokens: int = 1024
    micro_tokens: int = 1024
    learning_rate: float = 1e-3
    code_share: float = 1.0
    scale_rate: float = 1e-3
    gain_rate: float = 1e-3
    hidden_weight: float = 1.0
    hidden_blocks: int = 6
    ce: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 8
    final_rate: float = 0.05
    held_out: int = 8
    curve_points: int = 4
    save_minutes: float = 5.0
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError for settings that mean nothing."""
        positive = ("length", "batch_tokens", "micro_tokens", "held_out", "hidden_blocks")
        for name in positive:
            if getattr(self, name) < 1:
                raise UsageError(f"recovery: {name} must be at least 1")
        if not 0 <= self.seed <= MOST_SEED:
            raise UsageError(f"recovery: seed must lie between 0 and {MOST_SEED}")
        if self.precision not in PRECISIONS:
            raise UsageError(
                f"recovery: precision {self.precision!r} is none of {', '.join(PRECISIONS)}"
            )
        if self.length < 2:
            raise UsageError(
                "recovery: a window of 1 token predicts nothing; length 2 is the least"
            )
        if self.batch_tokens % self.length:
            raise UsageError(
                f"recovery: batch_tokens {self.batch_tokens} is no multiple of length {self.length}"
            )
        rates = (
            *(self.learning_rate, self.code_share, self.scale_rate, self.gain_rate),
            *(self.hidden_weight, self.ce),
        )
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates) or not self.learning_rate:
            raise UsageError("recovery: rates and weights must be finite and not below 0")
        if self.warmup_steps < TIMED_STEPS:
            raise UsageError(f"recovery: warmup_steps must be at least {TIMED_STEPS}")
        if self.tokens < 0 or (not self.tokens and not 0 < self.minutes < math.inf):
            raise UsageError("recovery: give minutes above 0, or a number of tokens")
        if self.tokens and self.tokens < self.batch_tokens:
            raise UsageError(
                f"recovery: {self.tokens} tokens are less than one step of {self.batch_tokens}"
            )

    @property
    def windows_per_step(self) -> int:
        """Windows in an optimizer step."""
        return self.batch_tokens // self.length

    @property
    def windows_per_pass(self) -> int:
        """Windows that run through the model at a time."""
        return max(1, min(self.micro_tokens, self.batch_tokens) // self.length)

    def fitted(self, context: object) -> Distillation:
        """The same for a model of `context` positions, if that is a number: no longer windows."""
        if not isinstance(context, int) or context >= self.length:
            return self
        tokens = max(1, self.batch_tokens // context) * context
        return replace(self, length=context, batch_tokens=tokens)

    def to_json(self) -> dict[str, Any]:
        """What decides the resulting bytes: no times in it, and `tokens` only once resolved."""
        values = asdict(self)
        for name in ("minutes", "tokens", "save_minutes"):
            del values[name]
        return {**values, "betas": list(self.betas)}


@dataclass(frozen=True)
class DistillProgress:
    """Told after each step.

    `minutes` are those of the training loop so far, of all runs that had a part in it;
    `loss` is the training KL of the step in nats per token; `held_out` the KL on the held-out
    windows where it was measured just now, else None.
    """

    tokens: int
    total_tokens: int
    minutes: float
    loss: float
    held_out: float | None


ProgressCallback = Callable[[DistillProgress], None]


@dataclass(frozen=True)
class CurvePoint:
    """KL(dense || student) on the held-out windows, in nats per token, after some training.

    `minutes` is None where an earlier process trained and left no time.
    """

    tokens: int
    minutes: float | None
    kl: float


@dataclass(frozen=True)
class Rounding:
    """Held-out KL before and after some blocks were rounded to codes, between two trainings."""

    before: float
    after: float


@dataclass(frozen=True)
class DistillResult:
    """A complete checkpoint in `path`, and what all the training that went into it did.

    What ends in codes is trained several times (staged.py); the figures are those of all together.

    Attributes:
        path: the checkpoint's directory.
        tokens: trained on.
        steps: of the optimizer.
        before: held-out KL of what was given, in nats per token.
        after: held-out KL of what was written; above `before` where the rounding cost more than the
            training gained.
        undone: trainings that did not lower the held-out KL, and were rolled back to what they had
            begun with.
        curve: held-out KL on the way.
        minutes: of the training loops; None where an earlier process ran one and left no time.
        roundings: what happened between the trainings, one fewer than those.
    """

    path: Path
    tokens: int
    steps: int
    before: float
    after: float
    undone: int
    curve: tuple[CurvePoint, ...]
    minutes: float | None
    roundings: tuple[Rounding, ...] = ()

    @property
    def trainings(self) -> int:
        """How many there were."""
        return 1 + len(self.roundings)

    @property
    def rolled_back(self) -> bool:
        """No training helped, so that the weights are the student's own, or rounded from them."""
        return self.undone == self.trainings

    @classmethod
    def of_record(cls, path: Path, record: Mapping[str, Any]) -> DistillResult:
        """What the manifest in `path` says under provenance, "recovery": everything but times."""
        own = cls(
            path=path,
            tokens=record["tokens"],
            steps=record["steps"],
            before=record["held_out_kl"]["before"],
            after=record["held_out_kl"]["after"],
            undone=int(record["rolled_back"]),
            curve=tuple(CurvePoint(p["tokens"], None, p["kl"]) for p in record["curve"]),
            minutes=None,
        )
        earlier = record.get("before_rounding")
        return own if earlier is None else own.behind(cls.of_record(path, earlier))

    def behind(self, earlier: DistillResult) -> DistillResult:
        """This training and all before a rounding, from whose end it went on, as one."""
        later = (
            CurvePoint(earlier.tokens + p.tokens, _sum(earlier.minutes, p.minutes), p.kl)
            for p in self.curve
        )
        rounding = Rounding(earlier.after, self.before)
        return replace(
            self,
            tokens=earlier.tokens + self.tokens,
            steps=earlier.steps + self.steps,
            before=earlier.before,
            undone=earlier.undone + self.undone,
            curve=(*earlier.curve, *later),
            minutes=_sum(earlier.minutes, self.minutes),
            roundings=(*earlier.roundings, rounding, *self.roundings),
        )


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
