"""llama.cpp by llama-cpp-python's bare binding, without sampling: MODEL.gguf THREADS."""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

import llama_cpp
from worker import Engine, serve

MOST_POSITIONS, MOST_SEQUENCES = 1024, 16
FLASH_OFF, FLASH_ON = 0, 1  # llama_flash_attn_type
TRIED_DEPTH, TRIED_TOKENS, TRIALS = 512, 8, 3
_quiet = llama_cpp.llama_log_callback(lambda level, message, data: None)


class LlamaCpp(Engine):
    """One context for all sequences; memory is cleared before each measurement."""

    version = llama_cpp.__version__
    batches = True

    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._threads = threads
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)
        self._context = self._made(FLASH_ON)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._chosen = False

    def answer(self, ask: dict[str, Any], salt: int) -> dict[str, Any]:
        if not self._chosen:
            self._choose_attention()
        return super().answer(ask, salt)

    def _choose_attention(self) -> None:
        """With flash attention or without, whichever decodes faster: its best is compared."""
        with_it = self._tried()
        self._renew(FLASH_OFF)
        without = self._tried()
        if with_it < without:
            self._renew(FLASH_ON)
        print(f"flash attention: {with_it:.3f} s with it, {without:.3f} without", file=sys.stderr)
        self._chosen = True

    def _tried(self) -> float:
        return min(self.decode(TRIED_DEPTH, TRIED_TOKENS, 1) for _ in range(TRIALS))

    def _renew(self, flash: int) -> None:
        """One context at a time, since what it takes of memory is told."""
        llama_cpp.llama_free(self._context)
        self._context = self._made(flash)
        self._memory = llama_cpp.llama_get_memory(self._context)

    def _made(self, flash: int) -> Any:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = MOST_POSITIONS * 4
        settings.n_batch = settings.n_ubatch = 512
        settings.n_seq_max = MOST_SEQUENCES
        settings.kv_unified = True
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.flash_attn_type = flash
        context = llama_cpp.llama_init_from_model(self._model, settings)
        if not context:
            raise RuntimeError("llama.cpp makes no context")
        return context

    def prefill(self, ids: list[int]) -> float:
        llama_cpp.llama_memory_clear(self._memory, True)
        start = time.perf_counter()
        self._run([(token, position, 0) for position, token in enumerate(ids)], last_only=True)
        return time.perf_counter() - start

    def decode(self, depth: int, count: int, batch: int) -> float:
        llama_cpp.llama_memory_clear(self._memory, True)
        for sequence in range(batch if depth else 0):
            self._run([(100 + i, i, sequence) for i in range(depth)], last_only=True)
        start = time.perf_counter()
        for step in range(count):
            tokens = [(100 + step * 31, depth + step, sequence) for sequence in range(batch)]
            self._run(tokens, last_only=False)
        return time.perf_counter() - start

    def _run(self, tokens: list[tuple[int, int, int]], last_only: bool) -> None:
        """Tokens as (id, position, sequence)."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = not last_only or i == len(tokens) - 1
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")
        llama_cpp.llama_get_logits_ith(self._context, -1)


serve(LlamaCpp)
