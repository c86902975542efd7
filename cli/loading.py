"""From the flags of many verbs to a loaded model, and a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .flags import Loading

if TYPE_CHECKING:
    from ..runtime.model import LoadSettings, Model


def load(path: str, loading: Loading) -> Model:
    """A model, after the number of threads was set."""
    from ..runtime.model import load_model

    set_threads(loading.threads)
    return load_model(path, **vars(load_settings(loading)))


def load_settings(loading: Loading) -> LoadSettings:
    """What `load_model` takes."""
    from ..runtime.model import LoadSettings

    return LoadSettings(
        loading.dtype, loading.verify, loading.head_bits, loading.kv_bits, loading.device
    )


def set_threads(threads: int | None) -> None:
    """Of torch, and of the kernels if they have not started theirs."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def read_source(source: str) -> tuple[str, str]:
    """A text and where it is from, in words."""
    from ..pruner.calibrate import BUILTIN, BUILTIN_EVAL, load_text
    from ..runtime.eval import read_text

    if source not in (BUILTIN, BUILTIN_EVAL):
        return read_text(source), Path(source).name
    builtin = load_text(source)
    return builtin.text, builtin.origin
