"""One pruning method per file, all behind one signature (see base.py)."""

from __future__ import annotations

from collections.abc import Mapping

from . import admm, magnitude, sparsegpt, wanda
from .base import InputStatistics, Method, Pruned, Target

METHODS: Mapping[str, Method] = {
    "admm": admm.prune,
    "magnitude": magnitude.prune,
    "wanda": wanda.prune,
    "sparsegpt": sparsegpt.prune,
}

__all__ = ["METHODS", "InputStatistics", "Method", "Pruned", "Target"]
