"""What every launch has to keep to: the tensors' own GPU, and grids that a GPU takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

MOST_PROGRAMS = 65535  # along a grid's second axis, and its third; the first takes 2^31 - 1
_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")


def on_its_device(
    function: Callable[Concatenate[Tensor, _Rest], _Result],
) -> Callable[Concatenate[Tensor, _Rest], _Result]:
    """The function on the GPU of its first tensor: Triton launches on the thread's current one.

    Nothing changes for tensors of a CPU.
    """

    @wraps(function)
    def run(first: Tensor, /, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Result:
        with torch.cuda.device_of(first):
            return function(first, *args, **kwargs)

    return run


def fits(tokens: int, each: int) -> bool:
    """Whether one grid has programs for so many tokens, of `each` tokens."""
    return tokens <= MOST_PROGRAMS * each


def pieces(tokens: int, each: int) -> Iterator[slice]:
    """Runs of tokens for which one grid has programs, of `each` tokens."""
    most = MOST_PROGRAMS * each
    return (slice(start, min(start + most, tokens)) for start in range(0, tokens, most))
