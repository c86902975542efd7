"""The model card: what was done to the model, and only figures that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .journal import LinearRecord, ShardRecord
from .source import Source


def model_card(
    source: Source,
    linears: Mapping[str, LinearRecord],
    shards: Sequence[ShardRecord],
    recipe: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> str:
    """README.md of the output directory, in Markdown."""
    before = sum(file.stat().st_size for file in source.tensors.files)
    after = sum(shard.bytes for shard in shards)
    errors = [r.relative_error for r in linears.values() if r.relative_error is not None]
    dense = [name for name, record in linears.items() if record.format == "dense"]
    text = provenance["calibration"]
    spread = f"{median(errors):.4f} (worst {max(errors):.4f})" if errors else "not measured"
    return f"""---
base_model: {source.path.name}
library_name: halfweave
tags: [halfweave, pruned, "{recipe["pattern"]}"]
---
# {source.path.name}, {recipe["pattern"]} at {recipe["bits"]} bits

Made by halfweave {provenance["halfweave"]} from `{source.path.name}`; its licence carries over.

| | |
|---|---|
| method | {recipe["method"]}, one shot, no training |
| pattern, bits | {recipe["pattern"]}, {_bits(recipe)} |
| weight files | {before} -> {after} bytes ({after / before:.3f}) |
| relative layer error on the calibration tokens, median | {spread} |
| linears kept dense | {len(dense)} of {len(linears)} |
| calibration tokens | {text["windows"]} x {text["length"]}, seed {text["seed"]} |
| calibration text | {text["origin"]} |
| calibration text, SHA-256 | {text["text_sha256"]} |
| perplexity | not measured |
| speed | not measured |

Measure it against its parent: `halfweave eval DIR --against PARENT --text FILE`.
"""


def _bits(recipe: Mapping[str, Any]) -> str:
    return "16 bits" if recipe["bits"] == 16 else f"4 bits in groups of {recipe['group']}"
