"""One command line of halfweave, and what it left behind."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

QUICK = ("--method", "magnitude", "--calib-windows", "2", "--calib-length", "16")
ENTRY = (sys.executable, "-c", "from halfweave.cli import main; main()")


@dataclass(frozen=True)
class Ran:
    """What one command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one line of JSON on stdout."""
        assert self.out.count("\n") == 1, self.out
        return dict(json.loads(self.out))


Command = Callable[..., Ran]


def assert_error(ran: Ran, code: int, error: str, hint: str = "") -> None:
    """Exit code, and at most two lines of stderr that say what is wrong and what to do."""
    assert ran.code == code
    assert ran.out == ""
    first, *rest = [line for line in ran.err.splitlines() if not line.startswith("plan:")]
    assert first.startswith("error: ")
    assert re.search(error, first)
    assert len(rest) <= 1
    assert hint in "".join(rest)
    assert not rest or rest[0].startswith("next: ")
