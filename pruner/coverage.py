"""How much calibration the experts of a model have seen, said where a run reports."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from .journal import LinearRecord


def coverage(linears: Iterable[LinearRecord]) -> str | None:
    """One sentence on the linears of experts; None where there are none."""
    routed = [record for record in linears if record.tokens is not None]
    tokens = [record.tokens for record in routed if record.tokens is not None]
    if not routed:
        return None
    starved = sum(seen < record.shape[1] for record, seen in zip(routed, tokens, strict=True))
    said = (
        f"each saw {min(tokens)} to {max(tokens)} tokens, {median(tokens):g} in the median; "
        f"{starved} of {len(routed)} linears fewer than they have inputs"
    )
    return said + (", and were pruned by more than those" if starved else "")
