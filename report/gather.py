"""What there is to report of a model directory: its documents, its manifest, one layer's mask."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..bench.document import about_model
from ..errors import HalfweaveError
from ..files import find_directory
from ..kernels.formats import Sparse24, Sparse24Int4
from ..runtime.checkpoint import Checkpoint
from ..runtime.linear_kinds import kinds_of
from .documents import (
    COMMANDS,
    KINDS,
    Document,
    EvalDocument,
    KernelDocument,
    OfflineDocument,
    ServeDocument,
    document_path,
    read_document,
)
from .theme import printable

CORNER = 64  # rows and columns of the mask that is shown
_LAYER = re.compile(r"\.(\d+)\.")
_D = TypeVar("_D", bound=Document)


@dataclass(frozen=True)
class Corner:
    """The first rows and columns of one 2:4 linear, unpacked; zeros are what was removed."""

    linear: str
    format: str
    shape: tuple[int, int]
    weights: Tensor  # fp32 [CORNER or N, CORNER or K]
    kept: Tensor  # bool, of the same shape


@dataclass(frozen=True)
class Found:
    """One directory, read.

    `missing` has, for each kind of document that cannot be shown, why; `errors` the relative error
    of each linear by layer and kind of linear, the worst of a layer's experts, None where there is
    none.
    """

    path: Path
    name: str
    weight_bytes: int
    formats: tuple[str, ...]
    documents: Mapping[str, Document]
    missing: Mapping[str, str]
    errors: Mapping[tuple[int, str], float | None]
    recipe: Mapping[str, object]
    parent: str | None
    corner: Corner | None

    def document(self, kind: type[_D]) -> _D | None:
        """The document of that type, if there is a usable one."""
        return next((each for each in self.documents.values() if isinstance(each, kind)), None)

    @property
    def eval(self) -> EvalDocument | None:
        """Quality."""
        return self.document(EvalDocument)

    @property
    def kernel(self) -> KernelDocument | None:
        """Products."""
        return self.document(KernelDocument)

    @property
    def offline(self) -> OfflineDocument | None:
        """Speed of whole models."""
        return self.document(OfflineDocument)

    @property
    def serve(self) -> ServeDocument | None:
        """A server under load."""
        return self.document(ServeDocument)


def gather(path: str | Path) -> Found:
    """Read a model directory and what was measured of it. Hashes of its weights are not checked.

    Raises as `Checkpoint.open`.
    """
    directory = find_directory(path)
    checkpoint = Checkpoint.open(directory, verify=False)
    manifest = checkpoint.manifest or {}
    documents, missing = read_documents(directory)
    return Found(
        path=directory,
        name=directory.resolve().name,
        weight_bytes=checkpoint.weight_bytes,
        formats=_formats(checkpoint),
        documents=documents,
        missing=missing,
        errors=_errors(manifest.get("linears", {})),
        recipe=manifest.get("recipe", {}),
        parent=manifest.get("provenance", {}).get("base", {}).get("name"),
        corner=_corner(checkpoint),
    )


def gather_all(paths: Sequence[str | Path]) -> list[Found]:
    """Several directories, each once."""
    unique = {find_directory(path).resolve(): path for path in paths}
    return [gather(path) for path in unique.values()]


def read_documents(directory: Path) -> tuple[dict[str, Document], dict[str, str]]:
    """The documents of this very model, by kind; and why there is none, for the other kinds."""
    documents: dict[str, Document] = {}
    missing: dict[str, str] = {}
    digest = about_model(directory)["digest"]
    for kind in KINDS:
        path = document_path(directory, kind)
        if not path.exists():
            missing[kind] = "not measured"
            continue
        try:
            found = read_document(path)
        except HalfweaveError as error:
            missing[kind] = f"not shown: {error.message}"
            continue
        if found.kind != kind:
            missing[kind] = f"not shown: {path} holds a document of kind {found.kind}"
        elif found.model.digest not in (None, digest):
            missing[kind] = "not shown: it was measured of another model that was here before"
        else:
            documents[kind] = found
    return documents, missing


def command(kind: str, found: Found) -> str:
    """What to type to measure a kind; the parent's name is a stranger's word."""
    dense = shlex.quote(printable(str(found.parent))) if found.parent else "DENSE"
    return COMMANDS[kind].format(model=shlex.quote(str(found.path)), dense=dense)


def _formats(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Formats of the packed linears, the most frequent first; "dense" if there are none."""
    kinds = [entry.format for entry in checkpoint.linears.values()]
    return tuple(sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind))) or ("dense",)


def _errors(linears: Mapping[str, Mapping[str, object]]) -> dict[tuple[int, str], float | None]:
    found: dict[tuple[int, str], float | None] = {}
    for name, kind in kinds_of(linears).items():
        place, error = _LAYER.search(name), linears[name].get("relative_error")
        if place is not None:
            known = [found.get((int(place[1]), kind)), error]
            numbers = [float(each) for each in known if isinstance(each, (int, float))]
            found[int(place[1]), kind] = max(numbers, default=None)
    return found


def _corner(checkpoint: Checkpoint) -> Corner | None:
    """Of the linear in the middle of those that are 2:4; None if no linear is."""
    names = [name for name, entry in checkpoint.linears.items() if "sparse24" in entry.format]
    if not names:
        return None
    name = names[len(names) // 2]
    linear = checkpoint.linear(name)
    if not isinstance(linear, (Sparse24, Sparse24Int4)):
        return None
    first = linear.rows(torch.arange(min(CORNER, linear.shape[0])))
    kept = Sparse24(torch.ones(first.shape[0], first.shape[1] // 2), first.meta).unpack() != 0
    weights = first.unpack()
    corner = (slice(None), slice(0, CORNER))
    return Corner(name, linear.kind, linear.shape, weights[corner], kept[corner])
