"""The GPU decoder runs interpreted, and says what it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from halfweave.errors import UnsupportedModel
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.families import decoder_spec
from halfweave.runtime.gpu_decoder import GpuDecoder
from halfweave.runtime.loading import Loader
from support.interpreted import run_interpreted
from support.tiny import FAMILIES, save_tiny


def test_the_interpreted_decoder_gives_what_the_cpu_gives() -> None:
    run_interpreted(Path(__file__).with_name("gpu_cases.py"), least=14)


@pytest.mark.parametrize(
    ("family", "lacking"),
    [
        ("bloom", "positions that are not rotary"),
        ("gemma2", "norms behind attention and MLP, scaled embeddings.*capped scores"),
        ("gemma3", "a sliding window.*a scale of attention of its own"),
        ("gpt2", "positions that are not rotary"),
        ("gpt_neox", "heads that are turned in part.*residuals other than Llama's"),
        ("mixtral", "experts"),
        ("opt 350m", "an embedding of another size"),
        ("phi3", "heads that are turned in part.*a sliding window"),
        ("qwen3", "norms of heads"),
        ("qwen3_moe", "experts"),
    ],
)
def test_a_model_with_other_parts_is_refused_by_their_names(
    family: str, lacking: str, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "tiny", FAMILIES[family])
    checkpoint = Checkpoint.open(model)
    spec = decoder_spec(checkpoint.config)
    with pytest.raises(UnsupportedModel, match=lacking):
        GpuDecoder(Loader(checkpoint, spec, torch.float16, torch.device("cpu")))
