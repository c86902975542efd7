"""A real server on a real socket, with a real engine, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from typing import Any

from halfweave.runtime.engine import Engine
from halfweave.runtime.engine_settings import EngineSettings
from halfweave.runtime.model import Model
from halfweave.runtime.turns import Turns
from halfweave.server.app import create_app
from halfweave.server.serve import Server, open_socket
from halfweave.server.service import Activity, Served
from halfweave.server.settings import ServerSettings
from openai import AsyncOpenAI, OpenAI

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    """What came back over the wire."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The nested error object, checked to have exactly OpenAI's keys."""
        error: dict[str, Any] = self.json["error"]
        assert set(self.json) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """The data of every event, parsed but for the final [DONE]; comments are left out."""
        frames = self.body.decode().split("\n\n")
        assert frames.pop() == "", "a stream ends with a whole event"
        data = [frame.removeprefix("data: ") for frame in frames if not frame.startswith(":")]
        return [item if item == "[DONE]" else json.loads(item) for item in data]


@dataclass(frozen=True)
class Live:
    """A running server, and what is behind it."""

    url: str
    port: int
    model: str
    engine: Engine
    activity: Activity
    server: Server

    def client(self) -> OpenAI:
        """The official client at its strictest, without retries that would hide errors."""
        return OpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=60,
            _strict_response_validation=True,
        )

    def async_client(self) -> AsyncOpenAI:
        """The same, asynchronous."""
        return AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=60,
            _strict_response_validation=True,
        )

    def post(self, path: str, document: Any, headers: dict[str, str] | None = None) -> Answer:
        """POST a JSON document."""
        return self.send("POST", path, json.dumps(document).encode(), {**JSON, **(headers or {})})

    def complete(self, **fields: Any) -> Answer:
        """POST a completion of this model."""
        return self.post("/v1/completions", {"model": self.model, "prompt": "The", **fields})

    def chat(self, **fields: Any) -> Answer:
        """POST a chat with this model."""
        turns = [{"role": "user", "content": "Hello"}]
        document = {"model": self.model, "messages": turns, "max_tokens": 4, **fields}
        return self.post("/v1/chat/completions", document)

    def get(self, path: str) -> Answer:
        """GET a path."""
        return self.send("GET", path)

    def send(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Answer:
        """Send bytes as they are."""
        connection = self.begin(method, path, body, headers)
        try:
            return read(connection.getresponse())
        finally:
            connection.close()

    def begin(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> HTTPConnection:
        """Send a request, and leave its answer to be read, or not."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers or {})
        return connection

    def begin_completion(self, **fields: Any) -> HTTPConnection:
        """Send a completion request, and leave its answer to be read, or not."""
        document = {"model": self.model, "prompt": "The", **fields}
        return self.begin("POST", "/v1/completions", json.dumps(document).encode(), JSON)


def read(response: HTTPResponse) -> Answer:
    """All of an answer."""
    body = response.read()
    return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, body)


@contextmanager
def live_server(
    model: Model,
    settings: ServerSettings | None = None,
    running: EngineSettings | None = None,
    name: str | None = None,
    beside: Model | None = None,
) -> Iterator[Live]:
    """Serve `model` on a free port until the block ends; and another one `beside` it."""
    settings, activity, turn = settings or ServerSettings(), Activity(), Turns()
    models = [model] if beside is None else [model, beside]
    served = [Served(each.name, Engine(each, running, turn)) for each in models]
    served[0] = Served(name or model.name, served[0].engine)
    sock = open_socket("127.0.0.1", 0)
    server = Server(create_app(served, settings, activity), served, activity, settings)
    ready = threading.Event()
    server.on_ready = lambda _: ready.set()
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    assert ready.wait(30)
    port = sock.getsockname()[1]
    try:
        yield Live(
            f"http://127.0.0.1:{port}", port, served[0].name, served[0].engine, activity, server
        )
    finally:
        server.should_exit = True
        thread.join(30)
        for each in served:
            each.engine.close()
            each.engine._scheduler.pool.check_integrity()
            assert each.engine.stats().pages_used == 0, "a request left pages behind"
        sock.close()


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def idle(live: Live) -> bool:
    """Whether nothing waits, runs, holds pages, or is being answered."""
    stats = live.engine.stats()
    return stats.waiting == stats.running == stats.pages_used == live.activity.in_flight == 0


def raw_exchange(port: int, data: bytes) -> bytes:
    """Send bytes on a fresh connection; everything that comes back until it is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(data)
        received = b""
        while piece := sock.recv(65536):
            received += piece
        return received


def run(coroutine: Any) -> Any:
    """Run one asynchronous test body."""
    return asyncio.run(coroutine)
