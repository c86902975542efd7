"""Bad requests and faults of docs/reliability.md that no other file of tests has."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from halfweave.errors import UsageError
from halfweave.runtime.engine_settings import EngineSettings
from halfweave.runtime.model import Model
from halfweave.runtime.stats import EngineStats
from halfweave.server.serve import open_socket
from halfweave.server.settings import ServerSettings
from support.http_server import (
    JSON,
    Answer,
    Live,
    idle,
    live_server,
    raw_exchange,
    read,
    wait_until,
)

MIB = 2**20
FOREVER: dict[str, Any] = {"max_tokens": 8000, "ignore_eos": True}
TURNS = [{"role": "user", "content": "Hello"}]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc or name spaces")


# ---- bodies as large as they may be


@pytest.fixture(scope="module")
def wide(served_model: Model) -> Iterator[Live]:
    """A server whose operator allows bodies of 16 MiB."""
    with live_server(served_model, ServerSettings(max_body_bytes=16 * MIB)) as running:
        yield running


def keys(pattern: str, size: int) -> str:
    """An object with as many keys as fit a size."""
    numbers = range(size // (len(pattern) + 6))
    return "{" + ",".join(pattern % number for number in numbers) + "}"


LARGE: dict[str, Callable[[], str]] = {
    "arrays in arrays": lambda: "[" * (MIB - 1),
    "objects in objects": lambda: '{"a":' * (MIB // 5),
    "unknown keys": lambda: keys('"%d":1', MIB),
    "keys of a bias that are no tokens": lambda: bias(keys('"x%d":1', MIB - 100)),
    "biases that are no numbers": lambda: bias(keys('"%d":"x"', MIB - 100)),
    "one key again and again": lambda: "{" + '"model":"tiny",' * (MIB // 16) + '"prompt":"x"}',
    "an integer": lambda: '{"model":"tiny","prompt":"x","seed":' + "9" * (MIB - 100) + "}",
    "lists of ids": lambda: '{"model":"tiny","prompt":[' + "[1]," * (MIB // 5) + "[1]]}",
    "stop strings": lambda: '{"model":"tiny","prompt":"x","stop":[' + '"a",' * (MIB // 5) + '"a"]}',
}


def bias(biases: str) -> str:
    return '{"model":"tiny","prompt":"x","logit_bias":' + biases + "}"


@pytest.mark.parametrize("body", LARGE.values(), ids=LARGE.keys())
def test_a_mebibyte_of_nonsense_is_a_short_and_quick_400(
    wide: Live, body: Callable[[], str]
) -> None:
    """Row 31."""
    document = body().encode()
    assert 0.5 * MIB < len(document) <= MIB
    started = time.monotonic()
    answer = wide.send("POST", "/v1/completions", document, JSON)
    assert time.monotonic() - started < 5  # 0.05 where collecting garbage stops nobody
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert len(answer.body) < 4096
    assert wide.complete(max_tokens=1).status == 200


def test_thousands_of_keys_are_refused_as_soon_as_they_are_read(live: Live) -> None:
    """Row 31: else each would be looked into, and its fault written down."""
    answer = live.complete(**{str(number): 1 for number in range(2049)})
    assert answer.status == 400
    assert "2048 keys" in answer.error["message"]
    biases = {str(token % 300): 1 for token in range(300)}
    assert live.complete(logit_bias=biases, max_tokens=1).status == 200


def test_two_hundred_thousand_biases_are_refused(wide: Live, slow: Live) -> None:
    """Row 36: by their size, or by their number."""
    document = {"prompt": "x", "logit_bias": {str(token): 1 for token in range(200_000)}}
    assert asked(slow, document) == (413, "request_too_large")
    assert asked(wide, document) == (400, None)


def test_a_million_token_ids_are_refused_with_both_numbers(wide: Live, slow: Live) -> None:
    """Row 38."""
    document = {"prompt": [5] * 1_000_000}
    assert asked(slow, document) == (413, "request_too_large")
    assert asked(wide, document) == (400, "context_length_exceeded")
    message = wide.complete(**document).error["message"]
    assert "1000000 tokens" in message
    assert str(wide.engine.max_model_len) in message


def asked(live: Live, document: dict[str, Any]) -> tuple[int, str | None]:
    """Status and code of an answer, which is short and comes soon."""
    started = time.monotonic()
    answer = live.complete(**document)
    assert time.monotonic() - started < 5
    assert len(answer.body) < 4096
    return answer.status, answer.error["code"]


# ---- numbers at their bounds

INT = 2**31 - 1
COUNTS: list[tuple[str, str, int, int, dict[str, Any]]] = [
    ("/v1/completions", "n", 1, 16, {}),
    ("/v1/completions", "best_of", 1, 16, {}),
    ("/v1/completions", "max_tokens", 0, INT, {"echo": True}),
    ("/v1/completions", "logprobs", 0, 20, {}),
    ("/v1/completions", "top_k", -1, INT, {}),
    ("/v1/chat/completions", "n", 1, 16, {}),
    ("/v1/chat/completions", "max_tokens", 1, INT, {}),
    ("/v1/chat/completions", "max_completion_tokens", 1, INT, {"max_tokens": None}),
    ("/v1/chat/completions", "top_logprobs", 0, 20, {"logprobs": True}),
]


@LINUX
def test_counts_are_held_to_their_bounds_and_take_no_memory(live: Live) -> None:
    """Row 34: at both caps it is done; one beyond, 2^31 and 2^63 are refused."""
    before: float | None = None
    for _ in range(2):  # the first time, libraries take memory of their own
        for path, field, least, most, more in COUNTS:
            ask = live.complete if path == "/v1/completions" else live.chat
            short = {} if field.startswith("max_") else {"max_tokens": 2}
            for value in (least, most):
                assert ask(**{**short, **more, field: value}).status == 200, (path, field, value)
            for value in (least - 1, most + 1, 2**31, 2**63, -(2**63) - 1):
                answer = ask(**{**short, **more, field: value})
                assert (answer.status, answer.error["param"]) == (400, field), value
        before = before or resident_mib()
    assert resident_mib() < before + 32


def test_more_prompts_than_the_operator_allows_are_refused(wide: Live) -> None:
    """Row 34."""
    for prompts in (33, 1024, 1025, 40_000):
        answer = wide.complete(prompt=["x"] * prompts, max_tokens=1)
        assert (answer.status, answer.error["param"]) == (400, "prompt")
    assert wide.complete(prompt=["x"] * 32, max_tokens=1).status == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 0.0099),
        ("logit_bias", {"1\u0663": 1}),
    ],
)
def test_what_would_be_no_number_inside_is_refused(live: Live, field: str, value: Any) -> None:
    """Rows 35 and 36: a divisor that is zero in 32 bits, digits of another script."""
    answer = live.complete(**{field: value})
    assert answer.status == 400
    assert answer.error["param"].startswith(field)


def test_the_least_repetition_penalty_still_gives_an_answer(live: Live) -> None:
    """Row 35."""
    answer = live.complete(repetition_penalty=0.01, max_tokens=20, ignore_eos=True)
    assert answer.json["choices"][0]["finish_reason"] == "length"


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


# ---- paths and headers


@pytest.mark.parametrize(
    "path", ["/index.html", "/playground.html", "/static/index.html", "/..%2fapp.py", "/.", "/%00"]
)
def test_the_page_is_the_only_file_that_is_served(live: Live, path: str) -> None:
    """Row 44."""
    answer = live.get(path)
    assert (answer.status, answer.error["code"]) == (404, "unknown_url")


@pytest.mark.parametrize(
    "given",
    [b"x\r y", b"x\n y", b"x\r\n y", b"a" * 10_000, b'"}, {"status": 200', b"\x1b[31mred", b"\xff"],
    ids=repr,
)
def test_no_request_id_breaks_a_line_of_the_log(
    live: Live, caplog: pytest.LogCaptureFixture, given: bytes
) -> None:
    """Row 45: it is replaced, or the head is refused before there is anything to log."""
    caplog.set_level(logging.INFO, logger="halfweave.server.request_scope")
    head = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: "
    answer = raw_exchange(live.port, head + given + b"\r\n\r\n")
    assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))
    wait_until(lambda: idle(live))
    lines = [r.getMessage() for r in caplog.records if r.name.endswith("request_scope")]
    assert len(lines) == answer.startswith(b"HTTP/1.1 200 ")
    for line in lines:
        assert json.loads(line)["request_id"].startswith("req-")
        assert line.isprintable()


# ---- four answers of one request


@pytest.fixture(scope="module")
def shared_four(long_model: Model) -> Iterator[Live]:
    settings = EngineSettings(max_running=4, max_waiting=4, tokens_per_step=16)
    with live_server(long_model, running=settings) as running:
        yield running


@pytest.fixture
def four(shared_four: Live) -> Iterator[Live]:
    """A server that runs four at once and lets four more wait; a long prompt lasts there."""
    yield shared_four
    wait_until(lambda: idle(shared_four))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("state", ["queued", "in prefill", "in decode"])
def test_four_answers_of_a_client_that_leaves_all_end(four: Live, state: str, stream: bool) -> None:
    """Row 46: with n=4."""
    stats = four.engine.stats
    with ExitStack() as clients:
        if state == "queued":
            running = four.begin_completion(**FOREVER, n=4, stream=True)
            clients.callback(running.close)
            wait_until(lambda: stats().running == 4)
        before = stats()
        prompt = [9] * 8000 if state == "in prefill" else "The"
        leaving = four.begin_completion(prompt=prompt, n=4, stream=stream, **FOREVER)
        clients.callback(leaving.close)
        wait_until(lambda: REACHED[state](before, stats()))
        leaving.close()
        wait_until(lambda: aborted(stats()) == aborted(before) + 4, seconds=5)
        if state == "queued":
            assert (stats().running, stats().waiting) == (4, 0), "the neighbours go on"
        if state == "in prefill":
            assert stats().completion_tokens == before.completion_tokens


REACHED: dict[str, Callable[[EngineStats, EngineStats], bool]] = {
    "queued": lambda _, now: now.waiting == 4,
    "in prefill": lambda _, now: now.running > 0,
    "in decode": lambda before, now: now.completion_tokens > before.completion_tokens,
}


def aborted(stats: EngineStats) -> int:
    return stats.finished.get("abort", 0)


# ---- a full queue


def test_a_full_queue_is_refused_at_once_and_the_accepted_complete(slow: Live) -> None:
    """Row 48: the engine works meanwhile."""
    running = slow.begin_completion(**FOREVER, stream=True)
    wait_until(lambda: slow.engine.stats().running == 1)
    accepted = [slow.begin_completion(max_tokens=9, ignore_eos=True) for _ in range(2)]
    wait_until(lambda: slow.engine.stats().waiting == 2)
    times = []
    for _ in range(30):
        started = time.perf_counter()
        answer = slow.complete(max_tokens=1)
        times.append(1000 * (time.perf_counter() - started))
        assert (answer.status, answer.error["code"]) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
    print(f"\n429 after {statistics.median(times):.1f} ms (median), {max(times):.1f} ms (most)")
    assert statistics.median(times) < 500  # 20 on a machine that does nothing else
    assert slow.engine.stats().running == 1
    running.close()
    for each in accepted:
        answer = read(each.getresponse())
        assert answer.json["choices"][0]["finish_reason"] == "length"


# ---- starting, and machines that lack something

# `dill`, which evaluation harnesses bring along, does not load without a temporary directory.
SERVE = "import sys; sys.modules['dill'] = None; from halfweave.cli import main; main()"
# No file can be written, little memory is shared, no name is known, and nobody has a home.
POOR = """mount -t tmpfs -o size=64m,ro tmpfs /dev/shm && mount --bind /dev/null /etc/resolv.conf &&
mount --bind /dev/null /etc/hosts && mount -o remount,ro,bind / && unset HOME && """
POOR_MACHINE = ("unshare", "--mount", "sh", "-c", POOR + 'exec "$@"', "sh")
FEW_FILES = ("sh", "-c", 'ulimit -n 64 && exec "$@"', "sh")
STOPPED_WHILE = """
import sys, time
import halfweave.server.serve as serving
def wait(*_, **__):
    print("now", flush=True)
    time.sleep(100)
setattr(serving, sys.argv.pop(1), wait)
from halfweave.cli import main
main()
"""


@dataclass(frozen=True)
class Remote:
    """A server in a process of its own, and one connection to it that stays open."""

    port: int
    model: str
    connection: HTTPConnection

    def ask(self, path: str, **fields: Any) -> Answer:
        document = json.dumps({"model": self.model, "max_tokens": 2, **fields})
        self.connection.request("POST", f"/v1/{path}", document, JSON)
        return read(self.connection.getresponse())


@contextmanager
def served(model: Path, where: Sequence[str]) -> Iterator[Remote]:
    """`halfweave serve` on a machine of some kind."""
    command = [*where, sys.executable, "-c", SERVE, "serve", str(model), "--port", "0", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        port = int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])
        yield Remote(port, model.name, HTTPConnection("127.0.0.1", port, timeout=30))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@LINUX
def test_a_poor_machine_serves_all_the_same(tiny_model: Path) -> None:
    """Row 53: a read-only file system, little shared memory, no names, no home."""
    if subprocess.run([*POOR_MACHINE, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("mounts of its own are not allowed here")
    with served(tiny_model, POOR_MACHINE) as remote:
        assert remote.ask("completions", prompt="The").status == 200
        assert remote.ask("chat/completions", messages=TURNS).status == 200


@LINUX
def test_more_clients_than_files_wait_or_are_refused_and_the_others_served(
    tiny_model: Path,
) -> None:
    """Row 53: 64 file descriptors, and 100 clients."""
    with served(tiny_model, FEW_FILES) as remote:
        assert remote.ask("completions", prompt="The").status == 200
        with ExitStack() as clients:
            for _ in range(100):
                clients.enter_context(socket.create_connection(("127.0.0.1", remote.port)))
            assert remote.ask("completions", prompt="The").status == 200
            # The chat template's process needs files too: an error, not a wait.
            assert remote.ask("chat/completions", messages=TURNS).status in (200, 500)
        assert remote.ask("chat/completions", messages=TURNS).status == 200
        wait_until(lambda: answers(remote.port))


def answers(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def test_a_clock_that_jumps_ends_nothing(
    served_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 53: by a year with every look at it, where nobody has more than ten seconds."""
    now, jumps = time.time, count()
    monkeypatch.setattr(time, "time", lambda: now() + 31_536_000 * (next(jumps) % 3 - 1))
    hasty = ServerSettings(
        header_timeout_s=10, body_timeout_s=10, idle_timeout_s=10, send_timeout_s=10, drain_s=10
    )
    running = EngineSettings(max_running=1, queue_timeout_s=10)
    with live_server(served_model, hasty, running) as live:
        for _ in range(3):
            timings = live.complete(n=3, max_tokens=4, ignore_eos=True).json["timings"]
            assert timings["predicted_n"] == 12
            assert min(timings[f"{what}_ms"] for what in ("queue", "prompt", "predicted")) >= 0
            assert sum(timings[f"{what}_ms"] for what in ("prompt", "predicted")) < 60_000
        response = live.begin_completion(max_tokens=100, ignore_eos=True, stream=True).getresponse()
        live.server.handle_exit(signal.SIGTERM, None)
        *chunks, done = read(response).events
        assert (chunks[-1]["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
    assert next(jumps) > 10


def test_without_names_an_address_is_enough(
    served_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 53: and a name is refused at the start, with the reason."""
    known = socket.getaddrinfo

    def nothing_known(host: str, *given: Any, **named: Any) -> Any:
        if not host.replace(".", "").isdigit():
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return known(host, *given, **named)

    monkeypatch.setattr(socket, "getaddrinfo", nothing_known)
    with live_server(served_model) as live:
        assert live.complete(max_tokens=2).status == 200
    with pytest.raises(UsageError, match=r"my-machine.*name resolution"):
        open_socket("my-machine", 0)


@pytest.mark.parametrize("phase", ["load_model", "warm_up"])
def test_ctrl_c_while_it_starts_ends_it_cleanly(tiny_model: Path, phase: str) -> None:
    """Row 52."""
    command = [sys.executable, "-c", STOPPED_WHILE, phase, "serve", str(tiny_model), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
        assert (process.returncode, out) == (128 + signal.SIGINT, "")
        assert said.splitlines()[-1] == "interrupted"
        assert "Traceback" not in said
    finally:
        process.kill()
        process.wait()
