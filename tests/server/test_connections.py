"""Connections that misbehave below HTTP's surface: heads without end, clients that do not read."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from halfweave.runtime.model import Model
from halfweave.server.settings import ServerSettings
from support.http_server import Live, idle, live_server, raw_exchange, wait_until

# Its answer does not fit the system's buffers.
LARGE = {"prompt": [9] * 500, "n": 16, "max_tokens": 1, "echo": True, "logprobs": 20}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def hasty(long_model: Model) -> Iterator[Live]:
    """A server with little patience."""
    settings = ServerSettings(
        header_timeout_s=0.3, body_timeout_s=0.3, idle_timeout_s=1, send_timeout_s=1, max_unread=50
    )
    with live_server(long_model, settings) as running:
        yield running


def error_of(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    error: dict[str, Any] = json.loads(body)["error"]
    return int(head.split()[1]), error


def test_endless_headers_are_cut_off(live: Live) -> None:
    """Row 32."""
    head = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 300_000
    # Cut off before the answer can be read is as good.
    with contextlib.suppress(ConnectionError):
        status, error = error_of(raw_exchange(live.port, head))
        assert (status, error["code"]) == (431, "request_too_large")


def test_three_hundred_headers_are_too_many(live: Live) -> None:
    """Row 32."""
    many = {f"X-Header-{number}": "x" for number in range(300)}
    answer = live.send("GET", "/health", headers=many)
    assert (answer.status, answer.error["code"]) == (431, "request_too_large")


def test_what_is_no_http_is_answered_in_the_apis_shape(live: Live) -> None:
    """Row 31."""
    status, error = error_of(raw_exchange(live.port, b"\x16\x03\x01 hello\r\n\r\n"))
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_a_head_that_trickles_in_is_given_up(hasty: Live) -> None:
    """Row 32: slow loris."""
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as sock:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in HEAD * 3:
                sock.sendall(bytes([byte]))
                time.sleep(0.02)
                if time.monotonic() - started > 5:
                    break
        assert time.monotonic() - started < 5
        with contextlib.suppress(ConnectionError):
            assert error_of(sock.recv(4096))[0] == 408


def test_a_connection_that_says_nothing_is_closed(hasty: Live) -> None:
    """Row 32."""
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as sock:
        assert sock.recv(4096) == b""


def test_a_connection_is_closed_when_it_has_been_idle(hasty: Live) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        while piece := sock.recv(4096):
            received += piece
        assert received.startswith(b"HTTP/1.1 200")


def test_a_second_head_on_a_connection_has_its_own_time(hasty: Live) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as sock:
        for _ in range(3):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            while not received.endswith(b"}"):
                received += sock.recv(4096)
            assert received.startswith(b"HTTP/1.1 200")
            time.sleep(0.2)
        sock.sendall(b"GET /health HTTP/1.1\r\nHo")
        assert error_of(sock.recv(4096))[0] == 408


def test_a_body_that_never_ends_is_given_up(hasty: Live) -> None:
    """Row 32."""
    answer = raw_exchange(hasty.port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n4\r\n{   \r\n")
    status, error = error_of(answer)
    assert (status, error["code"]) == (408, "timeout")


@pytest.fixture(scope="module")
def guarded(long_model: Model) -> Iterator[Live]:
    with live_server(long_model, ServerSettings(api_keys=("sk-only-key",))) as running:
        yield running


def answered_early(live: Live, length: int, *more: bytes) -> socket.socket:
    """A connection whose request was refused for its head alone, and what may have followed."""
    sock = socket.create_connection(("127.0.0.1", live.port), timeout=10)
    sock.sendall(HEAD + b"Content-Length: %d\r\n%s\r\n" % (length, b"".join(more)))
    assert_refused(sock)
    return sock


def assert_refused(sock: socket.socket) -> None:
    received = b""
    while not received.endswith(b"}}"):
        piece = sock.recv(4096)
        assert piece, received
        received += piece
    assert error_of(received)[0] == 401


def seconds_until_closed(sock: socket.socket) -> float:
    started = time.monotonic()
    with contextlib.suppress(ConnectionError):
        assert sock.recv(4096) == b"", "nothing comes unasked"
    return time.monotonic() - started


@pytest.mark.parametrize("sent", [0, 1, 5000])
def test_a_connection_that_owes_the_rest_of_a_body_does_not_stay(guarded: Live, sent: int) -> None:
    """Row 32."""
    with answered_early(guarded, 1_000_000) as sock:
        sock.sendall(b"x" * sent)
        assert seconds_until_closed(sock) < 8
    wait_until(lambda: not guarded.server.server_state.connections)


def test_a_body_that_trickles_in_behind_its_answer_is_cut_off(guarded: Live) -> None:
    """Row 32."""
    with answered_early(guarded, 1_000_000) as sock:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 10:
                sock.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() - started < 8


def test_a_body_that_ends_soon_after_its_answer_leaves_a_good_connection(guarded: Live) -> None:
    with answered_early(guarded, 200_000) as sock:
        for _ in range(2):
            sock.sendall(b"x" * 199_999)
            time.sleep(0.1)
            sock.sendall(b"x" + HEAD)
            time.sleep(0.1)
            sock.sendall(b"Content-Length: 200000\r\n\r\n")
            assert_refused(sock)
        sock.sendall(b"x" * 200_000)
        time.sleep(2.5)  # longer than the rest of a body may take
        sock.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
        assert_refused(sock)


def test_what_follows_a_body_behind_its_answer_has_a_heads_time(long_model: Model) -> None:
    impatient = ServerSettings(api_keys=("sk-only-key",), header_timeout_s=0.3)
    with live_server(long_model, impatient) as live, answered_early(live, 10) as sock:
        sock.sendall(b"x" * 10)
        assert seconds_until_closed(sock) < 2


def test_a_broken_body_behind_its_answer_ends_the_connection(guarded: Live) -> None:
    """Row 31."""
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as sock:
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        assert_refused(sock)
        sock.sendall(b"no number\r\n")
        assert seconds_until_closed(sock) < 1


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_stops_well_with_a_body_owed_to_it(
    long_model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    with live_server(long_model, ServerSettings(api_keys=("sk-only-key",))) as live:
        sock = answered_early(live, 1_000_000)
        sock.sendall(b"x")
        started = time.monotonic()
    with sock:
        assert seconds_until_closed(sock) < 1
    assert time.monotonic() - started < 5
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_takes_nothing_loses_its_connection(hasty: Live, stream: bool) -> None:
    """Row 47: it need not read to be told so."""
    body = json.dumps({"model": hasty.model, **LARGE, "stream": stream}).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", hasty.port))
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        gone = select.poll()
        gone.register(sock, select.POLLRDHUP)
        assert gone.poll(20_000), "the connection is still there"
    wait_until(lambda: not hasty.server.server_state.connections)


def test_a_client_that_reads_slowly_gets_its_whole_answer(hasty: Live) -> None:
    """Row 47: slower than the limit for taking nothing, and never that long without taking any."""
    body = json.dumps({"model": hasty.model, **LARGE}).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.connect(("127.0.0.1", hasty.port))
        sock.settimeout(20)
        sock.sendall(HEAD + b"Connection: close\r\n")
        sock.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        received, started = bytearray(sock.recv(65536)), time.monotonic()
        while piece := sock.recv(2**19):
            received += piece
            if time.monotonic() - started < 4:
                time.sleep(0.1)
    head, _, answer = bytes(received).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert len(json.loads(answer)["choices"]) == 16


def test_a_client_that_hardly_reads_loses_its_answer_and_nobody_elses(hasty: Live) -> None:
    """Row 47: what waits for it is bounded."""
    body = json.dumps(
        {
            "model": hasty.model,
            "prompt": "The",
            "max_tokens": 8000,
            "ignore_eos": True,
            "stream": True,
            "logprobs": 20,  # large pieces fill the system's own buffers sooner
        }
    ).encode()
    aborted = hasty.engine.stats().finished.get("abort", 0)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", hasty.port))
    try:
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        sock.recv(1)
        wait_until(lambda: hasty.engine.stats().running == 1)
        assert hasty.complete(max_tokens=5, ignore_eos=True).status == 200
        wait_until(lambda: idle(hasty), seconds=60)
        assert hasty.engine.stats().finished["abort"] == aborted + 1
    finally:
        sock.close()
    assert hasty.complete(max_tokens=5, ignore_eos=True).status == 200
