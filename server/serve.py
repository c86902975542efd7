"""Runs the application on a socket, from loading the models to the last answer.

Knows sockets and signals, not requests.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import math
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import EngineDeadError, HalfweaveError, RequestError, UsageError
from ..runtime.engine import Engine
from ..runtime.engine_settings import EngineSettings
from ..runtime.model import LoadSettings, load_model
from ..runtime.params import SamplingParams
from ..runtime.request import Failed, GenerationRequest
from ..runtime.turns import Turns
from .app import create_app
from .http_protocol import bounded_http
from .service import Activity, Served
from .settings import ServerSettings

_log = logging.getLogger(__name__)
_FLUSH_S = 2


@dataclass(frozen=True)
class Offer:
    """A model to serve: its directory, and the name that requests use; None for its own."""

    path: str | Path
    name: str | None = None


def serve(
    offers: Sequence[Offer],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    loading: LoadSettings | None = None,
    running: EngineSettings | None = None,
    settings: ServerSettings | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Load models and answer HTTP until SIGTERM or SIGINT; then return.

    The first signal refuses new work and lets answers finish, for `settings.drain_s` seconds; the
    second ends at once. Port 0 takes a free one. `on_ready` is called with the server's URL once
    requests are answered. Several models compute in turns, a step each.

    Raises:
        UsageError: an impossible host or port, or two models of one name.
        HalfweaveError: the address is in use; also whatever loading a model raises.
        EngineDeadError: an engine died while serving.
        SystemExit: a second signal came; the status is 128 plus its number.
    """
    settings = settings or ServerSettings()
    # The port first: nobody wants to hear that it is taken after a minute of loading.
    with open_socket(host, port) as sock, ExitStack() as engines:
        served = serve_all(offers, loading or LoadSettings(), running, engines)
        activity = Activity()
        server = Server(create_app(served, settings, activity), served, activity, settings)
        server.on_ready = on_ready
        server.run(sockets=[sock])
        if server.second_signal is not None:
            engines.pop_all()  # not one more step is waited for
            raise SystemExit(128 + server.second_signal)
        died = not all(each.engine.alive for each in served) and not activity.draining
    if died:
        raise EngineDeadError("the engine died; the log says why")


def serve_all(
    offers: Sequence[Offer],
    loading: LoadSettings,
    running: EngineSettings | None,
    engines: ExitStack | None = None,
) -> list[Served]:
    """Load the models and warm them up; their engines end with `engines`, or with the process.

    Raises:
        HalfweaveError: whatever loading a model raises; or it computes nothing of use.
    """
    turn, promised = Turns(), 0
    served: list[Served] = []
    for offer in offers:
        model = load_model(offer.path, **vars(loading))
        engine = Engine(model, running, turn, promised)
        if engines is not None:
            engines.push(engine)
        plan, name = engine.memory_plan, offer.name or model.name
        _log.info("%s", json.dumps({"model": name, "memory": plan.line}))
        promised += engine.promised_bytes
        warm_up(engine)
        engine.count_anew()
        served.append(Served(name, engine))
    # What was loaded stays. Looking through all of it again and again would stop every thread for
    # half a second each time.
    gc.collect()
    gc.freeze()
    return served


def warm_up(engine: Engine) -> None:
    """Run one short request, so that the first client does not wait for what is made only once.

    A chat template is rendered too, which starts the process that renders it.

    Raises:
        HalfweaveError: the model computes nothing of use.
    """
    tokenizer = engine.model.tokenizer
    if tokenizer.has_chat_template:
        with suppress(RequestError):  # a template that dislikes this message may like others
            tokenizer.apply_chat_template([{"role": "user", "content": "halfweave"}])
    prompt = tuple(tokenizer.encode("halfweave")) or (0,)
    limit = min(2, max(0, engine.max_model_len - len(prompt)))
    params = SamplingParams(max_tokens=limit, temperature=0.0, ignore_eos=True)
    request = GenerationRequest("warm-up", prompt[: engine.max_model_len - 1], params)
    for event in engine.stream(request):
        if isinstance(event, Failed):
            raise HalfweaveError(f"{engine.model.name} cannot run: {event.error}") from event.error


def open_socket(host: str, port: int) -> socket.socket:
    """A TCP socket bound to the address, not yet listening: until then clients are refused.

    Raises:
        UsageError: there is no such host or port.
        HalfweaveError: the address is in use, or not allowed.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"port {port} is not between 0 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(f"host {host!r} is unknown: {error}") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _unusable(host, port, error) from error
    return sock


def _unusable(host: str, port: int, error: OSError) -> HalfweaveError:
    return HalfweaveError(
        f"cannot serve on {host} port {port}: {error.strerror}",
        "choose another port, or stop what listens there",
    )


class Server(uvicorn.Server):
    """uvicorn that goes on answering while it drains, and gives up when its engine does."""

    def __init__(
        self,
        app: FastAPI,
        served: Sequence[Served],
        activity: Activity,
        settings: ServerSettings,
    ) -> None:
        super().__init__(_config(app, settings))
        self.on_ready: Callable[[str], None] | None = None
        self.second_signal: int | None = None
        self._engines = [each.engine for each in served]
        self._activity = activity
        self._drain_s = settings.drain_s
        self._deadline: float | None = None

    def drain(self) -> None:
        """Refuse new work; stop once nothing is in flight, or time is up."""
        self._activity.draining = True
        self._deadline = time.monotonic() + self._drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn calls this for SIGINT and SIGTERM."""
        if self._deadline is None:
            self.drain()
        else:
            self.second_signal = sig
            self.should_exit = self.force_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        try:
            await super().startup(sockets)
        except OSError as error:
            # Somebody else bound the same address while this server was loading its model.
            host, port = sockets[0].getsockname()[:2] if sockets else ("?", 0)
            raise _unusable(host, port, error) from error
        if sockets and self.on_ready is not None:
            self.on_ready(url_of(sockets[0]))

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to stop."""
        if await super().on_tick(counter):
            return True
        if not all(engine.alive for engine in self._engines):
            return True
        if self._deadline is None:
            return False
        if time.monotonic() > self._deadline:
            _log.warning("aborting %d requests: time is up", self._activity.in_flight)
            for engine in self._engines:
                await asyncio.to_thread(engine.close)
            return True
        return self._activity.in_flight == 0


def url_of(sock: socket.socket) -> str:
    """What to type to reach a server on this socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=bounded_http(settings.header_timeout_s, settings.send_timeout_s),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=math.ceil(settings.idle_timeout_s),
        timeout_graceful_shutdown=_FLUSH_S,
        h11_max_incomplete_event_size=settings.max_header_bytes,
    )
