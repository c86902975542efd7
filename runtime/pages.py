"""Which pages of keys and values are whose. Knows numbers of pages, not what is in them.

A page holds a fixed number of positions. Sequences that begin with the same tokens share the full
pages of that beginning; when nobody uses such a page any more it is kept for whoever comes next,
until the room is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from ..kernels.paging import PAGE_POSITIONS


@dataclass(frozen=True)
class _Known:
    """What a page holds: `tokens` behind the beginning that `parent` stands for."""

    digest: bytes
    parent: bytes
    tokens: tuple[int, ...]


def root_digest(salt: bytes) -> bytes:
    """What the chain of an empty beginning starts from."""
    return blake2b(salt, digest_size=32).digest()


def next_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """What stands for a beginning and one more page of tokens."""
    hashed = blake2b(parent, digest_size=32)
    hashed.update(b",".join(b"%d" % token for token in tokens))
    return hashed.digest()


class PagePool:
    """`count` pages: each is free, used by sequences, or kept for what is in it."""

    def __init__(self, count: int, share: bool = True) -> None:
        """With `share` false no page is ever found again."""
        self.count, self._share = count, share
        self._users = [0] * count
        self._free = list(range(count - 1, -1, -1))  # a stack, so that few pages are ever touched
        self._kept: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._pages: dict[bytes, int] = {}
        self._known: dict[int, _Known] = {}

    @property
    def available(self) -> int:
        """Pages that can be taken: free ones, and those that nobody uses."""
        return len(self._free) + len(self._kept)

    @property
    def used(self) -> int:
        """Pages that sequences use."""
        return self.count - self.available

    def take(self, count: int) -> list[int] | None:
        """So many pages for one sequence, with anything in them; None if there are too few."""
        if count > self.available:
            return None
        return [self._take_one() for _ in range(count)]

    def find(self, tokens: Sequence[int], salt: bytes) -> tuple[list[int], list[bytes]]:
        """Take the pages that hold the longest known beginning of `tokens`, and their digests.

        One token at least is left out, since something must be computed to go on from.
        """
        pages: list[int] = []
        digests = [root_digest(salt)]
        for start in range(0, len(tokens) - PAGE_POSITIONS, PAGE_POSITIONS):
            part = tuple(tokens[start : start + PAGE_POSITIONS])
            page = self._holding(digests[-1], part)
            if page is None:
                break
            self._users[page] += 1
            self._kept.pop(page, None)
            pages.append(page)
            digests.append(self._known[page].digest)
        return pages, digests

    def publish(self, page: int, parent: bytes, tokens: Sequence[int]) -> bytes:
        """Let others find a full page that a sequence has filled; returns its digest."""
        digest = next_digest(parent, tokens)
        if self._share and digest not in self._pages and page not in self._known:
            self._pages[digest] = page
            self._known[page] = _Known(digest, parent, tuple(tokens))
        return digest

    def release(self, pages: Sequence[int]) -> None:
        """A sequence uses these no more. Ends of sequences are given up before beginnings."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._known:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is in exactly one place."""
        free, kept = set(self._free), set(self._kept)
        used = {page for page, users in enumerate(self._users) if users > 0}
        assert min(self._users, default=0) >= 0, "a page was released too often"
        assert len(free) == len(self._free), "a page is free twice"
        assert not (free & kept or free & used or kept & used), "a page is in two places"
        assert len(free) + len(kept) + len(used) == self.count, "a page is lost"
        assert kept <= set(self._known), "a page is kept for nothing"
        assert not free & set(self._known), "a free page can be found"
        assert self._pages == {known.digest: page for page, known in self._known.items()}

    def _take_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            self._forget(page)
        self._users[page] = 1
        return page

    def _holding(self, parent: bytes, tokens: tuple[int, ...]) -> int | None:
        """A digest that is found is not trusted: what the page holds is compared as well."""
        page = self._pages.get(next_digest(parent, tokens))
        if page is None:
            return None
        known = self._known[page]
        return page if known.tokens == tokens and known.parent == parent else None

    def _forget(self, page: int) -> None:
        del self._pages[self._known.pop(page).digest]
