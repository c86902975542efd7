"""Prunes a model again and again, killed before each change on the disk in turn, then resumed.

    python kill_every_write.py MODEL WORK [distill | budget]

Forks after the slow imports, so that one kill costs a fraction of a second. Prints the number of
kill points; fails at the first resumed directory that differs from an undisturbed one.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from halfweave.pruner.journal import Journal
from halfweave.pruner.pipeline import prune
from halfweave.pruner.recipe import Recipe

TEXT = Path(__file__).parents[2] / "LICENSE"  # any English will do
PLAIN = Recipe(bits=4, group=32, calib=str(TEXT), calib_windows=3, calib_length=24)
RECIPES = {
    "plain": PLAIN,
    # Which precision is faster is measured in each run, and may come out otherwise in the next.
    "distill": replace(PLAIN, recover="distill", recover_tokens=2048, recover_precision="float32"),
    "budget": replace(PLAIN, bits=16, calib_windows=16, max_ppl_ratio=1.5),
}


def main() -> None:
    model, work = Path(sys.argv[1]), Path(sys.argv[2])
    chosen = RECIPES[sys.argv[3] if len(sys.argv) > 3 else "plain"]
    torch.set_num_threads(1)
    whole = work / "whole"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork
    prune(model, whole, chosen)  # here and not in a child: it does the slow imports, once for all
    expected = digest(whole)
    kill_at = 0
    while True:
        out = work / f"killed-{kill_at}"
        status = in_child(lambda out=out, at=kill_at: killed_run(model, out, chosen, at))
        if status == 0:
            break
        assert status == signal.SIGKILL, f"kill point {kill_at}: the run ended with {status}"
        complete = (out / "halfweave.json").exists()
        unfinished = (out / ".halfweave-journal.jsonl").exists()
        if unfinished or not complete:
            resumed = in_child(lambda out=out: prune(model, out, chosen, resume=True))
            assert resumed == 0, f"kill point {kill_at}: the resume failed"
        found = digest(out)
        differing = [n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)]
        assert not differing, f"kill point {kill_at}: {differing} differ"
        kill_at += 1
    print(kill_at)


def killed_run(model: Path, out: Path, chosen: Recipe, at: int) -> None:
    """Prune, and die just before the change number `at` to what a reader of the directory sees.

    Those are renames, removals and journal lines. Flushes are no kill points of their own: what a
    killed process has written stays in the system's cache.
    """
    left = at

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return real(*arguments, **options)

        return call

    for owner, name in ((os, "replace"), (os, "unlink"), (Journal, "_append")):
        setattr(owner, name, counted(getattr(owner, name)))
    prune(model, out, chosen)


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked process: 0, 1 for an exception, or the number of the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else os.WTERMSIG(status)


def digest(directory: Path) -> dict[str, str]:
    """SHA-256 of every file, hidden ones included."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


if __name__ == "__main__":
    main()
