"""The model card: what was done to the model, and only figures that were measured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .budget.check import BudgetCheck
from .coverage import coverage
from .journal import LinearRecord, ShardRecord
from .source import Source, Trained

BUDGET_HEADING = "\n## Budget\n\n"
MEASURED_HEADING = "\n## Measured\n\n"
_NOT_MEASURED = "not measured"


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
    if isinstance(source, Trained):
        errors = []  # those are from the trained weights, not from the model that the card names
    title = (
        "mixed formats" if recipe["choices"] else f"{recipe['pattern']} at {recipe['bits']} bits"
    )
    text = provenance["calibration"]
    spread = f"{median(errors):.4f} (worst {max(errors):.4f})" if errors else _NOT_MEASURED
    seen = coverage(linears.values())
    experts = f"| calibration of the experts | {seen} |\n" if seen else ""
    return f"""---
base_model: {source.path.name}
library_name: halfweave
tags: [halfweave, pruned, "{title}"]
---
# {source.path.name}, {title}

Made by halfweave {provenance["halfweave"]} from `{source.path.name}`; its licence carries over.

| | |
|---|---|
| method | {recipe["method"]}, {_training(recipe)} |
| linears by format | {_formats(linears, recipe)} |
| weight files | {before} -> {after} bytes ({after / before:.3f}) |
| relative layer error on the calibration tokens, median | {spread} |
| calibration tokens | {text["windows"]} x {text["length"]}, seed {text["seed"]} |
{experts}| calibration text | {text["origin"]} |
| calibration text, SHA-256 | {text["text_sha256"]} |
| perplexity | {_NOT_MEASURED} |
| speed | {_NOT_MEASURED} |

Measure it against its parent: `halfweave eval DIR --against PARENT --text FILE`.
"""


def budget_section(found: BudgetCheck) -> str:
    """What the card says of a quality budget."""
    outcome = "met" if found.met else "NOT met"
    return (
        f"{BUDGET_HEADING}"
        f"{found.ratio:.3f} x the dense perplexity (standard error {found.error:.3f} of its "
        "logarithm) on windows of the calibration text that nothing was fitted to, with "
        f"{found.share_of_bytes:.3f} of the bytes. The budget is {outcome}.\n"
    )


def without_budget(card: str) -> str:
    """The card without what `budget_section` said."""
    return _without(card, BUDGET_HEADING)


def with_measured(card: str, perplexity: str, speed: str, section: str) -> str:
    """The card with measured figures in its table and a section of them, in place of older ones.

    `section` is Markdown without a heading. A card that is not ours comes back as it is.
    """
    rows = {"perplexity": perplexity, "speed": speed}
    for name, value in rows.items():
        row = re.compile(rf"^\| {name} \| .* \|$", re.MULTILINE)
        if not row.search(card):
            return card
        literal = value.replace("\\", r"\\")
        card = row.sub(f"| {name} | {literal} |", card, count=1)
    kept = _without(card, MEASURED_HEADING).rstrip("\n") + "\n"
    return kept + (f"{MEASURED_HEADING}{section.strip()}\n" if section else "")


def without_measured(card: str) -> str:
    """The card of weights that nobody has measured yet."""
    return with_measured(card, _NOT_MEASURED, _NOT_MEASURED, "")


def _without(card: str, heading: str) -> str:
    """The card without one section."""
    head, _, rest = card.partition(heading)
    _, next_one, others = rest.partition("\n## ")
    return head + next_one + others


def _training(recipe: Mapping[str, Any]) -> str:
    if recipe["recover"].startswith("blocks"):
        return f"each block tuned for {recipe['block_epochs']} epochs of the calibration tokens"
    return "one shot"


def _formats(linears: Mapping[str, LinearRecord], recipe: Mapping[str, Any]) -> str:
    counts = Counter(record.format for record in linears.values())
    shown = [f"{count} x {kind}" for kind, count in sorted(counts.items())]
    groups = any(record.group for record in linears.values())
    return ", ".join(shown) + (f", groups of {recipe['group']}" if groups else "")
