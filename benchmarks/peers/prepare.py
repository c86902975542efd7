"""Environments of the peers, one each, and SmolLM2-135M in the format of every engine.

What fails to install or to convert is left out with its reason; what is there is not made again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PYTHON = Path(sys.executable)
# What pip is asked for, step by step. torch comes first, where it is needed, in its CPU build.
ENVIRONMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "llama_cpp": (("install", "--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36"),),
    "openvino": (
        ("install", "torch==2.13.0"),
        (
            "install",
            "openvino==2026.4.1",
            "openvino-genai==2026.4.1.0",
            "optimum-intel[nncf]==2.2.0",
        ),
        ("uninstall", "-y", "torchvision"),  # one for CUDA, which a CPU torch cannot import
    ),
    "onnxruntime": (
        ("install", "torch==2.13.0"),
        ("install", "onnxruntime-genai==0.18.0", "onnx", "onnx_ir", "transformers>=5,<6"),
    ),
}
BUILD_FLAGS = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}  # llama.cpp for this very processor


@dataclass(frozen=True)
class Contender:
    """One engine with one model: what to run, and what the table calls it."""

    engine: str
    format: str
    python: Path
    script: Path
    model: Path


@dataclass(frozen=True)
class Missing:
    """A contender that is not there."""

    engine: str
    format: str
    reason: str


@dataclass(frozen=True)
class _Plan:
    """How a contender comes to be: its environment ("" is our own), and what makes its model."""

    engine: str
    format: str
    environment: str
    script: str
    model: str
    command: tuple[str, ...]  # with {model}, {dense}, {gguf}, {bin} and {here} filled in


_PRUNE = (
    "{bin}/halfweave",
    "prune",
    "{dense}",
    "{model}",
    "--method",
    "magnitude",
    "--group",
    "64",
)
_ONE_WINDOW = ("--calib-windows", "1", "--calib-length", "512")
_JOINT = (*_PRUNE, "--pattern", "2:4", "--bits", "4", *_ONE_WINDOW)
PLANS = (
    _Plan("halfweave", "2:4+int4 g64", "", "halfweave_engine.py", "hw_24_int4", _JOINT),
    _Plan(
        "halfweave", "2:4+int4 g64, head of 4 bits", "", "halfweave_small_head.py", "hw_24_int4",
        _JOINT,
    ),
    _Plan("halfweave", "2:4+int4 g64, AVX2 only", "", "halfweave_avx2.py", "hw_24_int4", _JOINT),
    _Plan(
        "halfweave", "int4 g64", "", "halfweave_engine.py", "hw_int4",
        (*_PRUNE, "--pattern", "dense", "--bits", "4", *_ONE_WINDOW),
    ),
    _Plan(
        "halfweave", "2:4 bf16", "", "halfweave_engine.py", "hw_24",
        (*_PRUNE, "--pattern", "2:4", *_ONE_WINDOW),
    ),
    _Plan("halfweave", "dense bf16", "", "halfweave_engine.py", "{dense}", ()),
    _Plan(
        "llama.cpp", "Q4_0", "llama_cpp", "llama_cpp_engine.py", "q4_0.gguf",
        ("{bin}/python", "{here}/requantize.py", "{gguf}", "{model}", "Q4_0"),
    ),
    _Plan(
        "llama.cpp", "Q8_0", "llama_cpp", "llama_cpp_engine.py", "q8_0.gguf",
        ("{bin}/python", "{here}/requantize.py", "{gguf}", "{model}", "Q8_0"),
    ),
    _Plan(
        "OpenVINO GenAI", "int4 g64", "openvino", "openvino_engine.py", "openvino_int4",
        ("{bin}/optimum-cli", "export", "openvino", "--model", "{dense}", "--task",
         "text-generation-with-past", "--weight-format", "int4", "--group-size", "64",
         "--ratio", "1.0", "--sym", "{model}"),
    ),
    _Plan(
        "onnxruntime-genai", "int4 b64", "onnxruntime", "onnxruntime_engine.py", "onnx_int4",
        ("{bin}/python", "-m", "onnxruntime_genai.models.builder", "-m", "{dense}", "-i", "{dense}",
         "-o", "{model}", "-p", "int4", "-e", "cpu", "-c", "{model}.cache", "--extra_options",
         "int4_block_size=64", "int4_accuracy_level=4"),
    ),
)  # fmt: skip


def prepare(work: Path, dense: Path, gguf: Path) -> tuple[list[Contender], list[Missing]]:
    """Everything that can be measured under `work`, and everything that cannot."""
    contenders, missing = [], []
    failed: dict[str, str] = {}  # environments, which are not tried again
    for plan in PLANS:
        try:
            if plan.environment in failed:
                raise OSError(failed[plan.environment])
            python = _environment(work, plan.environment)
        except (OSError, subprocess.CalledProcessError) as error:
            failed[plan.environment] = _reason(error)
            missing.append(Missing(plan.engine, plan.format, _reason(error)))
            continue
        try:
            contenders.append(_contender(plan, python, work, dense, gguf))
        except (OSError, subprocess.CalledProcessError) as error:
            missing.append(Missing(plan.engine, plan.format, _reason(error)))
    return contenders, missing


def _reason(error: Exception) -> str:
    """The last line that a command said, or the error itself."""
    said = (getattr(error, "stderr", None) or "").strip().splitlines()
    return said[-1] if said else str(error)


def _contender(plan: _Plan, python: Path, work: Path, dense: Path, gguf: Path) -> Contender:
    places = {
        "dense": str(dense),
        "gguf": str(gguf),
        "bin": str(python.parent),
        "here": str(HERE),
    }
    model = work / plan.model.format(**places)
    if plan.command and not (done := model.with_suffix(".ready")).exists():
        _run([part.format(model=model, **places) for part in plan.command])
        done.touch()
    return Contender(plan.engine, plan.format, python, HERE / plan.script, model)


def _environment(work: Path, name: str) -> Path:
    if not name:
        return PYTHON
    python = work / f"env-{name}" / "bin" / "python"
    done = work / f"env-{name}.ready"
    if not done.exists():
        _run([str(PYTHON), "-m", "venv", "--clear", str(python.parent.parent)])
        for step in ENVIRONMENTS[name]:
            _run([str(python), "-m", "pip", "-q", *step])
        done.touch()
    return python


def _run(command: list[str]) -> None:
    print("$", " ".join(command), file=sys.stderr, flush=True)
    subprocess.run(
        command,
        check=True,
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **BUILD_FLAGS, "HF_HUB_OFFLINE": "1"},
    )
