"""Many replicas of the server behind one port, on Ray Serve.

Each replica is a process that loads the models, makes engines and answers with the very
application of app.py. Ray starts the replicas, hands every request to one of them, and makes a new
one where one dies. So /metrics, /ready and the queue are those of the replica that was asked, which
is named in `x-halfweave-replica`; prefixes are shared within a replica only.

Neither torch nor ray is imported before it is needed.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import HalfweaveError, UsageError
from .ray_answers import proxy_middlewares
from .ray_replica import FLUSH_S, Plan, Replica

_log = logging.getLogger(__name__)
_NAME = "halfweave"
_ANSWERS = f"{proxy_middlewares.__module__}:{proxy_middlewares.__name__}"
_OPERATORS = 32  # requests beside those that an engine takes: its 429s, health, metrics
_LAST_BYTES_S = 0.5  # what replicas have sent is still on its way through a proxy
_STORE_BYTES = 2**27  # answers pass in small pieces; Ray would take a third of the memory
# Ray would log whole tracebacks; replicas and proxies say in a line what happens to them.
_QUIET = {"log_level": "CRITICAL", "enable_access_log": False}


@dataclass(frozen=True)
class Scale:
    """How many replicas there are, and where.

    Attributes:
        replicas: that always run.
        max_replicas: that run at most, more of them the more is asked; None for no more.
        address: of a running Ray cluster. None starts a Ray that ends with the server.

    Raises:
        UsageError: there would be no replica, or fewer at most than always.
    """

    replicas: int
    max_replicas: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= self.most:
            raise UsageError(f"{self.replicas} to {self.most} replicas cannot be run")

    @property
    def most(self) -> int:
        """Replicas that may run at the same time."""
        return self.replicas if self.max_replicas is None else self.max_replicas


def serve_replicas(
    plan: Plan, scale: Scale, host: str, port: int, on_ready: Callable[[str], None]
) -> None:
    """Answer HTTP with several replicas until SIGTERM or SIGINT; then return.

    As `serve.serve`: the first signal refuses new work and lets answers finish, the second ends at
    once, port 0 takes a free one, and `on_ready` is called with the URL. On a cluster, the models
    lie at the same paths on every node, and a Serve that runs there already keeps its address.

    Raises:
        UsageError: an impossible host, port or device.
        HalfweaveError: Ray is missing, the address is in use, or a replica cannot start.
        SystemExit: a second signal came; the status is 128 plus its number.
    """
    if scale.address is None:
        port = _free_port(host, port)
    stop = _Stop()
    ray, ray_serve = _import_ray(local=scale.address is None)
    _connect(ray, plan, scale)
    try:
        idle_s = math.ceil(plan.settings.idle_timeout_s)
        http = {"host": host, "port": port, "keep_alive_timeout_s": idle_s}
        ray_serve.start(http_options=http, logging_config=_QUIET)
        handle = _deploy(ray_serve, plan, scale)
        stop.listen()
        on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        stop.wait()
        _drain(handle, plan.settings.drain_s)
    finally:
        if scale.address is not None:
            ray_serve.delete(_NAME, _blocking=not stop.twice)
        ray.shutdown()


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Nobody wants to hear that it is taken after a minute."""
    from .serve import open_socket

    with open_socket(host, port) as sock:
        free: int = sock.getsockname()[1]
        return free


def _import_ray(local: bool) -> tuple[Any, Any]:
    """Ray and Ray Serve, with settings that they read once, when they are imported."""
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",  # two lines may well be the same
        "RAY_COLOR_PREFIX": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": _ANSWERS,
    }
    if local:
        os.environ |= {
            # Made for other systems; here it keeps Ray's own ports on the loopback address.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # Whoever reaches a port of Ray's could run code here, and replicas' listen everywhere.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
    try:
        import ray
        from ray import serve
    except ImportError as error:
        message = "replicas need Ray, which is not installed"
        raise HalfweaveError(message, 'pip install "halfweave[ray]"') from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return ray, serve


def _connect(ray: Any, plan: Plan, scale: Scale) -> None:
    """Join a cluster, or start a Ray with exactly the cores that the replicas want."""
    if scale.address is None:
        ray.init(
            "local",
            num_cpus=scale.most * plan.threads,
            object_store_memory=_STORE_BYTES,
            include_dashboard=False,
            logging_level=logging.WARNING,
        )
        return
    try:
        ray.init(scale.address, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise HalfweaveError(f"no Ray can be used at {scale.address}: {error}") from error


def _deploy(ray_serve: Any, plan: Plan, scale: Scale) -> Any:
    """A handle on the replicas, once they all answer."""
    each = plan.running.max_running + plan.running.max_waiting
    ongoing = len(plan.offers) * each + _OPERATORS
    deployment = ray_serve.deployment(
        ray_serve.ingress()(Replica),
        name="replica",
        ray_actor_options={
            "num_cpus": plan.threads,
            "num_gpus": int(plan.loading.device == "cuda"),
        },
        autoscaling_config={
            "min_replicas": scale.replicas,
            "max_replicas": scale.most,
            "target_ongoing_requests": plan.running.max_running,
        },
        # More than its engines take, so that they refuse what is too much; and as much again may
        # be on its way to a replica, or wait while none is there.
        max_ongoing_requests=ongoing,
        max_queued_requests=scale.most * ongoing,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=plan.settings.drain_s + FLUSH_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=1,
        max_constructor_retry_count=2,
        logging_config=_QUIET,
    )
    # Replicas may be started in another directory than this.
    offers = [replace(offer, path=Path(offer.path).resolve()) for offer in plan.offers]
    try:
        app = deployment.bind(replace(plan, offers=offers))
        return ray_serve.run(app, name=_NAME, route_prefix="/")
    except RuntimeError as error:
        raise HalfweaveError(f"no replica can start: {_reason(ray_serve) or error}") from error


def _reason(ray_serve: Any) -> str:
    """What a replica raised: the last line of what Ray says about it."""
    app = ray_serve.status().applications.get(_NAME)
    said = [each.message for each in app.deployments.values()] if app else []
    return said[0].splitlines()[-1] if said and said[0] else ""


def _drain(handle: Any, seconds: float) -> None:
    """Let every replica refuse new work and finish what it has."""
    try:
        handle.broadcast("drain").results(timeout_s=seconds + 2 * FLUSH_S)
    except Exception:  # one that died in the meantime has nothing left to finish
        _log.exception("not every replica could be drained")
    time.sleep(_LAST_BYTES_S)


class _Stop:
    """Asked for by a first signal; a second one does not wait."""

    def __init__(self) -> None:
        self._asked = False
        self.twice = False

    def listen(self) -> None:
        """From now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._take)

    def wait(self) -> None:
        """Return after the first signal."""
        while not self._asked:
            time.sleep(0.1)  # an Event, set by a handler, can deadlock with its own wait

    def _take(self, number: int, _: FrameType | None) -> None:
        if self._asked:
            self.twice = True
            raise SystemExit(128 + number)
        self._asked = True
