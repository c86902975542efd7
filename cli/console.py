"""What the command line says: results on stdout, everything else on stderr.

With `--json` the one document on stdout is for machines, and what people read goes to stderr.
Lines keep to 100 columns. Knows nothing of models.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from textwrap import fill
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import HalfweaveError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

WIDTH = 100


class Console:
    """One verb's way out. `json_mode` keeps stdout for the one document."""

    def __init__(self, json_mode: bool) -> None:
        self.json_mode = json_mode

    @property
    def _people(self) -> TextIO:
        return sys.stderr if self.json_mode else sys.stdout

    @property
    def interactive(self) -> bool:
        """Whether somebody types the input and reads the output."""
        return sys.stdin.isatty() and sys.stdout.isatty()

    def say(self, text: str) -> None:
        """Print a line for people."""
        print(text, file=self._people, flush=True)

    def tell(self, text: str) -> None:
        """Print a line about the work itself: never part of the result."""
        print(text, file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """Print a piece of a line for people at once: text that arrives bit by bit."""
        self._people.write(text)
        self._people.flush()

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        words: Collection[int] = (0, -1),
    ) -> None:
        """Print columns, those in `words` to the left; too wide ones are cut with an ellipsis."""
        from rich.console import Console as Rich
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        left = {index % len(header) for index in words}
        for index, title in enumerate(header):
            table.add_column(
                title,
                justify="left" if index in left else "right",
                no_wrap=True,
                overflow="ellipsis",
            )
        for row in rows:
            table.add_row(*row)
        Rich(file=self._people, width=WIDTH, highlight=False, markup=False).print(table)

    def document(self, value: Mapping[str, Any]) -> None:
        """Print the machine-readable result, in one line, if it was asked for."""
        if self.json_mode:
            print(json.dumps(plain(value), ensure_ascii=False, default=str), flush=True)

    def last_line(self, value: Mapping[str, Any]) -> None:
        """Print the result in one line at the end of stdout, whether it was asked for or not."""
        print(json.dumps(plain(value), ensure_ascii=False, default=str), flush=True)

    def progress(self, unit: str) -> Progress:
        """Progress of a job that is made of such units."""
        return Progress(unit)


class Progress(AbstractContextManager["Progress"]):
    """Steps of a job, on stderr: a bar on a terminal, one plain line a step elsewhere."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._started = self._last = time.monotonic()

    def phase(self, unit: str) -> None:
        """From now on the job is made of other units."""
        self._unit = unit

    def step(self, done: int, total: int, what: str) -> None:
        """`done` of `total` steps are done, the last of them was `what`.

        A smaller `done`, or another total, begins a new phase with an estimate of its own.
        """
        now = time.monotonic()
        if done <= 1 or total != self._total:
            self._started, self._total = self._last, total
        left = (now - self._started) / max(done, 1) * (total - done)
        self.line(done, total, what, now - self._last, left)

    def line(self, done: int, total: int, what: str, seconds: float, left: float) -> None:
        """As `step`, where the caller has measured the step and estimated the rest.

        A `total` of 0 is not known yet, and so is what is `left`.
        """
        self._last = time.monotonic()
        if sys.stderr.isatty():
            self._draw(done, total, what)
            return
        rest = f"eta {duration(left) if total else '?'}"
        text = f"{self._unit} {done}/{total or '?'} {what} {seconds:.1f} s {rest}"
        print(text, file=sys.stderr, flush=True)

    def _draw(self, done: int, total: int, what: str) -> None:
        if self._bar is None or self._task is None:
            self._bar = _new_bar()
            self._task = self._bar.add_task("", total=total or None)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total or None, description=what)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _new_bar() -> Bar:
    from rich.console import Console as Rich
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (MofNCompleteColumn(), BarColumn(20), TimeRemainingColumn())
    text = TextColumn("{task.description}", markup=False)
    return Bar(*columns, text, console=Rich(stderr=True), transient=True)


def log_to_stderr() -> None:
    """Show the log of a long-running verb, one line a record, as it is."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("halfweave").setLevel(logging.INFO)


def print_error(error: HalfweaveError) -> None:
    """What went wrong, and what to type next, on stderr: a line each, folded on a terminal."""
    lines = [f"error: {_one_line(error.message)}"]
    if error.hint:
        lines.append(f"next: {_one_line(error.hint)}")
    for line in lines:
        print(_folded(line) if sys.stderr.isatty() else line, file=sys.stderr)


def _folded(line: str) -> str:
    """Lines of at most our width, words and paths whole."""
    return fill(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def duration(seconds: float) -> str:
    """Seconds as people say them: 8s, 3m40s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def size(count: int) -> str:
    """Bytes in the binary unit that leaves a number below 1024."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, _ = value / 1024, units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def plain(value: Any) -> Any:
    """As JSON has it: dataclasses as objects, but for fields that are not shown, paths as text,
    infinity and NaN as null.

    Bytes of a name that are no UTF-8 are spelled out, since no file could hold them.
    """
    if is_dataclass(value):
        shown = (field.name for field in fields(value) if field.repr)
        return {name: plain(getattr(value, name)) for name in shown}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str | PurePath):
        return str(value).encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value
