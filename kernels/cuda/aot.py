"""Compiles kernels for a GPU that is not there, and reads what the compiler made of them.

Triton's wheel brings ptxas, nvdisasm and cuobjdump, so neither a driver nor a toolkit is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from ...errors import HalfweaveError

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass(frozen=True)
class Signature:
    """How a kernel is called.

    Attributes:
        types: of the arguments by name, such as *fp16 or i32, without constants.
        constants: values of the arguments that are known when it is compiled.
        aligned: arguments that are multiples of 16; without that promise copies of 16 bytes become
            four of 4.
    """

    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: Sequence[str]


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture: `shared_bytes` is the shared memory of a program."""

    name: str
    arch: int
    warps: int
    ptx: str
    cubin: bytes
    shared_bytes: int

    @cached_property
    def sass(self) -> str:
        """What the GPU executes, disassembled."""
        return _tool("nvdisasm", self.cubin, "-c")

    @cached_property
    def registers(self) -> int:
        """Registers of a thread."""
        return self._usage("REG")

    @cached_property
    def stack_bytes(self) -> int:
        """Memory that a thread spills registers to."""
        return self._usage("STACK") + self._usage("LOCAL")

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each instruction stands in the program."""
        return _counted(self.sass.splitlines())

    @cached_property
    def loop(self) -> Counter[str]:
        """The same of its longest loop."""
        return _counted(_longest_loop(self.sass.splitlines()))

    def _usage(self, what: str) -> int:
        found = re.search(rf"{what}:(\d+)", _tool("cuobjdump", self.cubin, "-res-usage"))
        if found is None:
            raise HalfweaveError(f"cuobjdump does not tell {what} of {self.name}")
        return int(found.group(1))


def compile_kernel(
    kernel: Any,
    signature: Signature,
    arch: int,
    warps: int,
    registers: int | None = None,
    stages: int | None = None,
) -> Compiled:
    """Compile a Triton or Gluon kernel for sm_`arch`, with at most `registers` a thread.

    Loads of a loop are `stages` - 1 steps ahead: Triton's own number where none is given.

    Raises:
        HalfweaveError: the compiler refuses it; the last line of its complaint is told.
    """
    types = {**signature.types, **dict.fromkeys(signature.constants, "constexpr")}
    positions = [(kernel.arg_names.index(name),) for name in signature.aligned]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs=dict(signature.constants),
        attrs={position: [["tt.divisibility", 16]] for position in positions},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if registers is not None:
        options["maxnreg"] = registers
    if stages is not None:
        options["num_stages"] = stages
    try:
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # its own kinds, ptxas's and the parser's
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise HalfweaveError(
            f"{kernel.__name__} does not compile for sm_{arch}: {lines[-1]}"
        ) from error
    shared = int(made.metadata.shared)
    return Compiled(kernel.__name__, arch, warps, made.asm["ptx"], made.asm["cubin"], shared)


def _tool(name: str, cubin: bytes, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ran = subprocess.run([_TOOLS / name, *flags, file.name], capture_output=True, text=True)
    if ran.returncode:
        raise HalfweaveError(f"{name} failed: {ran.stderr.strip()[:200]}")
    return ran.stdout + ran.stderr


def _counted(lines: Sequence[str]) -> Counter[str]:
    found = (_INSTRUCTION.match(line) for line in lines)
    return Counter(match.group(1) for match in found if match)


def _longest_loop(lines: Sequence[str]) -> Sequence[str]:
    """What lies between a label and the branch back to it that is furthest behind."""
    labels: dict[str, int] = {}
    longest = (0, 0)
    for at, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = at
        branch = re.search(r"BRA\S*\s+.*?(\.L_x_\d+)", line)
        if branch and branch.group(1) in labels:
            start = labels[branch.group(1)]
            longest = max(longest, (start, at), key=lambda span: span[1] - span[0])
    return lines[longest[0] : longest[1] + 1]
