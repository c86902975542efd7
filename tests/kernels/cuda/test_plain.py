"""The plain Triton kernels run interpreted."""

from __future__ import annotations

from pathlib import Path

from support.interpreted import run_interpreted


def test_plain_kernels_give_what_torch_gives() -> None:
    run_interpreted(Path(__file__).with_name("plain_cases.py"), least=20)
