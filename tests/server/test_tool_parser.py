"""Calls are read back from what the model has written, as it arrives."""

from __future__ import annotations

from itertools import pairwise

import pytest
from halfweave.server.tool_parser import CallDelta, ToolCallParser, parse_calls
from halfweave.server.tool_text import CALL_END, CALL_TRIGGER, call_begin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PARIS = '{"city": "Paris", "days": 3}'
CALL = f"{call_begin('get_weather')}{PARIS}{CALL_END}"
NASTY = '{"x": "}</tool_call>\\n}\\n</tool_call><tool_call>", "y": {"z": {}}}'
TEXTS = st.text(alphabet='<>/tool_ca \n{}"', max_size=12) | st.sampled_from(
    ["Hm. ", "<tool_call", ""]
)
CALLS = st.tuples(st.sampled_from(["f", "get_weather"]), st.sampled_from(["{}", PARIS, NASTY]))


def in_pieces(text: str, cuts: list[int]) -> list[str]:
    at = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(at)]


def streamed(pieces: list[str]) -> tuple[list[str | CallDelta], ToolCallParser]:
    parser = ToolCallParser()
    shown = [part for piece in pieces for part in parser.push(piece)]
    return [*shown, *parser.finish()], parser


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    parts=st.lists(st.tuples(TEXTS, CALLS), max_size=3),
    last=TEXTS,
    cuts=st.lists(st.integers(0, 10_000), max_size=40),
)
def test_calls_are_read_back_however_the_text_is_cut(
    parts: list[tuple[str, tuple[str, str]]], last: str, cuts: list[int]
) -> None:
    parts = [(text.replace(CALL_TRIGGER, ""), call) for text, call in parts]
    last = last.replace(CALL_TRIGGER, "")
    text = "".join(
        f"{said}{call_begin(name)}{arguments}{CALL_END}" for said, (name, arguments) in parts
    )
    shown, parser = streamed(in_pieces(text + last, cuts))
    said = [said.rstrip() for said, _ in parts] + [last.rstrip() if parts else last]
    assert "".join(part for part in shown if isinstance(part, str)) == "".join(said)
    assert [(call.name, call.arguments) for call in parser.calls] == [call for _, call in parts]
    for index, call in enumerate(parser.calls):
        deltas = [d for d in shown if isinstance(d, CallDelta) and d.index == index]
        assert (deltas[0].id, deltas[0].name, deltas[0].arguments) == (call.id, call.name, "")
        assert all((d.id, d.name) == (None, None) for d in deltas[1:])
        assert "".join(d.arguments for d in deltas) == call.arguments


def test_calls_have_ids_of_their_own() -> None:
    _, calls, _ = parse_calls(f"{CALL}\n{CALL}")
    assert len({call.id for call in calls}) == 2
    assert all(call.id.startswith("call_") and call.id.isascii() for call in calls)


def test_text_and_arguments_are_shown_as_soon_as_they_are_certain() -> None:
    parser = ToolCallParser()
    assert parser.push("Let me see.") == ["Let me see."]
    assert parser.push("\n<tool") == []
    begun = parser.push('_call>\n{"name": "f", "arguments": {"a": 1')
    assert [(d.name, d.arguments) for d in begun if isinstance(d, CallDelta)] == [
        ("f", ""),
        (None, '{"a": 1'),
    ]
    assert parser.push(", ") == [CallDelta(0, ", ")]


@pytest.mark.parametrize("length", range(len(CALL)))
def test_a_call_that_is_cut_off_is_given_as_far_as_it_got(length: int) -> None:
    text = f"Hm. {CALL[:length]}"
    content, calls, whole = parse_calls(text)
    # A client is told to carry out what it can read.
    assert whole == (length >= len(call_begin("get_weather")) + len(PARIS))
    if length < len(call_begin("get_weather")):
        assert (content, calls) == (text, [])
    else:
        assert content == "Hm."
        written = CALL[len(call_begin("get_weather")) : length]
        wanted = PARIS if written.startswith(PARIS) else written
        assert [(call.name, call.arguments) for call in calls] == [("get_weather", wanted)]


def test_blanks_are_held_until_it_is_certain_what_they_belong_to() -> None:
    parser = ToolCallParser()
    assert [parser.push(piece) for piece in ("a ", "\n", " ", "b", "\n")] == [
        ["a"],
        [],
        [],
        [" \n b"],
        [],
    ]
    assert parser.finish() == ["\n"]
