"""What decides a run's bytes beside its recipe and its text: saved with it, and asked for again."""

from __future__ import annotations

from typing import Any

import torch

from .. import __version__
from .source import Source


def surroundings(source: Source) -> dict[str, Any]:
    """Versions, device, number of threads, and the dense model's name and hashes."""
    import transformers

    return {
        "halfweave": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(source.device),
        "threads": torch.get_num_threads(),
        "base": {"name": source.path.resolve().name, "sha256": source.hashes},
    }
