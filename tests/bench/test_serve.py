"""The client's own figures, against a server whose delays are known."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from urllib.request import urlopen

import pytest
from halfweave.bench.client import Observed, Target, ask
from halfweave.bench.compare import NO_CHANGE, compare
from halfweave.bench.prompts import Prompts
from halfweave.bench.serve import ServePoint, bench_serve, points_body, serve_notes
from halfweave.bench.serve_plan import ServePlan, loads, parse_slos
from halfweave.bench.sse import EventReader, read_answer
from halfweave.bench.traffic import Load
from halfweave.errors import HalfweaveError, UsageError

TEXT = "Two foxes keep every fourth weight; nobody minds the lazy zero. " * 20
PROMPTS = Prompts.of(TEXT, 40, seed=1)
MODULE = "halfweave.bench.mock_server"
Mock = Callable[..., str]


@pytest.fixture
def mock() -> Iterator[Mock]:
    """Starts mock servers, each in a process of its own."""
    with ExitStack() as stack:
        yield lambda *flags: stack.enter_context(_running(*flags))


@contextmanager
def _running(*flags: object) -> Iterator[str]:
    command = [sys.executable, "-m", MODULE, *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def measured(url: str, load: Load, **changes: Any) -> ServePoint:
    asked = {
        "requests": 4,
        "repetitions": 5,
        "warmups": 1,
        "new_tokens": 6,
        "timeout_s": 30.0,
        **changes,
    }
    plan = ServePlan((load,), **asked)
    target = Target(url, "mock", chat=plan.chat, timeout_s=plan.timeout_s)
    (point,) = bench_serve({"mock": target}, PROMPTS, plan)
    return point


def truths(url: str) -> list[list[float]]:
    """When the server really wrote, in ms from the request; without the one that warmed up."""
    with urlopen(f"{url}/sent") as answer:
        return [[1000 * at for at in writes] for writes in json.load(answer)][1:]


def gaps(writes: list[float]) -> list[float]:
    return [b - a for a, b in pairwise(writes)]


@pytest.mark.parametrize("load", [Load(concurrency=3), Load(rate=8.0)], ids=["closed", "open"])
@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_every_figure_is_within_two_percent_of_the_truth(
    mock: Mock, load: Load, chat: bool
) -> None:
    url = mock("--ttft-ms", 200, "--gap-ms", 80)
    point = measured(url, load, chat=chat)
    sent = truths(url)
    assert point.completed == point.requests == len(sent) == 20
    assert point.itl_ms and point.ttft_ms and point.tpot_ms and point.e2e_ms
    near = {"rel": 0.02}
    assert point.ttft_ms["p50"] == pytest.approx(statistics.median(w[0] for w in sent), **near)
    every = [gap for writes in sent for gap in gaps(writes)]
    assert point.itl_ms["p50"] == pytest.approx(statistics.median(every), **near)
    assert point.e2e_ms["p50"] == pytest.approx(statistics.median(w[-1] for w in sent), **near)
    spent = statistics.median((w[-1] - w[0]) / 5 for w in sent)
    assert point.tpot_ms["p50"] == pytest.approx(spent, **near)
    assert (point.ttft_ms["p50"], point.itl_ms["p50"]) == pytest.approx((200, 80), **near)
    assert point.output_tokens == 120


def test_the_first_token_is_in_no_gap(mock: Mock) -> None:
    """A slow first token shows in TTFT and nowhere else."""
    point = measured(mock("--ttft-ms", 600, "--gap-ms", 40), Load(concurrency=4))
    assert point.itl_ms and point.tpot_ms
    assert max(max(s.chunk_gaps_ms) for s in point.samples) < 300
    assert point.tpot_ms["p90"] is not None and point.tpot_ms["p90"] < 300
    assert all(len(sample.chunk_gaps_ms) == 5 for sample in point.samples)


@pytest.mark.parametrize("flag", ["--chunk", "--merge"], ids=["in an event", "on the wire"])
def test_tokens_that_come_together_have_no_itl(mock: Mock, flag: str) -> None:
    url = mock("--ttft-ms", 100, "--gap-ms", 60, flag, 2)
    point = measured(url, Load(concurrency=4))
    assert point.itl_ms is None
    assert point.coalesced_requests == point.completed == 20
    assert point.output_tokens == 120  # by usage, not by chunks
    assert point.chunk_gap_ms and point.tpot_ms
    assert point.chunk_gap_ms["p50"] == pytest.approx(120, rel=0.05)
    assert point.tpot_ms["p50"] == pytest.approx(240 / 5, rel=0.05)
    assert any("no ITL" in note for note in serve_notes([point]))


def test_without_usage_no_tokens_are_counted(mock: Mock) -> None:
    point = measured(mock("--ttft-ms", 5, "--gap-ms", 2, "--no-usage"), Load(concurrency=4))
    assert point.completed == 20
    assert (point.output_tokens, point.itl_ms, point.tpot_ms) == (None, None, None)
    assert point.output_tokens_per_s is None
    assert point.chunk_gap_ms is not None
    assert any("tells no usage" in note for note in serve_notes([point]))


def test_refusals_failures_and_timeouts_are_counted_apart(mock: Mock) -> None:
    url = mock("--ttft-ms", 5, "--gap-ms", 2, "--refuse-every", 3, "--fail-every", 5)
    point = measured(url, Load(concurrency=1), requests=6)
    # Of requests 2 to 31, ten are divisible by 3, and four more by 5.
    assert (point.refused, point.failed, point.timed_out, point.completed) == (10, 4, 0, 16)
    assert any("10 refused, 0 timed out, 4 failed" in note for note in serve_notes([point]))
    errors = {sample.outcome: sample.error for sample in point.samples}
    assert "status 500" in str(errors["failed"]) and errors["completed"] is None
    assert all(sample.ttft_ms is None for sample in point.samples if sample.outcome != "completed")


def test_an_endpoint_that_stalls_times_out(mock: Mock) -> None:
    observed = asyncio.run(ask(Target(mock("--stalled"), "mock", timeout_s=0.3), "x", 4))
    assert observed.outcome == "timed_out"
    assert 0 < observed.ended - observed.sent < 10  # the limit counts from before it is sent


def test_an_endpoint_that_is_not_there_is_an_error_before_anything_is_measured() -> None:
    with pytest.raises(HalfweaveError, match="does not answer"):
        measured("http://127.0.0.1:9", Load(concurrency=1))


def test_goodput_counts_what_keeps_to_every_limit(mock: Mock) -> None:
    url = mock("--ttft-ms", 60, "--gap-ms", 20)
    both = measured(url, Load(concurrency=4), slos=parse_slos(["ttft:5000,tpot:2000"]))
    assert both.goodput_per_s == pytest.approx(both.completed / both.duration_s)
    none = measured(url, Load(concurrency=4), slos=parse_slos(["ttft:5000", "tpot:1"]))
    assert none.goodput_per_s == 0
    assert measured(url, Load(concurrency=4)).goodput_per_s is None


def test_an_open_loop_keeps_to_its_times_whatever_the_server_does(mock: Mock) -> None:
    fast = measured(mock("--ttft-ms", 1, "--gap-ms", 1), Load(rate=40.0), seed=3)
    slow = measured(mock("--ttft-ms", 400, "--gap-ms", 1), Load(rate=40.0), seed=3)
    other = measured(mock("--ttft-ms", 1, "--gap-ms", 1), Load(rate=40.0), seed=4)

    def due(point: ServePoint) -> list[float]:
        return [sample.due_s for sample in point.samples]

    # Due times are sums of the same draws; the rounds begin within a moment of each other.
    assert due(fast) == pytest.approx(due(slow), abs=0.02)
    assert due(fast) != pytest.approx(due(other), abs=0.02)
    # Four requests take less than the 400 ms of one: they did not wait for each other.
    spans = [max(s.sent_s for s in slow.samples if s.repetition == r) for r in range(5)]
    assert statistics.median(spans) < 0.4


def test_a_closed_loop_has_no_more_requests_than_clients(mock: Mock) -> None:
    point = measured(mock("--ttft-ms", 50, "--gap-ms", 1), Load(concurrency=2))
    for one in range(5):
        samples = [s for s in point.samples if s.repetition == one]
        spans = [(s.sent_s, s.sent_s + (s.e2e_ms or 0) / 1000) for s in samples]
        for begin, _ in spans:
            assert sum(start <= begin < end for start, end in spans) <= 2


def test_the_document_has_every_request(mock: Mock) -> None:
    point = measured(mock("--ttft-ms", 1, "--gap-ms", 1), Load(rate=50.0))
    (found,) = json.loads(json.dumps(points_body([point]), allow_nan=False))["points"]
    assert (found["mode"], found["rate"], found["concurrency"]) == ("open", 50.0, None)
    assert len(found["samples"]) == 20
    assert found["samples"][0]["outcome"] == "completed"
    assert found["client_lag_ms"]["max"] >= found["client_lag_ms"]["p50"] >= 0


def test_a_slower_machine_is_told_from_a_slower_model(mock: Mock) -> None:
    """Two endpoints in turns: both slower by 30 % is no change, one slower by 10 % is one."""

    def document(dense_slower: float, pruned_slower: float) -> dict[str, Any]:
        urls = {
            name: mock("--ttft-ms", 100 * slower, "--gap-ms", 40 * slower)
            for name, slower in (("dense", dense_slower), ("pruned", 0.8 * pruned_slower))
        }
        load = (Load(concurrency=4),)
        plan = ServePlan(load, requests=4, repetitions=7, warmups=1, new_tokens=4)
        points = bench_serve({n: Target(url, "mock") for n, url in urls.items()}, PROMPTS, plan)
        models = [{"name": name, "is_baseline": name == "dense"} for name in urls]
        told = {"kind": "serve", "models": models, **points_body(points)}
        return dict(json.loads(json.dumps(told)))

    usual = document(1.0, 1.0)
    busy = compare(usual, document(1.3, 1.3))
    assert (busy.verdict, busy.relative) == (NO_CHANGE, True)
    assert any(each.verdict == "slower" for each in busy.changes if not each.relative)
    slow = compare(usual, document(1.0, 1.1))
    found = {each.name: each for each in slow.changes}["pruned, 4 clients: E2E, to dense"]
    assert (slow.verdict, found.verdict) == ("slower", "slower")
    assert found.first == pytest.approx(0.8, rel=0.05)
    assert found.shift.ratio == pytest.approx(1.1, rel=0.03)


# ---- parts


def test_prompts_follow_the_seed_and_never_begin_alike() -> None:
    again, other = Prompts.of(TEXT, 40, seed=1), Prompts.of(TEXT, 40, seed=2)
    first, second = PROMPTS.make(3, "0 0"), again.make(3, "0 0")
    assert [p.split(": ")[1] for p in first] == [p.split(": ")[1] for p in second]
    assert [p.split(": ")[1] for p in first] != [p.split(": ")[1] for p in other.make(3, "0 0")]
    begins = [p.split(": ")[0] for p in (*first, *second, *PROMPTS.make(3, "0 1"))]
    assert len(set(begins)) == 9
    with pytest.raises(UsageError, match="a prompt needs"):
        Prompts.of("too short", 40, seed=0)


def test_events_are_read_however_they_are_cut() -> None:
    stream = b'data: {"choices":[{"text":"a"}]}\r\n\r\n: ping\n\ndata:[DONE]\n\n'
    for size in (1, 7, 1000):
        reader = EventReader()
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        found = [data for piece in pieces for data in reader.feed(piece)]
        assert found == ['{"choices":[{"text":"a"}]}', "[DONE]"]


def test_a_role_is_no_token_and_an_error_is_one() -> None:
    role = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    word = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
    answer = read_answer([(1.0, role), (2.0, word)])
    assert [(arrival.at, arrival.chunks) for arrival in answer.arrivals] == [(2.0, 1)]
    assert read_answer([(1.0, b"data: nonsense\n\n")]).error is not None
    assert read_answer([(1.0, b'data: {"error": {"message": "no"}}\n\n')]).error == (
        "in a stream: no"
    )


@pytest.mark.parametrize("word", ["itl:5", "ttft", "ttft:x", "ttft:0", "tpot:inf", "e2e:nan"])
def test_a_limit_that_is_none_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="no limit for goodput"):
        parse_slos([word])


NO_ADDRESS = ("localhost:8000", "ftp://x", "http://", "http://x:99999", "http://[::1", "http://x/ä")


@pytest.mark.parametrize("url", NO_ADDRESS)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="no address"):
        Target(url, "m")


def test_secrets_are_neither_in_an_address_nor_in_two_lines() -> None:
    """Else they would be in the document, and in other headers."""
    with pytest.raises(UsageError, match="no password in it") as caught:
        Target("http://user:pass-word@x", "m")
    assert "pass-word" not in str(caught.value)
    with pytest.raises(UsageError, match="no header can hold") as caught:
        Target("http://x", "m", api_key="secret\r\nX-Other: 1")
    assert "secret" not in str(caught.value)


# ---- servers that do what none should


async def _answered(*pieces: bytes) -> Observed:
    """What the client makes of these bytes, whatever was asked."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await ask(Target(f"http://127.0.0.1:{port}", "m", timeout_s=20), "x", 4)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
WORD = b'data: {"choices":[{"text":"a"}]}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ((), "closed without an answer"),
        ((b"no HTTP at all\r\n\r\n",), "RemoteProtocolError"),
        ((b"HTTP/1.1 500 Oops\r\nContent-Length: 3\r\n\r\nbad",), "status 500: b'bad'"),
        ((HEAD, WORD), r"ended without \[DONE\]"),
        ((HEAD, b"<html>hello</html>"), r"ended without \[DONE\]"),
        ((HEAD, b"data: " + b"[" * 100_000 + b"\n\n", DONE), "no JSON object"),
        ((HEAD, b"data: \xff\xfe\n\n", DONE), "no JSON object"),
        ((HEAD, b'data: {"error": ' + b'"x' + b"y" * 5000 + b'"}\n\n', DONE), "in a stream: xyyy"),
        ((HEAD.replace(b"\r\n\r\n", b"\r\nContent-Length: 999\r\n\r\n"), WORD), "closed"),
        *(
            ((HEAD, f"data: {odd}\n\n".encode(), DONE), "brought no text")
            for odd in (
                '{"choices": {"text": "a"}}',
                '{"choices": ["a", null, 7]}',
                '{"choices": [{"delta": "a"}]}',
                '{"choices": 7}',
                '{"choices": [], "usage": {"completion_tokens": "many"}}',
                '{"choices": [], "usage": {"completion_tokens": -3}}',
                '{"choices": [], "usage": {"completion_tokens": NaN}}',
                '{"choices": [], "usage": {"completion_tokens": true}}',
            )
        ),
    ],
)
def test_whatever_a_server_says_is_a_failed_request(pieces: tuple[bytes, ...], said: str) -> None:
    observed = asyncio.run(_answered(*pieces))
    assert observed.outcome == "failed"
    assert re.search(said, str(observed.error)), observed.error
    assert len(str(observed.error)) < 500


def test_an_answer_in_one_piece_has_no_time_between_its_tokens(mock: Mock) -> None:
    """Zero would be the best TPOT there is, and no limit of it is missed."""
    url = mock("--ttft-ms", 5, "--gap-ms", 1, "--merge", 6)
    point = measured(url, Load(concurrency=4), slos=parse_slos(["tpot:1"]))
    assert {sample.tpot_ms for sample in point.samples} == {None}
    assert (point.tpot_ms, point.itl_ms) == (None, None)
    assert point.goodput_per_s == pytest.approx(point.requests_per_s)


def test_usage_that_is_none_is_not_counted() -> None:
    for told in ('"7"', "-1", "7.5", "1e99", "true", "null", "[]"):
        usage = b'data: {"choices": [], "usage": {"completion_tokens": %s}}\n\n' % told.encode()
        observed = asyncio.run(_answered(HEAD, WORD, usage, DONE))
        assert (observed.outcome, observed.answer.output_tokens) == ("completed", None)


def test_an_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfweave.bench.client._MOST_BYTES", 1000)
    observed = asyncio.run(_answered(HEAD, *[b"data: {" + b"x" * 400] * 5))
    assert (observed.outcome, "more than 1000 bytes" in str(observed.error)) == ("failed", True)


def test_a_server_that_dies_in_a_run_ends_it() -> None:
    """All of a round failed: its figures would be those of a socket that nobody listens on."""
    with ExitStack() as stack:
        url = stack.enter_context(_running("--ttft-ms", 5, "--gap-ms", 1, "--fail-after", 6))
        with pytest.raises(HalfweaveError, match="does not answer any more: status 500"):
            measured(url, Load(concurrency=2))


def test_a_plan_that_measures_nothing_is_refused() -> None:
    for wrong in ({"repetitions": 4}, {"requests": 0}, {"warmups": 0}, {"new_tokens": 0}):
        with pytest.raises(UsageError, match="must be at least"):
            ServePlan((Load(concurrency=1),), **wrong)
    for load in (Load(), Load(1.0, 1), Load(rate=0.0), Load(rate=float("inf"))):
        with pytest.raises(UsageError):
            ServePlan((load,))
    with pytest.raises(UsageError, match="8 clients would share 7 requests"):
        ServePlan((Load(rate=1.0), Load(concurrency=8)), requests=7)
    assert loads([], []) == (Load(concurrency=8),)
    assert loads([1.0], [2]) == (Load(rate=1.0), Load(concurrency=2))


def test_a_key_is_sent_and_never_shown() -> None:
    target = Target("http://127.0.0.1:9", "m", api_key="secret-key")
    assert "secret-key" not in repr(target)
    for wrong in ("secret-key ", " secret-key", "secret\nkey"):
        with pytest.raises(UsageError) as refused:
            Target("http://127.0.0.1:9", "m", api_key=wrong)
        assert "secret" not in refused.value.message
