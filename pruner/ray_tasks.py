"""The pruner's tasks on Ray: workers on this machine, or those of a cluster.

Ray does a task again when its worker dies. A task's threads are as many as this process computes
with, since another number sums floats in another order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .. import __version__
from ..errors import HalfweaveError, RefusedError, UsageError

T = TypeVar("T")
LOCAL = "local"  # workers of this run's own, on this machine
_RETRIES = 3


@dataclass(frozen=True)
class OnRay:
    """Tasks for the workers of a Ray that is up; see `on_ray`."""

    workers: int
    threads: int
    _remote: Any

    def share(self, value: T) -> T:
        """A reference: the value is handed over once."""
        import ray

        reference: Any = ray.put(value)
        return reference  # type: ignore[no-any-return]

    def submit(self, function: Callable[..., T], *args: Any) -> Callable[[], T]:
        """Queue a task; the result's errors are those of the function."""
        reference = self._remote.remote(self.threads, function, *args)
        return lambda: _result(reference)


@contextmanager
def on_ray(address: str) -> Iterator[OnRay]:
    """Within, Ray is up: of `address`, "auto" for a cluster that runs here, or `LOCAL`.

    Raises:
        UsageError: Ray is not installed, or there is no such cluster.
        RefusedError: the cluster's workers have other versions.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("Ray is not installed", "pip install 'halfweave[ray]'") from error
    threads = torch.get_num_threads()
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if address == LOCAL:
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"no Ray at {address!r}: {str(error).splitlines()[0]}",
            f"--ray {LOCAL} starts one here",
        ) from error
    try:
        # A task computes on one machine, however many there are.
        rooms = {
            node["NodeID"]: int(node["Resources"].get("CPU", 0)) // threads for node in _alive()
        }
        workers = sum(rooms.values())
        if workers < 1:
            raise UsageError(
                f"no machine of Ray has the {threads} CPUs that a task computes with",
                f"OMP_NUM_THREADS=1 halfweave prune ... --ray {address}",
            )
        run, how = ray.remote(_run), {"num_cpus": threads, "max_retries": _RETRIES}
        tasks = OnRay(workers, threads, run.options(**how))
        asked = [
            run.options(**how, **_only_on(node)).remote(threads, _versions)
            for node, room in rooms.items()
            if room
        ]
        for answer in asked:
            _check_versions(_result(answer))
        yield tasks
    finally:
        ray.shutdown()


def _alive() -> list[Any]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _only_on(node: str) -> dict[str, Any]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _run(threads: int, function: Callable[..., T], *args: Any) -> T:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return function(*args)


def _versions() -> tuple[str, str]:
    return __version__, torch.__version__


def _check_versions(theirs: tuple[str, str]) -> None:
    ours = _versions()
    if theirs != ours:
        raise RefusedError(
            f"Ray's workers have halfweave {theirs[0]} and torch {theirs[1]}, not {ours[0]} and "
            f"{ours[1]}: they would compute something else",
            "install the same versions on all machines",
        )


def _result(reference: Any) -> Any:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise HalfweaveError(
            f"Ray could not do a task: {str(error).splitlines()[0]}",
            "the same command with --resume goes on from the last finished block",
        ) from error
