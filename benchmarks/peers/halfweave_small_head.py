"""halfweave's own decoder with a head of 4 bits: MODEL THREADS."""

from __future__ import annotations

from halfweave_engine import Halfweave
from worker import serve


class SmallHead(Halfweave):
    """The same but for the head."""

    head_bits = 4


serve(SmallHead)
