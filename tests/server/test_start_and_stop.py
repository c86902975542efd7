"""From the address to the last answer: what starting and stopping a server promise (row 52)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from http.client import HTTPConnection
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from halfweave.errors import CapacityError, EngineDeadError, HalfweaveError, UsageError
from halfweave.runtime.model import LoadSettings, Model
from halfweave.runtime.scheduler import Work
from halfweave.runtime.step import Stepper, StepResult
from halfweave.server.serve import Offer, open_socket, serve, serve_all, url_of
from halfweave.server.settings import ServerSettings
from support.http_server import JSON, Answer, Live, live_server, read, wait_until

LASTING: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True, "stream": True}
FOREVER: dict[str, Any] = {"max_tokens": 8000, "ignore_eos": True, "stream": True}
PROGRAM = """
import sys, torch
from halfweave.server.serve import Offer, serve
torch.set_num_threads(1)
serve([Offer(sys.argv[1])], port=0, on_ready=lambda url: print(url, flush=True))
"""


@pytest.fixture
def brief(long_model: Model) -> Iterator[Live]:
    """A server that gives answers half a second to finish once it must stop."""
    with live_server(long_model, ServerSettings(drain_s=0.5)) as running:
        yield running


@pytest.fixture
def patient(long_model: Model) -> Iterator[Live]:
    with live_server(long_model) as running:
        yield running


@contextlib.contextmanager
def server_process(directory: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server in a process of its own, and its port."""
    command = [sys.executable, "-c", PROGRAM, str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        yield process, int(url.rpartition(":")[2])
    finally:
        process.kill()
        process.wait()


def ask(port: int, **fields: Any) -> HTTPConnection:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    document = {"model": "long", "prompt": "The", **fields}
    connection.request("POST", "/v1/completions", json.dumps(document), JSON)
    return connection


def serve_while(directory: Path, use: Callable[[int], None]) -> None:
    """`serve` in this thread, which receives the signals, and `use` its port in another."""
    users: list[threading.Thread] = []

    def on_ready(url: str) -> None:
        users.append(threading.Thread(target=use, args=(int(url.rpartition(":")[2]),)))
        users[0].start()

    try:
        serve([Offer(directory)], port=0, on_ready=on_ready)
    finally:
        users[0].join(30)


def test_a_taken_port_is_named_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HalfweaveError, match=f"port {port}.*in use") as caught:
            serve([Offer("/no/such/model")], port=port)
    assert caught.value.exit_code == 1
    assert caught.value.hint


@pytest.mark.parametrize("port", [-1, 65536])
def test_an_impossible_port_is_a_usage_error(port: int) -> None:
    with pytest.raises(UsageError, match=str(port)):
        open_socket("127.0.0.1", port)


def test_an_unknown_host_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"no such host"):
        open_socket("no such host", 0)


def test_until_the_model_is_loaded_clients_are_refused() -> None:
    with open_socket("127.0.0.1", 0) as sock, pytest.raises(ConnectionRefusedError):
        socket.create_connection(sock.getsockname())


def test_the_default_address_is_only_reachable_from_this_machine() -> None:
    with open_socket(signature(serve).parameters["host"].default, 0) as sock:
        assert url_of(sock).startswith("http://127.0.0.1:")


def test_a_draining_server_refuses_new_work_and_finishes_the_old(patient: Live) -> None:
    response = patient.begin_completion(**LASTING).getresponse()
    patient.server.handle_exit(signal.SIGTERM, None)
    refused = patient.complete()
    assert refused.status == 503
    assert refused.error["code"] == "draining"
    assert refused.headers["retry-after"]
    alive, ready = patient.get("/health"), patient.get("/ready")
    assert alive.json == ready.json == {"status": "draining"}
    assert (alive.status, ready.status) == (200, 503)
    *chunks, done = read(response).events
    assert done == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    wait_until(lambda: not _accepts(patient.port))


def test_answers_that_outlast_the_drain_are_ended_with_an_error(brief: Live) -> None:
    response = brief.begin_completion(**FOREVER).getresponse()
    whole = brief.begin_completion(**{**FOREVER, "stream": False})
    wait_until(lambda: brief.engine.stats().running == 2)
    brief.server.handle_exit(signal.SIGINT, None)
    *_, error, done = read(response).events
    assert error["error"]["code"] == "aborted"
    assert done == "[DONE]"
    assert read(whole.getresponse()).status == 503


def test_a_client_that_leaves_does_not_hold_up_the_end(patient: Live) -> None:
    connection = patient.begin_completion(**FOREVER)
    connection.getresponse().read(100)
    patient.server.handle_exit(signal.SIGTERM, None)
    connection.close()
    wait_until(lambda: not _accepts(patient.port), seconds=10)


def test_a_server_whose_engine_died_stops(patient: Live) -> None:
    """Row 51."""
    patient.engine.close()
    wait_until(lambda: not _accepts(patient.port), seconds=10)


def test_models_are_planned_together_told_of_and_counted_from_the_first_client(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as engines, caplog.at_level("INFO", "halfweave"):
        (served,) = serve_all([Offer(tiny_model)], LoadSettings(), None, engines)
        stats, plan = served.engine.stats(), served.engine.memory_plan
    assert (stats.completion_tokens, stats.prompt_tokens, stats.finished) == (0, 0, {})
    assert {"model": served.name, "memory": plan.line} in [
        json.loads(record.message)
        for record in caplog.records
        if record.name == "halfweave.server.serve"
    ]
    room = plan.wanted_bytes * 3 // 2  # for one, not for two
    monkeypatch.setattr("halfweave.runtime.memory.available_memory_bytes", lambda _: room)
    offers = [Offer(tiny_model), Offer(tiny_model, "again")]
    with ExitStack() as engines, pytest.raises(CapacityError, match="for other models"):
        serve_all(offers, LoadSettings(), None, engines)


def test_sigterm_lets_answers_finish_and_serve_return(long_model: Model) -> None:
    answers: list[Answer] = []

    def ask_then_terminate(port: int) -> None:
        response = ask(port, **LASTING).getresponse()
        os.kill(os.getpid(), signal.SIGTERM)
        answers.append(read(response))

    serve_while(long_model.checkpoint.path, ask_then_terminate)
    *chunks, done = answers[0].events
    assert done == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_a_second_signal_ends_the_process_at_once(long_model: Model) -> None:
    with server_process(long_model.checkpoint.path) as (process, port):
        ask(port, **FOREVER).getresponse()
        process.send_signal(signal.SIGINT)
        wait_until(lambda: _ready(port) == 503)
        process.send_signal(signal.SIGINT)
        # Well before the drain's 30 seconds are over, on a busy machine too.
        assert process.wait(20) == 128 + signal.SIGINT


def test_serve_raises_when_its_engine_dies(
    long_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 51: a supervisor must see a failure. The fault is put into the engine's own step."""
    answers: list[Answer] = []

    run = Stepper.run

    def die(stepper: Stepper, work: Sequence[Work]) -> StepResult:
        if work[0].sequence.request.id == "warm-up":
            return run(stepper, work)
        raise SystemExit("the thread's end")

    monkeypatch.setattr(Stepper, "run", die)
    with pytest.raises(EngineDeadError):
        serve_while(
            long_model.checkpoint.path, lambda port: answers.append(read(ask(port).getresponse()))
        )
    assert (answers[0].status, answers[0].error["code"]) == (500, "engine_dead")
    assert answers[0].headers["x-should-retry"] == "false"


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def _ready(port: int) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/ready")
    return connection.getresponse().status
