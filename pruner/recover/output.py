"""The recovered checkpoint on the disk: the student's directory with other numbers in it.

Shard names, formats, slots and side files stay; the manifest comes last. Knows files and tensors,
not training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files import sha256_file, write_bytes, write_json, write_text
from ...kernels.formats import PackedLinear
from ...kernels.schema import MANIFEST_FILE
from ...kernels.shards import INDEX_FILE, SINGLE_FILE, ShardedTensors
from ..card import without_budget, without_measured
from ..tensors import save_tensors
from .settings import DistillResult

_CARD = "README.md"
# What the pruner measured of a linear.
_ERRORS = ("relative_error", "held_out_error", "baseline_error")


def stored_tensors(
    linears: Mapping[str, PackedLinear], gains: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What replaces the student's tensors, by full name."""
    found = dict(gains)
    for name, linear in linears.items():
        found.update({f"{name}.{suffix}": t for suffix, t in linear.tensors().items()})
    return found


def write_checkpoint(
    student: Path,
    out: Path,
    manifest: Mapping[str, Any],
    changed: Mapping[str, Tensor],
    recovery: Mapping[str, Any],
) -> None:
    """Write `student` into `out` with the tensors `changed`; whole when the manifest is there.

    `manifest` is the student's; the new one says what was done under provenance, "recovery". What
    was measured of weights that are no longer the same is dropped from it and from the card.

    Raises:
        CapacityError: the disk is full.
        CheckpointError: a file of the student is damaged.
    """
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    shards = ShardedTensors.open(student)
    for file in shards.files:
        tensors = shards.read_file(file, manifest["files"][file.name]["sha256"])
        replaced = {name: changed.get(name, tensor) for name, tensor in tensors.items()}
        save_tensors(out / file.name, replaced, {"format": "pt"})
    written = {file.name for file in shards.files}
    others = [name for name in manifest["files"] if name not in written]
    # The index and the config make a directory a model, so they come after all the rest.
    for name in sorted(others, key=lambda name: (name == "config.json", name == INDEX_FILE, name)):
        write_bytes(out / name, (student / name).read_bytes())
    if (student / _CARD).is_file():
        card = (student / _CARD).read_text()
        told = _section(DistillResult.of_record(out, recovery))
        kept = without_measured(without_budget(card)) if changed else card
        write_text(out / _CARD, kept + told)
    _drop_other_shards(out, written)
    write_json(out / MANIFEST_FILE, _manifest(out, manifest, changed, recovery))


def _manifest(
    out: Path,
    manifest: Mapping[str, Any],
    changed: Mapping[str, Tensor],
    recovery: Mapping[str, Any],
) -> dict[str, Any]:
    # The errors of a rounding are from the trained floats, whether or not the codes were trained.
    rounded = "before_rounding" in recovery
    stale = set(manifest["linears"] if rounded else (n.rpartition(".")[0] for n in changed))
    earlier = dict(manifest["provenance"])
    if changed:
        earlier.pop("budget", None)
    recipe = manifest["recipe"]
    again = "recovery" in earlier  # trained before, and that was what its recipe asked for
    if again:
        recovery = {**recovery, "student": earlier["recovery"]}
    elif recipe.get("recover", "").endswith("distill"):  # minutes became tokens, which do it again
        recipe = {**recipe, "recover_tokens": DistillResult.of_record(out, recovery).tokens}
    return {
        **manifest,
        "recipe": recipe,
        "provenance": {**earlier, "recovery": dict(recovery)},
        "linears": {
            name: {**entry, **dict.fromkeys(_ERRORS)} if name in stale else entry
            for name, entry in manifest["linears"].items()
        },
        "files": {
            name: {"sha256": sha256_file(out / name), "bytes": (out / name).stat().st_size}
            for name in manifest["files"]
        },
    }


def _drop_other_shards(out: Path, written: set[str]) -> None:
    """A shard that no index lists would make a reader refuse the directory."""
    for path in (*out.glob("model-*.safetensors"), out / SINGLE_FILE):
        if path.name not in written:
            path.unlink(missing_ok=True)


def _section(result: DistillResult) -> str:
    """What the model card says of the training."""
    return (
        "\n## Recovery\n\n"
        f"Trained on {result.tokens} tokens towards the outputs of its dense parent; KL from "
        f"it on held-out text: {result.before:.4f} -> {result.after:.4f} nats per token. "
        f"{_outcome(result)}\n"
    )


def _outcome(result: DistillResult) -> str:
    if not result.roundings and result.rolled_back:
        return "It did not help, and the weights are those from before it."
    if not result.roundings:
        return "Masks and formats are as they were; relative layer errors above are from before."
    costs = ", ".join(f"from {each.before:.4f} to {each.after:.4f}" for each in result.roundings)
    said = (
        "The weights were trained as floats; then blocks were rounded to codes, part by part, and "
        f"the rest trained on behind each part. The roundings took the KL {costs} and may have "
        "moved 2:4 masks; the training keeps them."
    )
    if not result.undone:
        return said
    return f"{said} Of {result.trainings} trainings {result.undone} did not help: undone."
