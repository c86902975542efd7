"""From flags to models and texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .flags import Loading

if TYPE_CHECKING:
    from ..runtime.model import LoadSettings, Model


def load(path: str, loading: Loading) -> Model:
    """A model as the flags say, and the number of threads with it."""
    from ..runtime.model import load_model

    set_threads(loading.threads)
    return load_model(path, **vars(settings(loading)))


def settings(loading: Loading) -> LoadSettings:
    """The flags as what `load_model` takes."""
    from ..runtime.model import LoadSettings

    return LoadSettings(
        loading.dtype, loading.verify, loading.head_bits, loading.kv_bits, loading.device
    )


def set_threads(threads: int | None) -> None:
    """Compute with so many threads; None leaves it to torch."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def text_of(source: str) -> tuple[str, str]:
    """A text, built-in or a file's, and where it is from, in words."""
    from ..pruner.calibrate import BUILTIN, BUILTIN_EVAL, load_text
    from ..runtime.eval import read_text

    if source not in (BUILTIN, BUILTIN_EVAL):
        return read_text(source), Path(source).name
    builtin = load_text(source)
    return builtin.text, builtin.origin
