"""Pages and the scheduler over them, driven at random: nothing is lost, nobody is starved."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from halfweave.kernels.paging import PAGE_POSITIONS as PAGE
from halfweave.runtime import pages as pages_module
from halfweave.runtime.answer import Answer
from halfweave.runtime.paged import pages_for
from halfweave.runtime.pages import PagePool, root_digest
from halfweave.runtime.params import SamplingParams
from halfweave.runtime.request import GenerationRequest
from halfweave.runtime.scheduler import Scheduler
from halfweave.runtime.sequence import Sequence
from halfweave.runtime.tokenizer import Tokenizer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

TOKENS = tuple(range(100, 100 + 5 * PAGE))


def filled(pool: PagePool, tokens: tuple[int, ...], salt: bytes = b"") -> list[int]:
    """Pages that a sequence of these tokens has filled and given back."""
    pages = pool.take(len(tokens) // PAGE)
    assert pages is not None
    digest = root_digest(salt)
    for number, page in enumerate(pages):
        digest = pool.publish(page, digest, tokens[number * PAGE : (number + 1) * PAGE])
    pool.release(pages)
    return pages


def test_a_beginning_is_found_page_by_page() -> None:
    pool = PagePool(8)
    pages = filled(pool, TOKENS)
    assert pool.find(TOKENS, b"")[0] == pages[:4]  # one token at least is left to compute
    assert pool.find((*TOKENS, 1), b"")[0] == pages
    assert pool.find((*TOKENS[:40], 1, 2, *TOKENS[42:]), b"")[0] == pages[:2]
    assert pool.find((1, *TOKENS[1:]), b"")[0] == []
    assert pool.find(TOKENS, b"salt")[0] == []
    assert pool.used == 5


def test_the_longest_unused_goes_first_and_ends_before_beginnings() -> None:
    pool = PagePool(6)
    first, second = filled(pool, TOKENS[: 3 * PAGE]), filled(pool, TOKENS[PAGE : 4 * PAGE])
    taken = pool.take(2)
    assert taken == [first[2], first[1]]
    assert pool.find(TOKENS, b"")[0] == first[:1]
    pool.release(first[:1])
    assert pool.find((*TOKENS[PAGE : 4 * PAGE], 0), b"")[0] == second
    pool.check_integrity()


def test_more_than_there_is_is_not_given_at_all() -> None:
    pool = PagePool(4)
    held = pool.take(3)
    assert pool.take(2) is None
    assert pool.available == 1
    assert held is not None
    pool.release(held)
    assert pool.available == 4


def test_a_digest_alone_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were two beginnings to collide, the tokens themselves would tell them apart."""
    monkeypatch.setattr(pages_module, "next_digest", lambda parent, tokens: b"always the same")
    pool = PagePool(4)
    filled(pool, TOKENS[:PAGE])
    assert pool.find((*TOKENS[:PAGE], 0), b"")[0] != []
    assert pool.find((*TOKENS[PAGE : 2 * PAGE], 0), b"")[0] == []


def test_lists_of_tokens_are_not_confused() -> None:
    """Digests see where one token ends: 1, 23 is not 12, 3."""
    one = pages_module.next_digest(b"", (1, 23))
    assert one != pages_module.next_digest(b"", (12, 3))


@pytest.mark.parametrize("spoil", ["lost", "twice", "shared"])
def test_the_check_sees_what_is_wrong(spoil: str) -> None:
    pool = PagePool(4)
    held = pool.take(2)
    assert held is not None
    if spoil == "lost":
        pool._free.pop()
    elif spoil == "twice":
        pool.release([held[0], held[0]])
    else:
        pool._free.append(held[0])
    with pytest.raises(AssertionError):
        pool.check_integrity()


POOL, RUNNING, BUDGET, LONGEST = 12, 4, 20, 10 * PAGE


class Machine(RuleBasedStateMachine):
    """Requests come, go and run as they like; a step is carried out as the engine would."""

    tokenizer: Tokenizer

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(PagePool(POOL), RUNNING, BUDGET)
        self.all: list[Sequence] = []
        self.dice = random.Random(0)

    @rule(
        begins=st.integers(0, 2),
        length=st.integers(1, 6 * PAGE),
        answer=st.integers(1, 3 * PAGE),
        priority=st.integers(-1, 1),
    )
    def arrive(self, begins: int, length: int, answer: int, priority: int) -> None:
        prompt = tuple(100 * begins + n for n in range(length))
        params = SamplingParams(max_tokens=answer)
        request = GenerationRequest(f"{len(self.all)}", prompt, params, priority)
        limit = min(answer, LONGEST - length)
        new = Sequence(request, print, Answer(request, self.tokenizer, limit), len(self.all))
        self.all.append(new)
        self.scheduler.add(new)

    @precondition(lambda self: self.scheduler.running or self.scheduler.waiting)
    @rule(at=st.integers(0, 1000))
    def abort(self, at: int) -> None:
        there = [*self.scheduler.running, *self.scheduler.waiting]
        self.scheduler.remove(there[at % len(there)])

    @precondition(lambda self: self.scheduler.running or self.scheduler.waiting)
    @rule()
    def step(self) -> None:
        work = self.scheduler.plan()
        assert work, "there is something to do, and nothing is planned"
        assert sum(each.count for each in work) <= BUDGET
        assert len({id(each.sequence) for each in work}) == len(work)
        pages = [
            page for each in work for page in each.sequence.pages[each.sequence.computed // PAGE :]
        ]
        assert len(set(pages)) == len(pages), "two sequences write to one page"
        for each in work:
            sequence = each.sequence
            assert sequence in self.scheduler.running
            assert len(sequence.pages) >= pages_for(sequence.computed + each.count)
            complete = each.completes
            sequence.advance(each.count, self.scheduler.pool)
            if complete:
                sequence.answer.token_ids.append(self.dice.randint(0, 9))
                if len(sequence.answer.token_ids) >= sequence.answer.limit:
                    self.scheduler.remove(sequence)

    @invariant()
    def every_page_is_somewhere(self) -> None:
        pool = self.scheduler.pool
        pool.check_integrity()
        held = {page for sequence in self.scheduler.running for page in sequence.pages}
        assert pool.used == len(held)
        assert all(not sequence.pages for sequence in self.scheduler.waiting)
        assert len(self.scheduler.running) <= RUNNING

    def teardown(self) -> None:
        """Whoever is left gets to its end: nobody waits for ever."""
        for _ in range(20_000):
            if not (self.scheduler.running or self.scheduler.waiting):
                break
            self.step()
        assert not self.scheduler.running and not self.scheduler.waiting
        assert self.scheduler.pool.used == 0


@pytest.fixture(scope="module", autouse=True)
def tokenizer(tiny_model: Path) -> None:
    Machine.tokenizer = Tokenizer.open(tiny_model)


TestScheduler = Machine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
