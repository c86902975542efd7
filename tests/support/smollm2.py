"""The real model that a package carries, and a cut of it that tests can afford to prune."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from halfweave.errors import UsageError
from halfweave.files import read_json, write_json
from halfweave.pruner.gguf_file import locate_smollm2
from halfweave.pruner.importers import import_gguf
from safetensors.torch import load_file, save_file

CUT_LAYERS = 2


def import_smollm2(directory: Path) -> Path:
    """SmolLM2-135M-Instruct as a dense directory; skips the test where the package is missing."""
    try:
        file = locate_smollm2()
    except UsageError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    return import_gguf(file, directory).path


def cut(model: Path, directory: Path, layers: int = CUT_LAYERS) -> Path:
    """A model of its first `layers` blocks, with its own embeddings, head and tokenizer."""
    directory.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors" and not file.name.startswith("model."):
            shutil.copy(file, directory)
    tensors = {
        name: t for file in model.glob("*.safetensors") for name, t in load_file(file).items()
    }
    kept = {name: t for name, t in tensors.items() if _block(name) < layers}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    config = read_json(directory / "config.json")
    write_json(directory / "config.json", {**config, "num_hidden_layers": layers})
    return directory


def _block(name: str) -> int:
    head, _, rest = name.partition("model.layers.")
    return int(rest.split(".")[0]) if rest and not head else -1
