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


def sample_windows(token_ids: Sequence[int], count: int, length: int, seed: int) -> Tensor:
    """Draw `count` windows of `length` consecutive tokens, uniformly, with a seed: int64 [n, L].

    Raises:
        UsageError: the text has fewer than `length` tokens, or no token is asked for.
    """
    if count < 1 or length < 1:
        raise UsageError(f"{count} windows of {length} tokens: both must be at least 1")
    ids = torch.as_tensor(token_ids, dtype=torch.int64)
    if len(ids) < length:
        raise UsageError(
            f"the calibration text has {len(ids)} tokens, one window needs {length}",
            f"give a longer text, or --calib-length {len(ids)} at most",
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length + 1, (count,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])
