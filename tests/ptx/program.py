"""PTX text of one kernel to a list of instructions. Knows the grammar, not what anything does."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .numbers import PTXError, bits_of

_LABEL = re.compile(r"[$\w]+:")
_NAME = r"%?[$\w]+"


@dataclass(frozen=True)
class Instruction:
    """One instruction: opcode and modifiers, operands, and the predicate that guards it."""

    text: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None = None
    negated: bool = False


@dataclass(frozen=True)
class Program:
    """One kernel. `widths` has the bits of each register, 1 for a predicate."""

    name: str
    threads: int
    parameters: tuple[str, ...]
    widths: dict[str, int]
    labels: dict[str, int]
    instructions: tuple[Instruction, ...]


def parse(ptx: str) -> Program:
    """Read the (only) kernel of a PTX module.

    Raises:
        PTXError: there is none, or a register is declared twice with different widths.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
    found = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{(.*)\}", text, re.S)
    if found is None:
        raise PTXError("no kernel in this text")
    name, parameters, directives, body = found.groups()
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", directives)
    if threads is None:
        raise PTXError("the number of threads is not given")
    names = re.findall(r"\.param\s+\.\w+[^,]*?\s(\w+)\s*(?:,|$)", parameters.strip() + "\n")
    widths: dict[str, int] = {}
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for statement in _statements(body):
        if _LABEL.fullmatch(statement):
            labels[statement[:-1]] = len(instructions)
        elif statement.startswith(".reg"):
            _declare(statement, widths)
        elif not statement.startswith(".pragma"):
            instructions.append(_instruction(statement))
    return Program(name, int(threads.group(1)), tuple(names), widths, labels, tuple(instructions))


def _statements(body: str) -> list[str]:
    """Labels and what ends in semicolons; the braces of scopes are dropped."""
    body = re.sub(r"\.(loc|file|section)\b[^\n]*", "", body.split(".section")[0])
    found = []
    for piece in re.split(r"(;|^\s*[$\w]+:)", body, flags=re.M):
        statement = re.sub(r"^[{}\s]+", "", piece.strip())
        statement = " ".join(statement.split())
        if statement and statement != ";":
            found.append(statement)
    return found


def _declare(statement: str, widths: dict[str, int]) -> None:
    _, kind, names = statement.split(None, 2)
    width = 1 if kind == ".pred" else bits_of(kind[1:])
    for name in (part.strip() for part in names.split(",")):
        many = re.fullmatch(rf"({_NAME})<(\d+)>", name)
        declared = [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [name]
        for each in declared:
            if widths.setdefault(each, width) != width:
                raise PTXError(f"register {each} is declared again with another width")


def _instruction(text: str) -> Instruction:
    guard, negated, rest = None, False, text
    guarded = re.match(rf"@(!?)({_NAME})\s+(.*)", text)
    if guarded:
        negated, guard, rest = guarded.group(1) == "!", guarded.group(2), guarded.group(3)
    opcode, _, operands = rest.partition(" ")
    parts = tuple(opcode.replace("::cta", "").split("."))
    # Commas within braces or brackets belong to one operand.
    split = re.split(r",(?![^{]*\})(?![^\[]*\])", operands) if operands.strip() else []
    return Instruction(text, parts, tuple(part.strip() for part in split), guard, negated)
