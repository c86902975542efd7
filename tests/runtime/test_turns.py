"""Threads that take turns are served in the order in which they asked."""

from __future__ import annotations

import threading
import time

from halfweave.runtime.turns import Turns
from support.http_server import wait_until


def test_who_asks_again_stands_behind_those_who_wait() -> None:
    turns, order = Turns(), []
    threads = []

    def work(name: str) -> None:
        with turns:
            order.append(name)

    with turns:
        for name in "abc":
            threads.append(threading.Thread(target=work, args=(name,)))
            threads[-1].start()
            wait_until(lambda: len(turns._waiting) == len(threads))
    work("again")
    for thread in threads:
        thread.join(10)
    assert order == ["a", "b", "c", "again"]


def test_one_at_a_time() -> None:
    turns, inside, seen = Turns(), [0], []

    def work() -> None:
        for _ in range(500):
            with turns:
                inside[0] += 1
                time.sleep(0)  # let others in, if they can
                seen.append(inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [1] * 2000
