"""A forward pass that can wait in the middle: it stops where a linear is about to be called, and
goes on later from there, with whatever weights the module then has.

A pass is a greenlet, a stack of its own, that the module's hooks leave and that is come back to. So
it works for any architecture, and nothing is computed twice. Knows modules and calls; nothing of
weights or Hessians.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from ..errors import CheckpointError


class _Stack(greenlet):
    """The frames of one pass."""


class PausingPass:
    """One forward pass, from any stop of its module to a later one, and on to its output."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        """`run` calls a module that `stops` is in force for."""
        self._run = run
        self._stack: _Stack | None = None

    def until(self, stop: nn.Module) -> Tensor:
        """Run to where `stop` is called; its input.

        Raises:
            CheckpointError: the rest of the pass never calls it.
        """
        if self._stack is None:
            self._stack = _Stack(self._run)
        while True:
            reached: Any = self._stack.switch()
            if self._stack.dead:
                raise CheckpointError("a linear of the block was never called")
            module, seen = reached
            if module is stop:
                return seen  # type: ignore[no-any-return]

    def output(self) -> Tensor:
        """Run to the end; the pass is then as new."""
        stack, self._stack = self._stack or _Stack(self._run), None
        while True:
            reached: Any = stack.switch()
            if stack.dead:
                return reached  # type: ignore[no-any-return]

    def drop(self) -> None:
        """Give up what was computed, and its memory; the pass is then as new."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.throw()


@contextmanager
def stops(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, passes stop where one of these modules is called; other calls do not notice."""
    handles = [module.register_forward_pre_hook(_stop) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    here = getcurrent()
    if isinstance(here, _Stack):
        assert here.parent is not None
        here.parent.switch((module, args[0]))
