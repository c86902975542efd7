"""Answers that must, or may, be calls of functions."""

from __future__ import annotations

from pathlib import Path

import pytest
from halfweave.runtime.grammar import CallForm, GrammarCompiler
from halfweave.runtime.tokenizer import Tokenizer
from support.grammars import FORMS, accepts, refused


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.open(tiny_model)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


@pytest.mark.parametrize(
    ("text", "one", "several"),
    [
        ("<call>one({})</call>", True, True),
        ("<call>two(17)</call>", True, True),
        ("<call>two(1)</call>\n<call>one({})</call>\n<call>two(2)</call>", False, True),
        ("<call>two(1)</call><call>two(1)</call>", False, False),
        ("<call>two({})</call>", False, False),
        ("<call>three(1)</call>", False, False),
        ("hello <call>two(1)</call>", False, False),
        ("", False, False),
    ],
)
def test_a_call_must_be_made(
    tokenizer: Tokenizer, compiler: GrammarCompiler, text: str, one: bool, several: bool
) -> None:
    assert accepts(tokenizer, compiler.tool_calls(FORMS), text) == one
    assert accepts(tokenizer, compiler.tool_calls(FORMS, several=True), text) == several


@pytest.mark.parametrize(
    ("text", "one", "several"),
    [
        ("", True, True),
        ("no call, but <cal", True, True),
        ("well:\n<call>two(17)</call>", True, True),
        ("a <call>two(1)</call> b\n<call>one({})</call> c", False, True),
        ("<call>three(1)</call>", False, False),
        ("<call>", False, False),
        ("a <call>two(1", False, False),
    ],
)
def test_a_call_may_be_made_in_a_text(
    tokenizer: Tokenizer, compiler: GrammarCompiler, text: str, one: bool, several: bool
) -> None:
    assert accepts(tokenizer, compiler.tool_calls(FORMS, "<call>"), text) == one
    assert accepts(tokenizer, compiler.tool_calls(FORMS, "<call>", True), text) == several


def test_a_hostile_schema_of_a_tool_is_refused(compiler: GrammarCompiler) -> None:
    """Row 39."""
    refused(lambda: compiler.tool_calls([CallForm("a", {"$ref": "http://x"}, "b")]), "tools")
    large = [CallForm(f"{n}", {"description": "x" * 60_000}, "") for n in range(5)]
    refused(lambda: compiler.tool_calls(large), "tools")


def test_references_of_one_tool_do_not_reach_another(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    forms = [
        CallForm(f"{name}:", {"$ref": "#/$defs/x", "$defs": {"x": {"const": value}}}, ";")
        for name, value in (("a", 1), ("b", 2))
    ]
    form = compiler.tool_calls(forms)
    assert accepts(tokenizer, form, "a:1;") and accepts(tokenizer, form, "b:2;")
    assert not accepts(tokenizer, form, "a:2;")
