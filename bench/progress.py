"""How a measurement tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Told after each step: steps done, steps in all of this phase, and what was done.
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, what: str) -> None:
    """Progress that nobody asked for."""
