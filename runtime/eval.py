"""Perplexity, and distance from the dense parent, by one fixed protocol.

The text is tokenized once, without special tokens, and cut into windows that do not overlap; the
last partial one is dropped. Each window predicts all of its tokens but the first. Knows models and
texts, not files or printing.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import HalfweaveError, RefusedError, UsageError
from .model import Model

# Positions whose logits are held at a time: bounds the float [rows, vocab] buffers.
_ROWS = 128

# Told after each window: windows done, windows in all, and the figure so far.
EvalProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class EvalResult:
    """What one text says of one model.

    Attributes:
        text_sha256: of the text's UTF-8 bytes.
        tokens: predicted tokens, exactly windows * (window - 1).
        windows: windows measured.
        window: tokens in a window.
        ppl: exp of the mean negative log-likelihood.
        kl: mean KL(dense || model) in nats per token; None without a dense model.
        agreement: share of positions at which both find the same token most likely.
        against_ppl: perplexity of the dense model, on the same tokens.
        seconds: wall time.
    """

    text_sha256: str
    tokens: int
    windows: int
    window: int
    ppl: float
    kl: float | None
    agreement: float | None
    against_ppl: float | None
    seconds: float


def read_text(path: str | Path) -> str:
    """A UTF-8 text file.

    Raises:
        UsageError: it is missing, no file, binary, or not UTF-8.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"text {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"text {path} is not UTF-8 (byte {error.start})") from error
    if "\0" in text:
        raise UsageError(f"text {path} is binary; plain UTF-8 text is needed")
    return text


def evaluate(
    model: Model,
    text: str,
    *,
    window: int = 1024,
    max_windows: int | None = None,
    against: Model | None = None,
    progress: EvalProgress | None = None,
) -> EvalResult:
    """Measure `model` on `text`, and its distance from `against` in the same pass.

    With `max_windows`, every k-th window is taken, k the smallest that keeps to that number.

    Raises:
        UsageError: the text has no full window, or the window does not fit the model.
        RefusedError: the two models do not share a vocabulary.
        HalfweaveError: a model's scores are not finite.
    """
    started = time.perf_counter()
    ids = _token_ids(model, against, text)
    chosen = _windows(ids, _checked_window(model, against, window), max_windows)
    sums = _Sums(against is not None)
    for index, tokens in enumerate(chosen):
        _measure(model, against, tokens, sums)
        _require_finite(sums, index, model, against)
        if progress is not None:
            progress(index + 1, len(chosen), f"ppl {_ppl(sums.nll, sums.tokens):.2f}")
    return EvalResult(
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        tokens=sums.tokens,
        windows=len(chosen),
        window=window,
        ppl=_ppl(sums.nll, sums.tokens),
        kl=sums.kl / sums.tokens if sums.compared else None,
        agreement=sums.agreed / sums.tokens if sums.compared else None,
        against_ppl=_ppl(sums.against_nll, sums.tokens) if sums.compared else None,
        seconds=time.perf_counter() - started,
    )


def _require_finite(sums: _Sums, window: int, model: Model, against: Model | None) -> None:
    if not math.isfinite(sums.nll):
        raise HalfweaveError(f"{model.name}: scores of window {window} are not finite")
    if against is None:
        return
    if not math.isfinite(sums.against_nll):
        raise HalfweaveError(f"{against.name}: scores of window {window} are not finite")
    if not math.isfinite(sums.kl):
        raise HalfweaveError(f"{model.name}: its KL of window {window} is not finite")


def count_windows(model: Model, text: str, window: int, max_windows: int | None = None) -> int:
    """How many windows `evaluate` would measure; raises as it does."""
    ids = _token_ids(model, None, text)
    return len(_windows(ids, _checked_window(model, None, window), max_windows))


@dataclass
class _Sums:
    """Running totals over tokens."""

    compared: bool
    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    against_nll: float = 0.0


def _token_ids(model: Model, against: Model | None, text: str) -> Tensor:
    ids = model.tokenizer.encode(text, special=False)
    if against is not None:
        same_text = against.tokenizer.encode(text, special=False) == ids
        if not same_text or against.spec.vocab != model.spec.vocab:
            raise RefusedError(
                f"{model.name} and {against.name} do not share a tokenizer: "
                "their scores cannot be compared",
                "compare with the dense model that was pruned",
            )
    return torch.tensor(ids, dtype=torch.int64)


def _checked_window(model: Model, against: Model | None, window: int) -> int:
    if window < 2:
        raise UsageError(f"a window of {window} tokens predicts nothing; 2 is the least")
    for each in (model, against):
        if each is not None and window > each.max_model_len:
            raise UsageError(
                f"a window of {window} tokens does not fit {each.name}, "
                f"which reads {each.max_model_len}",
                f"--window {each.max_model_len}",
            )
    return window


def _windows(ids: Tensor, window: int, max_windows: int | None) -> Sequence[Tensor]:
    total = len(ids) // window
    if total == 0:
        raise UsageError(
            f"the text has {len(ids)} tokens, one window needs {window}",
            f"give a longer text, or --window {len(ids)} at most",
        )
    if max_windows is not None and max_windows < 1:
        raise UsageError("max_windows must be at least 1")
    stride = 1 if max_windows is None else math.ceil(total / max_windows)
    return list(ids[: total * window].view(total, window)[::stride])


@torch.inference_mode()
def _measure(model: Model, against: Model | None, tokens: Tensor, sums: _Sums) -> None:
    """Add one window [window] to the totals."""
    hidden = _hidden(model, tokens)
    other = None if against is None else _hidden(against, tokens)
    for start in range(0, len(tokens) - 1, _ROWS):
        rows = slice(start, min(start + _ROWS, len(tokens) - 1))
        targets = tokens[rows.start + 1 : rows.stop + 1]
        scores = _log_softmax(model, hidden[rows])
        sums.tokens += len(targets)
        sums.nll += _nll(scores, targets)
        if against is not None and other is not None:
            truth = _log_softmax(against, other[rows])
            sums.against_nll += _nll(truth, targets)
            sums.kl += (truth.exp() * (truth - scores)).sum(dtype=torch.float64).item()
            sums.agreed += int((truth.argmax(-1) == scores.argmax(-1)).sum())


def _hidden(model: Model, tokens: Tensor) -> Tensor:
    """Final hidden states [window - 1, hidden] of all tokens that have a successor."""
    cache = model.decoder.new_cache(len(tokens))
    return model.decoder.forward(tokens[:-1], cache)


def _log_softmax(model: Model, hidden: Tensor) -> Tensor:
    """Log-probabilities, fp32 [rows, vocab]."""
    return model.decoder.logits(hidden).float().log_softmax(-1)


def _nll(scores: Tensor, targets: Tensor) -> float:
    picked = scores.gather(-1, targets.to(scores.device)[:, None])
    return -float(picked.sum(dtype=torch.float64))


def _ppl(nll: float, tokens: int) -> float:
    """exp(nll / tokens); so bad a model that this overflows counts as infinitely bad."""
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def flattered(model: Model, result: EvalResult) -> str | None:
    """What a reader of the perplexity has to know, if it is of the text of the calibration."""
    provenance = (model.checkpoint.manifest or {}).get("provenance", {})
    if provenance.get("calibration", {}).get("text_sha256") != result.text_sha256:
        return None
    return f"{model.name} was calibrated on this very text: its perplexity flatters it"
