"""The `quantization_config` block that says how each linear of a checkpoint is stored.

Strict on purpose: an unknown key, format or group size is an error, and no string in it is ever
used as a path, a class or an import. Layer names are plain keys here; models give them meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, RefusedError
from .formats import FORMATS, GROUP_SIZES, needs_group

QUANT_METHOD = "halfweave"
MANIFEST_FILE = "halfweave.json"  # written last: a directory without it is incomplete
JOURNAL_FILE = ".halfweave-journal.jsonl"  # there only while a directory is being made
MEASURED_DIRECTORY = "measured"  # what a benchmark saves beside the weights; no part of them
REPORT_FILE, REPORT_DIRECTORY = "report.html", "report"  # the page that shows it, its pictures
FORMAT_VERSION = 1
_MAX_SIDE = 2**31


@dataclass(frozen=True)
class LinearFormat:
    """How one linear is stored: a format's name, the logical shape (N, K), the group of K."""

    format: str
    shape: tuple[int, int]
    group: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry as written to config.json."""
        entry: dict[str, Any] = {"format": self.format, "shape": list(self.shape)}
        return entry if self.group is None else {**entry, "group": self.group}


@dataclass(frozen=True)
class QuantizationConfig:
    """All linears of a checkpoint that are not stored as a plain `.weight`."""

    linears: Mapping[str, LinearFormat]
    version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """The block as written to config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "version": self.version,
            "linears": {name: entry.to_json() for name, entry in self.linears.items()},
        }


def parse_quantization_config(block: Any) -> QuantizationConfig:
    """Read the block strictly.

    Raises:
        RefusedError: another tool's method, or a newer version of this format.
        CheckpointError: anything else that is not exactly as specified.
    """
    if not isinstance(block, dict):
        raise CheckpointError("quantization_config is not an object")
    method = block.get("quant_method")
    if method != QUANT_METHOD:
        raise RefusedError(
            f"quantization_config: quant_method {_short(method)} is another tool's format",
            "start from the unquantized checkpoint",
        )
    version = block.get("version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"quantization_config: version {_short(version)} is no number")
    if version > FORMAT_VERSION:
        raise RefusedError(
            f"quantization_config: format version {version} is newer than {FORMAT_VERSION}",
            "install a newer halfweave",
        )
    _check_keys("quantization_config", block, {"quant_method", "version", "linears"}, set())
    linears = block["linears"]
    if not isinstance(linears, dict):
        raise CheckpointError("quantization_config: linears is not an object")
    return QuantizationConfig({name: _parse_linear(name, e) for name, e in linears.items()})


def _parse_linear(name: str, entry: Any) -> LinearFormat:
    where = f"quantization_config: linear {_short(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is not an object")
    _check_keys(where, entry, {"format", "shape"}, {"group"})
    kind = entry["format"]
    if not isinstance(kind, str) or kind not in FORMATS:
        raise RefusedError(f"{where}: unknown format {_short(kind)}; known: {', '.join(FORMATS)}")
    shape = entry["shape"]
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(side) is int and 0 < side < _MAX_SIDE for side in shape)
    ):
        raise CheckpointError(f"{where}: shape {_short(shape)} is not [N, K]")
    group = entry.get("group")
    legal = (type(group) is int and group in GROUP_SIZES) if needs_group(kind) else group is None
    if not legal:
        raise CheckpointError(f"{where}: group {_short(group)} does not go with format {kind}")
    return LinearFormat(kind, (shape[0], shape[1]), group)


def _check_keys(where: str, block: Mapping[str, Any], must: set[str], may: set[str]) -> None:
    missing, unknown = must - block.keys(), block.keys() - must - may
    if missing or unknown:
        raise CheckpointError(
            f"{where}: missing keys {sorted(missing)}, unknown keys {_short(sorted(unknown))}"
        )


def _short(value: Any) -> str:
    """A hostile value, quoted and cut to a length fit for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
