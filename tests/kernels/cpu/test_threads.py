"""Threads that cannot start, and processes that fork: in processes of their own, which may die."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.cpu_levels import UNDER_TEST

START = f"""
import os, resource, signal, sys
from pathlib import Path
import torch
from halfweave.errors import HalfweaveError
from halfweave.kernels.cpu.library import Library, load, open_level
from halfweave.kernels.cpu.packed import linear, pack_weight
from halfweave.kernels.formats import Int8

functions = load(Path({str(UNDER_TEST)!r}))
weight, x = Int8.from_dense(torch.randn(400, 64)), torch.randn(9, 64)

def multiply(library):
    return linear(library, pack_weight(library, weight), x, None)
"""


def run(code: str) -> str:
    """What a process prints that runs this; it must end well, and soon."""
    command = [sys.executable, "-c", START + code]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_threads_that_cannot_start_are_an_error_and_not_the_end() -> None:
    code = """
before = multiply(open_level(functions, "portable", 2))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, hard))  # stacks of some tens of threads
try:
    open_level(functions, "portable", 1000)
except HalfweaveError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
print(torch.equal(multiply(open_level(functions, "portable", 2)), before))
"""
    assert run(code) == "1000 threads for the CPU kernels could not be started\nTrue\n"


def test_a_forked_process_computes_with_threads_of_its_own_and_ends() -> None:
    """Also where another thread was in a call at that moment, and for a library that it drops."""
    code = """
import threading

library, dropped = open_level(functions, "portable", 2), open_level(functions, "portable", 2)
wanted = multiply(library)
threading.Thread(target=lambda: [multiply(library) for _ in range(10**9)], daemon=True).start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends it even where it waits in the library
        del dropped
        same = all(torch.equal(multiply(library), wanted) for _ in range(20))
        sys.exit(0 if same else "another result")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(torch.equal(multiply(library), wanted), flush=True)
os._exit(0)  # the thread may be in torch, which Python's own end does not let it leave alive
"""
    assert run(code) == "0\n" * 5 + "True\n"
