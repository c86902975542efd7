"""How much an engine does at once, and what that means for a model."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from ..kernels.paging import PAGE_POSITIONS
from .model import Model
from .paged import pages_for

_KV_BYTES = 2**30


@dataclass(frozen=True)
class EngineSettings:
    """How much an engine does at once.

    Attributes:
        max_running: requests that are carried out side by side.
        max_waiting: requests that may wait behind them.
        max_model_len: most tokens of a prompt and its answer; None for what the model has.
        tokens_per_step: of answers and pieces of prompts together; more is faster with long
            prompts, fewer keeps the gaps between others' tokens short.
        kv_bytes: memory for keys and values; None for 1 GiB, or less where that is enough for
            `max_running` requests, or more where one needs it.
        share_prefixes: whether what was computed of one prompt is used for others that begin alike.
        queue_timeout_s: a request that has waited so long fails; None for no limit.

    Raises:
        UsageError: a number is too small.
    """

    max_running: int = 32
    max_waiting: int = 64
    max_model_len: int | None = None
    tokens_per_step: int = 256
    kv_bytes: int | None = None
    share_prefixes: bool = True
    queue_timeout_s: float | None = None

    def __post_init__(self) -> None:
        least = {"max_running": 1, "max_waiting": 0, "max_model_len": 2, "tokens_per_step": 1}
        for name, low in (*least.items(), ("kv_bytes", 1), ("queue_timeout_s", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name} must be at least {low}, given {value}")

    def context_of(self, model: Model) -> int:
        """Most tokens of a prompt and its answer.

        Raises:
            UsageError: more are asked for than the model has.
        """
        longest, asked = model.max_model_len, self.max_model_len
        if asked is not None and asked > longest:
            raise UsageError(
                f"a context of {asked} tokens is asked for, and the model has {longest}"
            )
        return longest if asked is None else asked

    def pages_of(self, model: Model) -> int:
        """As many pages as fit the memory for them, and at least as many as one request may need.

        Raises:
            UsageError: the memory is too small for one request.
        """
        longest, each = self.context_of(model), model.decoder.page_bytes
        one = pages_for(longest)
        if self.kv_bytes is None:
            return max(one, min(self.max_running * one, _KV_BYTES // each))
        pages = self.kv_bytes // each
        if pages < one:
            raise UsageError(
                f"keys and values of {longest} tokens take {one * each} bytes, "
                f"and {self.kv_bytes} are given",
                f"a shorter context, of {max(2, pages * PAGE_POSITIONS)} tokens, or more memory",
            )
        return pages
