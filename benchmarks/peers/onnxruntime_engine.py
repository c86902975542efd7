"""onnxruntime-genai: DIRECTORY THREADS."""

from __future__ import annotations

import json
import time

import numpy as np
import onnxruntime_genai
from worker import Engine, fresh_ids, serve


class OnnxRuntime(Engine):
    """One generator for each measurement."""

    version = onnxruntime_genai.__version__

    def __init__(self, path: str, threads: int) -> None:
        config = onnxruntime_genai.Config(path)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = onnxruntime_genai.Model(config)

    def prefill(self, ids: list[int]) -> float:
        return self._run(ids, 0)[0]

    def decode(self, depth: int, count: int, batch: int) -> float:
        return self._run(fresh_ids(max(depth, 2), depth), count)[1]

    def _run(self, ids: list[int], count: int) -> tuple[float, float]:
        """Seconds of the prompt and of `count` tokens behind it."""
        settings = onnxruntime_genai.GeneratorParams(self._model)
        length = len(ids) + count + 8
        settings.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(self._model, settings)
        start = time.perf_counter()
        generator.append_tokens(np.array(ids, dtype=np.int32))
        generator.generate_next_token()
        middle = time.perf_counter()
        for _ in range(count):
            generator.generate_next_token()
        return middle - start, time.perf_counter() - middle


serve(OnnxRuntime)
