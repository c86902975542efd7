"""From a text to calibration windows of tokens. Knows text and token ids, not models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UsageError

# The texts that come with halfweave; they share no passage.
BUILTIN = "builtin"
BUILTIN_EVAL = "builtin-eval"
_BUILTIN_FILES = {BUILTIN: "calibration.txt", BUILTIN_EVAL: "evaluation.txt"}
_ORIGINS = {BUILTIN: "the built-in text", BUILTIN_EVAL: "the built-in evaluation text"}


@dataclass(frozen=True)
class CalibrationText:
    """A text, the SHA-256 of its bytes, and where it is from (no path: it ends up in the card)."""

    text: str
    sha256: str
    origin: str


def load_text(source: str | Path) -> CalibrationText:
    """Read a built-in text ("builtin", "builtin-eval") or a UTF-8 file.

    Raises:
        UsageError: the file is missing, empty, binary, or not UTF-8.
    """
    builtin = _BUILTIN_FILES.get(str(source))
    path = Path(__file__).parent / "data" / builtin if builtin else Path(source)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"calibration text {path} cannot be read: {error.strerror}") from error
    if b"\0" in data:
        raise UsageError(f"calibration text {path} is binary; plain UTF-8 text is needed")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"calibration text {path} is not UTF-8 (byte {error.start})",
            f"iconv -f ENCODING -t UTF-8 {path.name} > text.txt",
        ) from error
    if not text.strip():
        raise UsageError(f"calibration text {path} is empty")
    origin = _ORIGINS.get(str(source), path.name)
    return CalibrationText(text, hashlib.sha256(data).hexdigest(), origin)


def sample_windows(
    token_ids: Sequence[int], count: int, length: int, seed: int, held_out: int = 0
) -> Tensor:
    """Draw `count` windows of `length` consecutive tokens, with a seed: int64 [n, L].

    They share no token where the text is long enough for that. The last `held_out` of them share
    none with the others in any case.

    Raises:
        UsageError: the text is too short for one window beside the held-out ones, or no token is
            asked for.
    """
    if count < 1 or length < 1:
        raise UsageError(f"{count} windows of {length} tokens: both must be at least 1")
    ids = torch.as_tensor(token_ids, dtype=torch.int64)
    places = len(ids) // length
    if places <= held_out:
        beside = f" beside {held_out} that judge" if held_out else ""
        raise UsageError(
            f"the calibration text has {len(ids)} tokens, one window{beside} needs "
            f"{(held_out + 1) * length}",
            f"give a longer text, --calib-length {len(ids) // (held_out + 1)} at most, "
            "or fewer --calib-windows",
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randperm(places, generator=generator) * length
    judging = starts[:held_out]
    fitting = starts[held_out:count]
    if count > places:
        free = torch.ones(len(ids) - length + 1, dtype=torch.bool)
        for start in judging.tolist():
            free[max(0, start - length + 1) : start + length] = False
        possible = free.nonzero()[:, 0]
        drawn = torch.randint(len(possible), (count - held_out,), generator=generator)
        fitting = possible[drawn]
    chosen = torch.cat([fitting, judging])
    return torch.stack([ids[start : start + length] for start in chosen.tolist()])
