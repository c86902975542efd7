"""A minute of load on a real server: the small form of `make soak` (row 54)."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from halfweave.bench.server_process import server
from load.clients import Ask, Tally, complete
from load.page import page
from load.soak import percentile, soak, to_json
from load.throughput import full_queue_ms, throughputs
from serving import recipe_of
from support.tiny import Tiny, save_tiny

SECONDS = float(os.environ.get("HALFWEAVE_SOAK_SECONDS", "60"))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("soak") / "tiny", Tiny(positions=8192))


def test_a_minute_of_load_leaves_no_error_and_no_trace(model: Path) -> None:
    """Rows 46, 48 and 54; pages so few that requests have to start over."""
    scarce = ["--max-model-len", "4000", "--kv-mib", "1"]
    flags = ["--max-waiting", "16", "--max-num-seqs", "16", *scarce]
    result, errors = soak(model, SECONDS, 64, flags)
    assert errors == []
    assert result.errors_other_than_429 == 0
    assert result.finished > 100
    assert result.aborted > 0 < result.refused_429
    assert result.blocks_leaked == 0
    assert result.fds_end <= result.fds_start + 3
    assert result.threads_end <= result.threads_start + 2
    assert result.rss_end_mib < 1.1 * result.rss_start_mib + 20


def test_throughput_and_a_full_queue_are_measured(model: Path) -> None:
    with server(model, ["--max-num-seqs", "2", "--max-waiting", "2"]) as running:
        one, two = throughputs(running, (1, 2), tokens=8, rounds=2)
        assert (one.batch, two.batch) == (1, 2)
        assert 0 < one.low <= one.tokens_per_s <= one.high
        times = asyncio.run(full_queue_ms(running, 4, 5))
        assert len(times) == 5
        document = {
            "model": "tiny",
            "recipe": recipe_of(model),
            "date": "today",
            "hardware": "this",
            "command": "serving.py --tokens 8 --rounds 2",
            "versions": {"halfweave": "1", "torch": "2", "python": "3", "more": "4"},
            "soak": to_json(soak(model, 3, 4, [])[0]),
            "throughput": [vars(one), vars(two)],
            "queue_full_ms_p50": 1.0,
            "queue_full_ms_p99": 2.0,
        }
        text = page(json.loads(json.dumps(document)))
        assert "| 2 |" in text and "tiny (dense)" in text


# ---- the clients themselves, against a server that does what the test says


@pytest.fixture
def scripted() -> Iterator[tuple[str, list[bytes]]]:
    """A socket that answers each connection with the next of some bytes."""
    answers: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answers.pop(0))

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", answers


def ask(url: str, answer: bytes, answers: list[bytes], tokens: int = 2) -> Tally:
    answers.append(answer)
    tally = Tally()
    asyncio.run(complete(url, "m", Ask("x", tokens), tally))
    return tally


def stream(*documents: str) -> bytes:
    events = "".join(f"data: {each}\n\n" for each in documents)
    return f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n{events}".encode()


TOKEN = '{"choices": [{"text": "a"}]}'


def test_clients_see_what_went_wrong(scripted: tuple[str, list[bytes]]) -> None:
    url, answers = scripted
    usage = '{"choices": [], "usage": {"completion_tokens": 2}}'
    fine = ask(url, stream(TOKEN, TOKEN, usage, "[DONE]"), answers)
    assert (fine.finished, fine.tokens, fine.errors, len(fine.ttft_s)) == (1, 2, [], 1)
    assert fine.gaps_s == []  # both tokens came in one piece, so there was no gap to see
    cut = ask(url, stream(TOKEN), answers)
    assert len(cut.errors) == 1
    short = ask(url, stream(TOKEN, TOKEN, usage, "[DONE]"), answers, tokens=3)
    assert len(short.errors) == 1
    failed = ask(url, stream(TOKEN, '{"error": {"message": "no"}}', "[DONE]"), answers)
    assert failed.errors == ["in a stream: no"]
    broken = ask(url, b"HTTP/1.1 500 Oh\r\n\r\n{}", answers)
    assert broken.errors[0].startswith("status 500")
    full = ask(url, b"HTTP/1.1 429 Later\r\n\r\n{}", answers)
    assert (full.full, full.errors, len(full.full_s)) == (1, [], 1)
    gone = Tally()
    asyncio.run(complete("http://127.0.0.1:9", "m", Ask("x", 1), gone))
    assert len(gone.errors) == 1


def test_percentiles_are_of_sorted_values_in_milliseconds() -> None:
    assert percentile([0.004, 0.001, 0.003, 0.002], 0.5) == 3.0
    assert percentile([], 0.5) == 0.0
