"""What `bench offline` measures, and how often."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError

LEAST_REPETITIONS = 5


@dataclass(frozen=True)
class BenchPlan:
    """What to measure. Medians of fewer than five repetitions are not offered.

    Raises:
        UsageError: a number is too small.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    repetitions: int = 7
    warmups: int = 1
    window: int = 512
    max_windows: int = 8
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)

    def __post_init__(self) -> None:
        least = {"prompt_tokens": 1, "new_tokens": 2, "repetitions": LEAST_REPETITIONS}
        for name, low in (*least.items(), ("warmups", 1), ("window", 2), ("max_windows", 1)):
            if getattr(self, name) < low:
                raise UsageError(f"{name} must be at least {low}")
        if any(batch < 1 for batch in self.batches):
            raise UsageError("a batch must be at least 1")
        if len(set(self.batches)) < len(self.batches):
            raise UsageError("a batch is given twice")

    @property
    def turns(self) -> int:
        """How often every model is looked at, warm-ups included."""
        return self.warmups + self.repetitions
