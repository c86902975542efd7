"""Keeps tensor work to one lasting thread, because a second one makes it slower for good.

OpenMP keeps a team of workers for every thread that has ever computed in parallel. Once the teams
together outnumber the cores, waiting workers give up their core at once, and every small matrix
product pays for waking them: a token of a 135M model took 52 ms instead of 28 here, on two cores.
The engine has a thread of its own; whatever else computes therefore does so in one that ends.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

Result = TypeVar("Result")


def in_passing_thread(work: Callable[[], Result]) -> Result:
    """Do `work` in a thread that ends with it; returns its result, or raises what it raised.

    An interrupt of the caller is raised at once and leaves the work to end by itself.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="halfweave-passing", daemon=True).start()
    return future.result()
