"""GET /metrics: what dashboards and routers read, under both names."""

from __future__ import annotations

import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.http_server import Live, idle, wait_until

# What vLLM's router scrapes literally.
SCRAPED = {
    "num_requests_running",
    "num_requests_waiting",
    "gpu_cache_usage_perc",
    "kv_cache_usage_perc",
    "gpu_prefix_cache_hits_total",
    "gpu_prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "prefix_cache_queries_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "num_preemptions_total",
    "request_success_total",
    "iteration_tokens_total_bucket",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_sum",
    "e2e_request_latency_seconds_count",
    "request_queue_time_seconds_count",
    "request_prefill_time_seconds_count",
    "request_decode_time_seconds_count",
    "request_prompt_tokens_sum",
    "request_generation_tokens_sum",
}


def figures(live: Live) -> dict[tuple[str, ...], float]:
    """Every sample by its name and labels, but for the model's."""
    answer = live.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            if "model_name" in labels:
                assert labels.pop("model_name") == live.model
            found[(sample.name, *labels.values())] = sample.value
    return found


def test_every_figure_is_there_under_both_names(live: Live) -> None:
    live.complete(max_tokens=3)
    names = {name for name, *_ in figures(live)}
    for figure in SCRAPED:
        assert f"halfweave_{figure}" in names
        assert f"vllm:{figure}" in names


def test_what_happens_is_counted(live: Live) -> None:
    wait_until(lambda: idle(live))
    before = figures(live)
    answer = live.complete(prompt="The dog", n=2, max_tokens=7, ignore_eos=True).json
    wait_until(lambda: idle(live))
    after = figures(live)

    def grown(*name: str) -> float:
        ours = (
            after[(f"halfweave_{name[0]}", *name[1:])] - before[(f"halfweave_{name[0]}", *name[1:])]
        )
        theirs = after[(f"vllm:{name[0]}", *name[1:])] - before[(f"vllm:{name[0]}", *name[1:])]
        assert ours == theirs
        return ours

    assert grown("generation_tokens_total") == 14
    assert grown("prompt_tokens_total") == 2 * answer["usage"]["prompt_tokens"]
    assert grown("request_success_total", "length") == 2
    assert grown("time_to_first_token_seconds_count") == 2
    assert grown("inter_token_latency_seconds_count") == 12
    assert grown("e2e_request_latency_seconds_count") == 2
    assert grown("request_generation_tokens_sum") == 14
    assert grown("e2e_request_latency_seconds_sum") > grown("time_to_first_token_seconds_sum") > 0
    assert grown("iteration_tokens_total_sum") >= 14
    assert after[("halfweave_num_requests_running",)] == 0
    assert after[("halfweave_kv_cache_usage_perc",)] == 0


def test_aborted_requests_are_counted(slow: Live) -> None:
    """Row 46: the metric grows by one."""
    before = figures(slow)[("halfweave_request_success_total", "abort")]
    connection = slow.begin_completion(max_tokens=8000, ignore_eos=True, stream=True)
    connection.getresponse().read(100)
    assert figures(slow)[("halfweave_num_requests_running",)] == 1
    assert figures(slow)[("halfweave_kv_cache_usage_perc",)] > 0
    connection.close()
    wait_until(lambda: idle(slow))
    assert figures(slow)[("halfweave_request_success_total", "abort")] == before + 1


@pytest.mark.parametrize("stream", [True, False])
def test_each_request_leaves_one_line_that_says_how_it_went(
    live: Live, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    caplog.set_level(logging.INFO, logger="halfweave.server.request_scope")
    mine = {"X-Request-Id": f"mine-{stream}"}
    document = {"model": live.model, "prompt": "The dog", "n": 2, "max_tokens": 5, "stream": stream}
    live.post("/v1/completions", {**document, "ignore_eos": True}, mine)
    wait_until(lambda: idle(live))
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    (line,) = [each for each in lines if each["request_id"] == f"mine-{stream}"]
    assert line["route"] == "/v1/completions"
    assert line["status"] == 200
    assert line["model"] == live.model
    assert line["completion_tokens"] == 10
    assert line["finish"] == {"length": 2}
    assert line["ms"] >= line["ttft_ms"] > 0


def test_a_client_that_leaves_is_in_the_log_too(
    slow: Live, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="halfweave.server.request_scope")
    connection = slow.begin_completion(max_tokens=8000, ignore_eos=True, stream=True)
    connection.getresponse().read(100)
    connection.close()
    wait_until(lambda: idle(slow))
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["finish"] for line in lines if "finish" in line] == [{"abort": 1}]
