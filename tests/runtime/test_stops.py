"""Stop strings never show, not even in part, however the text is cut."""

from __future__ import annotations

from halfweave.runtime.stops import StopFinder
from hypothesis import given
from hypothesis import strategies as st

ALPHABET = "ab🙂"


@given(
    st.lists(st.text(ALPHABET, max_size=4), max_size=12),
    st.lists(st.text(ALPHABET, min_size=1, max_size=3), min_size=1, max_size=4),
)
def test_the_text_ends_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    finder = StopFinder(tuple(stops))
    shown = ""
    for piece in pieces:
        if finder.found:
            break
        shown += finder.push(piece)
        assert not any(stop in shown for stop in stops)
    whole = "".join(pieces)
    if not finder.found:
        assert not any(stop in whole for stop in stops)
        assert shown + finder.finish() == whole
    else:
        assert any(whole.startswith(shown + stop) for stop in stops)
        assert not any(stop in shown for stop in stops)


def test_a_beginning_of_a_stop_string_is_held_back_until_it_is_decided() -> None:
    finder = StopFinder(("STOP",))
    assert finder.push("go ST") == "go "
    assert finder.push("O") == ""
    assert finder.push("RM") == "STORM"
    assert finder.finish() == ""


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopFinder(()).push("text") == "text"
