"""docs/reliability.md has a row for each fault and bad input, and each row has tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "reliability.md"
ROWS = re.compile(r"\b[Rr]ows? (\d+(?:(?:, | to | and |, and )\d+)*)")


def rows_named() -> Iterator[int]:
    """By the name of a test, by its docstring, or by its file's."""
    for file in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Module | ast.FunctionDef):
                name = "" if isinstance(node, ast.Module) else node.name.replace("_", " ")
                for rows in ROWS.findall(f"{name}. {ast.get_docstring(node) or ''}"):
                    yield from map(int, re.findall(r"\d+", rows))


def test_every_row_of_the_page_has_a_test_that_names_it() -> None:
    rows = [int(row) for row in re.findall(r"^\| (\d+) \|", PAGE.read_text(), re.M)]
    assert rows == list(range(1, len(rows) + 1))
    assert set(rows) == set(rows_named())
