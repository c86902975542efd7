"""Figures for Prometheus: under halfweave's own names, and under vLLM's, which routers scrape.

What the engines count is read when it is asked for; times are observed on the event loop, where
clients' tokens pass by, on one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..runtime.engine import Engine
from ..runtime.stats import EngineStats

_OWN, _VLLM = "halfweave_", "vllm:"
_LABELS = ["model_name"]
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_GAPS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 2, 5)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", _SECONDS),
    "inter_token_latency_seconds": ("Between two tokens of an answer, the first excluded.", _GAPS),
    "e2e_request_latency_seconds": ("From a request's arrival to its last token.", _SECONDS),
    "request_queue_time_seconds": ("Waiting before the prompt was begun.", _SECONDS),
    "request_prefill_time_seconds": ("From there to the first token.", _SECONDS),
    "request_decode_time_seconds": ("From the first token to the last.", _SECONDS),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens of an answer.", _TOKENS),
}


class Meters:
    """All figures of one server."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        """`engines` by the names of their models."""
        self._registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(
                _OWN + name, help_text, _LABELS, buckets=buckets, registry=self._registry
            )
            for name, (help_text, buckets) in _HISTOGRAMS.items()
        }
        self._registry.register(_EngineCollector(engines))

    def observe(self, model: str, figure: str, value: float) -> None:
        """Add to one of the histograms."""
        self._histograms[figure].labels(model).observe(value)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(_UnderBothNames(self._registry))


class _EngineCollector(Collector):
    """What engines count, at the moment of asking."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        stats = {name: engine.stats() for name, engine in self._engines.items()}
        yield from _gauges(stats)
        yield from _counters(stats)
        steps = HistogramMetricFamily(
            f"{_OWN}iteration_tokens_total", "Tokens of one step of the engine.", labels=_LABELS
        )
        for name, each in stats.items():
            steps.add_metric([name], *_buckets(each.steps_by_tokens))
        yield steps


def _gauges(stats: Mapping[str, EngineStats]) -> Iterator[Metric]:
    for figure, help_text, of in (
        ("num_requests_running", "Requests that are carried out.", lambda s: s.running),
        ("num_requests_waiting", "Requests in the queue.", lambda s: s.waiting),
        ("kv_pages_used", "Pages of keys and values in use.", lambda s: s.pages_used),
        ("kv_cache_usage_perc", "Part of the pages in use, 0 to 1.", _usage),
        ("gpu_cache_usage_perc", "The same under an older name.", _usage),
    ):
        gauge = GaugeMetricFamily(_OWN + figure, help_text, labels=_LABELS)
        for name, each in stats.items():
            gauge.add_metric([name], of(each))
        yield gauge


def _usage(stats: EngineStats) -> float:
    return stats.pages_used / stats.pages


def _counters(stats: Mapping[str, EngineStats]) -> Iterator[Metric]:
    for figure, help_text, of in (
        ("prompt_tokens", "Tokens of prompts that ended.", lambda s: s.prompt_tokens),
        ("generation_tokens", "Tokens written.", lambda s: s.completion_tokens),
        ("num_preemptions", "Sequences that had to start over.", lambda s: s.preemptions),
        ("prefix_cache_queries", "Tokens of prompts looked up.", lambda s: s.prefix_queries),
        ("prefix_cache_hits", "Tokens of prompts known already.", lambda s: s.prefix_hits),
        ("gpu_prefix_cache_queries", "An older name.", lambda s: s.prefix_queries),
        ("gpu_prefix_cache_hits", "An older name.", lambda s: s.prefix_hits),
        ("not_numbers", "Requests that failed on NaN or infinity.", lambda s: s.not_numbers),
    ):
        counter = CounterMetricFamily(_OWN + figure, help_text, labels=_LABELS)
        for name, each in stats.items():
            counter.add_metric([name], of(each))
        yield counter
    labels = [*_LABELS, "finished_reason"]
    ended = CounterMetricFamily(
        f"{_OWN}request_success", "Requests by how they ended.", labels=labels
    )
    for name, each in stats.items():
        for reason in ("stop", "length", "abort", "error"):
            ended.add_metric([name, reason], each.finished.get(reason, 0))
    yield ended


def _buckets(counts: Mapping[int, int]) -> tuple[list[tuple[str, float]], float]:
    """Cumulative buckets and the sum, of so many steps of so many tokens."""
    buckets = [
        (str(float(most)), float(sum(n for tokens, n in counts.items() if tokens <= most)))
        for most in _TOKENS
    ]
    total = float(sum(counts.values()))
    return [*buckets, ("+Inf", total)], float(sum(tokens * n for tokens, n in counts.items()))


class _UnderBothNames(CollectorRegistry):
    """Each figure of a registry twice, the second time under vLLM's name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._inner = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._inner.collect():
            yield metric
            renamed = Metric(metric.name.replace(_OWN, _VLLM, 1), metric.documentation, metric.type)
            renamed.samples = [
                sample._replace(name=sample.name.replace(_OWN, _VLLM, 1))
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
            yield renamed
