"""halfweave: keeps two weights of every four, and serves what is left.

The public names are loaded on first use, so that `import halfweave` (and `halfweave --help`)
does not pay for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "Recipe", "SamplingParams", "__version__", "export", "prune", "recover"]

if TYPE_CHECKING:
    from .pruner.export import export
    from .pruner.pipeline import prune
    from .pruner.recipe import Recipe
    from .pruner.recovery import recover
    from .runtime.llm import LLM
    from .runtime.params import SamplingParams

_HOME = {
    "LLM": "runtime.llm",
    "SamplingParams": "runtime.params",
    "Recipe": "pruner.recipe",
    "export": "pruner.export",
    "prune": "pruner.pipeline",
    "recover": "pruner.recovery",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
