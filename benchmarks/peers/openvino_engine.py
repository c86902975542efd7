"""OpenVINO GenAI: DIRECTORY THREADS. Its own timers tell the two phases apart."""

from __future__ import annotations

import numpy as np
import openvino
import openvino_genai
from worker import Engine, fresh_ids, serve


class OpenVino(Engine):
    """A latency-tuned pipeline on one stream."""

    version = openvino_genai.__version__.split("-")[0]

    def __init__(self, path: str, threads: int) -> None:
        self._pipeline = openvino_genai.LLMPipeline(
            path,
            "CPU",
            INFERENCE_NUM_THREADS=threads,
            PERFORMANCE_HINT="LATENCY",
            NUM_STREAMS=1,
        )
        self._asked = 0

    def prefill(self, ids: list[int]) -> float:
        return float(self._run(ids, 2).get_ttft().mean) / 1e3

    def decode(self, depth: int, count: int, batch: int) -> float:
        self._asked += 1
        metrics = self._run(fresh_ids(max(depth, 2), 10_000 + self._asked), count + 1)
        return float(metrics.get_tpot().mean) / 1e3 * count

    def _run(self, ids: list[int], new: int) -> openvino_genai.PerfMetrics:
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens = settings.min_new_tokens = new
        settings.ignore_eos, settings.do_sample, settings.eos_token_id = True, False, -1
        tokens = np.array([ids], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(tokens), openvino.Tensor(np.ones_like(tokens))
        )
        return self._pipeline.generate(inputs, settings).perf_metrics


serve(OpenVino)
