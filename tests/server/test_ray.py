"""Replicas on Ray Serve: they answer as one process does, and outlive each other.

One service for the whole file, a real `halfweave serve --replicas 2`: Ray takes its time to start.
The last test stops it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from halfweave.errors import EngineDeadError
from halfweave.runtime.engine_settings import EngineSettings
from halfweave.runtime.model import LoadSettings, Model
from halfweave.server.ray_answers import proxy_middlewares
from halfweave.server.ray_replica import Plan, Replica
from halfweave.server.serve import Offer
from halfweave.server.settings import ServerSettings
from starlette.types import Message
from support.command import Command
from support.http_server import JSON, Answer, live_server, read, run, wait_until

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason='needs Ray: pip install "halfweave[ray]"'
)
KEY = "a key of this test"
PROGRAM = "from halfweave.cli import main; main()"
LIMITS = ("--max-num-seqs", "8", "--max-waiting", "8", "--threads", "1")  # 32 requests in all
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
LASTING: dict[str, Any] = {"temperature": 0, "max_tokens": 2000, "ignore_eos": True}
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@dataclass(frozen=True)
class Service:
    """The process under test."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    def begin(
        self, path: str, document: Any = None, headers: dict[str, str] | None = None
    ) -> HTTPConnection:
        """Send a request with a key, and leave its answer to be read."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"Authorization": f"Bearer {KEY}", **JSON, **(headers or {})}
        if document is None:
            connection.request("GET", path, headers=sent)
        else:
            connection.request("POST", path, json.dumps(document), sent)
        return connection

    def ask(self, path: str, document: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """Send a request with a key, and read its answer."""
        return read(self.begin(path, document, headers).getresponse())

    def complete(self, prompt: str = "The", **fields: Any) -> Answer:
        """A completion, whole or streamed."""
        return self.ask("/v1/completions", {"model": "long", "prompt": prompt, **fields})

    def begin_completion(self, **fields: Any) -> HTTPConnection:
        """The same, not yet answered."""
        return self.begin("/v1/completions", {"model": "long", "prompt": "The", **fields})

    @property
    def replicas(self) -> dict[str, int]:
        """Names and process ids of the replicas that live, as they wrote them to the log."""
        found = re.findall(r'{"replica": "(\w+)", "pid": (\d+)}', self.log.read_text())
        return {name: int(pid) for name, pid in found if _alive(int(pid))}


@pytest.fixture(scope="module")
def service(long_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    log = tmp_path_factory.mktemp("ray") / "log"
    command = [sys.executable, "-c", PROGRAM, "serve", str(long_model.checkpoint.path)]
    command += ["--replicas", "2", "--port", "0", "--api-key", KEY, *LIMITS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        )
    try:
        assert process.stdout is not None
        told = re.match(r"serving long at http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert told, log.read_text()
        running = Service(process, int(told[1]), log)
        wait_until(lambda: len(running.replicas) == 2)
        yield running
    finally:
        for pid in [process.pid, *_descendants(process.pid)]:
            if _alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@needs_ray
def test_every_replica_answers_as_one_process_does(service: Service, long_model: Model) -> None:
    prompts = [f"Two weights of every {word}" for word in ("four", "three", "two", "one")] * 4
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda prompt: service.complete(prompt, **GREEDY), prompts))
    with live_server(long_model) as one:
        expected = {
            prompt: one.complete(prompt=prompt, **GREEDY).json["choices"] for prompt in {*prompts}
        }
    assert [answer.json["choices"] for answer in answers] == [
        expected[prompt] for prompt in prompts
    ]
    assert {answer.headers["x-halfweave-replica"] for answer in answers} == {*service.replicas}


@needs_ray
def test_a_stream_arrives_while_it_is_written(service: Service) -> None:
    begun = time.monotonic()
    response = service.begin_completion(**LASTING, stream=True).getresponse()
    arrivals, body = [], b""
    while piece := response.read1():
        arrivals.append(time.monotonic() - begun)
        body += piece
    assert len(arrivals) > 100
    assert arrivals[0] < arrivals[-1] / 4
    *chunks, done = Answer(response.status, {}, body).events
    assert done == "[DONE]"
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == service.complete(**LASTING).json["choices"][0]["text"]


@needs_ray
@pytest.mark.parametrize(("given", "kept"), [("mine-1", True), ("not harmless!", False)])
def test_an_answer_has_one_request_id(service: Service, given: str, kept: bool) -> None:
    response = service.begin("/v1/models", headers={"X-Request-Id": given}).getresponse()
    (request_id,) = response.headers.get_all("x-request-id")
    assert (request_id == given) is kept
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", request_id)


@needs_ray
def test_errors_keep_the_shape_that_clients_know(service: Service) -> None:
    wrong = service.complete(bogus=1)
    assert (wrong.status, wrong.error["code"]) == (400, "unsupported_parameter")
    unknown = service.ask("/v1/completions", {"model": "other", "prompt": "The"})
    assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")
    nowhere = service.ask("/nowhere")
    assert (nowhere.status, nowhere.error["code"]) == (404, "unknown_url")
    large = service.complete("x" * 2**21)
    assert (large.status, large.error["code"]) == (413, "request_too_large")


@needs_ray
def test_keys_health_and_figures_are_each_replicas_own(service: Service) -> None:
    stranger = {"Authorization": "Bearer another key"}
    refused = service.ask("/v1/models", headers=stranger)
    assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
    for path in ("/health", "/ready"):
        assert service.ask(path, headers=stranger).json == {"status": "ok"}
    assert "halfweave_" in service.ask("/metrics").body.decode()


@needs_ray
def test_what_the_queues_do_not_take_is_answered_429(service: Service) -> None:
    with ThreadPoolExecutor(60) as clients:
        brief = {**LASTING, "max_tokens": 300}
        answers = list(clients.map(lambda _: service.complete(**brief), range(60)))
    refused = [answer for answer in answers if answer.status != 200]
    assert 0 < len(refused) <= 60 - 16
    for answer in refused:
        assert (answer.status, answer.error["code"]) == (429, "queue_full")
        assert answer.headers["retry-after"]


@needs_ray
@pytest.mark.parametrize("extra", [{}, {"X-Request-Disconnect-Disabled": "?1"}])
def test_clients_that_leave_end_their_requests(service: Service, extra: dict[str, str]) -> None:
    """Also those that ask Ray, by a header, to go on without them."""
    document = {"model": "long", "prompt": "The", **LASTING, "max_tokens": 8000, "stream": True}
    names = [f"left-{len(extra)}-{number}" for number in range(8)]
    for name in names:
        connection = service.begin("/v1/completions", document, {"X-Request-Id": name, **extra})
        response = connection.getresponse()
        response.read(100)
        response.close()
        connection.close()

    def told() -> list[str]:
        lines = service.log.read_text().splitlines()
        return [line for line in lines if f'"request_id": "left-{len(extra)}' in line]

    wait_until(lambda: len(told()) >= len(names))
    assert all('"abort": 1' in line for line in told())
    assert "Traceback" not in service.log.read_text()


@needs_ray
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nobody_else_can_reach_ray(service: Service) -> None:
    """Ray runs what it is sent, so its ports are for this machine, or for those with its token."""
    import grpc

    pids = _descendants(service.process.pid)
    assert {*service.replicas.values()} <= {*pids}
    open_ports = [
        port for pid in pids for address, port in _listening(pid) if address not in LOOPBACK
    ]
    assert len(open_ports) == len(service.replicas)
    for port in open_ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@needs_ray
def test_a_killed_replica_takes_only_its_own_requests_with_it(service: Service) -> None:
    streams = [service.begin_completion(**LASTING, stream=True).getresponse() for _ in range(8)]
    whole = [service.begin_completion(**LASTING) for _ in range(4)]
    served_by = [stream.headers["x-halfweave-replica"] for stream in streams]
    before, victim = service.replicas, served_by[0]
    assert {*served_by} == {*before}
    os.kill(before[victim], signal.SIGKILL)
    with ThreadPoolExecutor(3) as clients:  # nobody asks twice
        later = list(clients.map(lambda _: service.complete(**GREEDY), range(12)))
    for replica, stream in zip(served_by, streams, strict=True):
        *_, last, done = read(stream).events
        assert done == "[DONE]"
        if replica == victim:
            assert last["error"]["code"] == "replica_died"
        else:
            assert last["choices"][0]["finish_reason"] == "length"
    for answer in (read(connection.getresponse()) for connection in whole):
        assert answer.status == 200 or answer.error["code"] == "replica_died"
    assert [answer.status for answer in later] == [200] * 12
    assert victim not in {answer.headers["x-halfweave-replica"] for answer in later}


@needs_ray
def test_replicas_take_the_place_of_killed_ones(service: Service) -> None:
    wait_until(lambda: len(service.replicas) == 2, seconds=60)  # after the test before this
    killed = service.replicas
    for pid in killed.values():
        os.kill(pid, signal.SIGKILL)
    assert service.complete(**GREEDY).status == 200  # waits until there is somebody to answer
    wait_until(lambda: len(service.replicas) == 2, seconds=60)
    assert not {*service.replicas} & {*killed}

    def both_answer() -> bool:
        answers = [service.ask("/ready") for _ in range(8)]
        return {answer.headers["x-halfweave-replica"] for answer in answers} == {*service.replicas}

    wait_until(both_answer)


@needs_ray
def test_sigterm_lets_answers_finish_and_leaves_nothing_behind(service: Service) -> None:
    response = service.begin_completion(**LASTING, stream=True).getresponse()
    processes = _descendants(service.process.pid)
    service.process.send_signal(signal.SIGTERM)
    wait_until(lambda: service.ask("/ready").status == 503)
    refused = service.complete()
    assert (refused.status, refused.error["code"]) == (503, "draining")
    *chunks, done = read(response).events
    assert done == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert service.process.wait(30) == 0
    wait_until(lambda: not any(map(_alive, processes)))


@needs_ray
def test_a_replica_is_as_well_as_its_engine(
    long_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: context)
    offer = Offer(long_model.checkpoint.path, "long")
    replica = Replica(Plan([offer], LoadSettings(), EngineSettings(), ServerSettings()))
    run(replica.check_health())
    replica._served[0].engine.close()
    with pytest.raises(EngineDeadError):
        run(replica.check_health())


def test_without_ray_replicas_say_what_to_install(
    halfweave: Command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    ran = halfweave("serve", tiny_model, "--replicas", "2", "--port", "0")
    assert ran.code == 1
    assert 'pip install "halfweave[ray]"' in ran.err


@pytest.mark.parametrize("words", [("--max-replicas", "1"), ("--device", "cuda:1")])
def test_impossible_replicas_are_usage_errors(
    halfweave: Command, tiny_model: Path, words: tuple[str, str]
) -> None:
    assert halfweave("serve", tiny_model, "--replicas", "2", *words).code == 2


START = {"type": "http.response.start", "status": 200, "headers": []}
PLAIN = {"type": "http.response.body", "body": b"Ray's own words"}


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (404, (503, "no_replica")),
        (408, (408, "timeout")),
        (429, (429, "queue_full")),
        (503, (503, "no_replica")),
        (None, (503, "replica_died")),
    ],
)
def test_what_ray_answers_itself_gets_the_shape_of_the_rest(
    status: int | None, told: tuple[int, str]
) -> None:
    answer = through_proxy([] if status is None else [{**START, "status": status}, PLAIN])
    assert (answer.status, answer.error["code"]) == told
    assert answer.headers["x-request-id"] == "mine"


def test_ray_writes_and_returns_no_request_id_that_might_do_harm() -> None:
    assert through_proxy([], "not harmless!").headers["x-request-id"].startswith("req-")


def test_a_stream_that_breaks_off_ends_with_an_error_event() -> None:
    headers = [(b"content-type", b"text/event-stream"), (b"x-halfweave-replica", b"one")]
    begun = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
    answer = through_proxy([{**START, "headers": headers}, begun])
    assert answer.status == 200
    first, error, done = answer.events
    assert (first, done) == ({}, "[DONE]")
    assert error["error"]["code"] == "replica_died"


def through_proxy(messages: list[Message], request_id: str = "mine") -> Answer:
    """What a client gets when one of Ray's proxies sends these."""
    sent: list[Message] = []

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send({**message, "headers": [*message.get("headers", ())]})

    async def send(message: Message) -> None:
        sent.append(message)

    (middleware,) = proxy_middlewares()
    scope = {
        "type": "http",
        "path": "/v1/models",
        "headers": [(b"x-request-id", request_id.encode())],
    }
    run(middleware.cls(proxy)(scope, None, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], headers, b"".join(message["body"] for message in sent[1:]))


def _alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _descendants(pid: int) -> list[int]:
    """The processes that one started, directly or not."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = children.get(pid, [])
    return found + [below for child in found for below in _descendants(child)]


def _listening(pid: int) -> list[tuple[str, int]]:
    """Addresses, as the kernel writes them, and ports at which a process takes TCP connections."""
    sockets = set()
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            sockets.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    here = [row[1].partition(":") for row in rows if row[3] == "0A" and row[9] in sockets]
    return [(address, int(port, 16)) for address, _, port in here]
