"""Dense models that are not what they seem are told before the work begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from halfweave.errors import CheckpointError
from halfweave.pruner.pipeline import plan_prune
from halfweave.pruner.source import Source, token_ids
from halfweave.runtime.model import load_model
from safetensors.torch import load_file, save_file
from support.command import QUICK, Command
from support.pruning import recipe
from support.tiny import edit_json, save_tiny


def test_a_head_that_is_said_to_be_the_embedding_and_is_another_is_refused(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    same = tensors["model.embed_tokens.weight"].clone()
    for head, fits in ((same, True), (same + 1, False)):
        save_file(
            {**tensors, "lm_head.weight": head}, model / "model.safetensors", {"format": "pt"}
        )
        for opened in (Source.open, load_model):
            if fits:
                opened(model)
                continue
            with pytest.raises(CheckpointError, match="two that differ") as caught:
                opened(model)
            assert "tie_word_embeddings" in (caught.value.hint or "")


def test_a_single_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    """transformers would read the one, and we the other."""
    model = save_tiny(tmp_path / "model")
    part = model / "model-00001-of-00001.safetensors"
    shutil.copyfile(model / "model.safetensors", part)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(part), part.name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is no part of this model"):
        Source.open(model)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file["model"].update(merges=[["zz", "qq"]]),
        lambda file: file.update(pre_tokenizer={"type": "new"}),
    ],
)
def test_a_damaged_tokenizer_is_an_error_about_the_file(
    damage: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model")
    edit_json(model / "tokenizer.json", damage)
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        token_ids(Source.open(model), "Hello")


def test_a_model_that_nothing_here_can_run_is_told_of_before_it_is_pruned(
    halfweave: Command, tiny_model: Path, tmp_path: Path
) -> None:
    assert plan_prune(tiny_model, recipe()).unserved is None
    model = save_tiny(tmp_path / "model")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    edit_json(model / "config.json", lambda config: config.update(rope_parameters=yarn))
    ran = halfweave("prune", model, tmp_path / "out", *QUICK, "--dry-run")
    assert ran.code == 0
    assert "note: only other tools will run it" in ran.out
    assert "'yarn' is not supported" in ran.out
