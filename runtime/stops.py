"""Finds stop strings in text that arrives in pieces, and holds back what may become one."""

from __future__ import annotations


class StopFinder:
    """Give it text as it comes; it returns what may be shown."""

    def __init__(self, stops: tuple[str, ...], keep: bool = False) -> None:
        """With `keep` the text that is shown includes the stop string that ends it."""
        self._stops, self._keep = stops, keep
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that is certain not to belong to a stop string; sets `found` at the first one."""
        text = self._held + text
        found = [(at, at + len(stop)) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            start, end = min(found)
            self.found, self._held = True, ""
            return text[: end if self._keep else start]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back and did not become a stop string after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
