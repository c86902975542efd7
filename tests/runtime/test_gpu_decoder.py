"""The GPU decoder runs interpreted, in a process of its own, and says what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from halfweave.errors import UnsupportedModel
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.families import decoder_spec
from halfweave.runtime.gpu_decoder import GpuDecoder
from support.tiny import FAMILIES, save_tiny

CASES = Path(__file__).with_name("gpu_cases.py")


def test_the_interpreted_decoder_gives_what_the_cpu_gives() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert ran.stdout.count(".") >= 8  # it did find the cases


@pytest.mark.parametrize(
    ("family", "lacking"),
    [("bloom", "positions that are not rotary"), ("qwen3", "norms of heads")],
)
def test_a_model_with_other_parts_is_refused_by_their_names(
    family: str, lacking: str, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "tiny", FAMILIES[family])
    checkpoint = Checkpoint.open(model)
    spec = decoder_spec(checkpoint.config)
    with pytest.raises(UnsupportedModel, match=lacking):
        GpuDecoder(checkpoint, spec, torch.float16, torch.device("cpu"))
