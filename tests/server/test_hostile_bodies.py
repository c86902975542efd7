"""Bodies, headers and URLs that nobody sends by accident. The server answers, and goes on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from halfweave.runtime.model import Model, load_model
from halfweave.server.settings import ServerSettings
from support.http_server import JSON, Live, live_server, raw_exchange
from support.tiny import Tiny, save_tiny, save_tokenizer

POSTS = ("/v1/completions", "/v1/chat/completions")
LIMIT = 200_000

BODIES: dict[str, bytes] = {
    "nothing": b"",
    "not JSON": b"hello",
    "half of it": b'{"model": "tiny", "prompt": "x',
    "two documents": b'{"model":"tiny","prompt":"x"} {}',
    "an array": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "NUL bytes": b'{"model":"tiny","prompt":"a\x00b"}',
    "only NUL bytes": b"\x00" * 100,
    "invalid UTF-8": b'{"model":"tiny","prompt":"\xff\xfe"}',
    "another encoding": '{"model":"tiny","prompt":"x"}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + b'{"model":"tiny","prompt":"x"}',
    "deep arrays": b"[" * 10_000,
    "deep closed arrays": b'{"model":"tiny","prompt":' + b"[" * 9_000 + b"]" * 9_000 + b"}",
    "deep objects": b'{"a":' * 10_000,
    "duplicate keys": b'{"model":"tiny","prompt":"x","prompt":"y","messages":[]}',
    "NaN": b'{"model":"tiny","prompt":"x","temperature":NaN}',
    "Infinity": b'{"model":"tiny","prompt":"x","temperature":-Infinity}',
    "a float beyond floats": b'{"model":"tiny","prompt":"x","temperature":1e999}',
    "an integer of 5000 digits": b'{"model":"tiny","prompt":"x","seed":' + b"9" * 5000 + b"}",
    "half a character": b'{"model":"tiny","prompt":"\\ud800"}',
    "half a character as a key": b'{"model":"tiny","prompt":"x","\\ud800":1}',
    "a key in angle brackets": b'{"model":"tiny","prompt":"x","messages":[],"<one>":1}',
    "a long unknown key": b'{"' + b"k" * 100_000 + b'":1}',
    "many unknown keys": json.dumps({str(n): n for n in range(10_000)}).encode(),
}


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_hostile_body_is_a_short_and_quick_400(live: Live, path: str, body: bytes) -> None:
    """Row 31."""
    started = time.monotonic()
    answer = live.send("POST", path, body, JSON)
    assert time.monotonic() - started < 2
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert len(answer.body) < 4096
    assert b"\\ud8" not in answer.body, "half a character is not given back"
    assert live.complete(max_tokens=1).status == 200


HALF = "a\ud83d"
ANYTHING = {"type": "object", "properties": {}}
HALVES: dict[str, tuple[str, dict[str, Any]]] = {
    "a prompt": ("/v1/completions", {"prompt": HALF}),
    "a prompt of two": ("/v1/completions", {"prompt": ["a", HALF]}),
    "a stop string": ("/v1/completions", {"prompt": "a", "stop": HALF}),
    "a prompt to tokenize": ("/tokenize", {"prompt": HALF}),
    "a message": ("/v1/chat/completions", {"messages": [{"role": "user", "content": HALF}]}),
    "a part": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
    ),
    "a tool's description": (
        "/v1/chat/completions",
        {"tools": [{"type": "function", "function": {"name": "f", "description": HALF}}]},
    ),
    "a key of a tool's parameters": (
        "/v1/chat/completions",
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {HALF: 1}}}]},
    ),
    "a template's variable": ("/v1/chat/completions", {"chat_template_kwargs": {"v": HALF}}),
}


@pytest.mark.parametrize(("path", "fields"), HALVES.values(), ids=HALVES.keys())
def test_half_a_surrogate_pair_is_a_400_wherever_it_is(
    live: Live, path: str, fields: dict[str, Any]
) -> None:
    """Row 31."""
    turns = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {}
    answer = live.post(path, {"model": live.model, **turns, **fields})
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert "surrogate" in answer.error["message"]


def test_a_whole_surrogate_pair_is_a_character(live: Live) -> None:
    escaped, plain = (
        live.send("POST", "/tokenize", json.dumps(document, ensure_ascii=ascii).encode(), JSON)
        for document in [{"model": live.model, "prompt": "a\U0001f600 \\ud83d"}]
        for ascii in (True, False)
    )
    assert escaped.status == 200
    assert escaped.json == plain.json


def called_with(arguments: str) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "y"},
    ]
    return {"messages": turns, "max_tokens": 1}


def test_half_a_pair_that_a_model_escaped_in_its_arguments_is_read_as_it_is(live: Live) -> None:
    arguments = json.dumps({"city": HALF})
    assert live.chat(**called_with(arguments)).status == 200


# Written by the template itself; the words are those by which it is known to do so.
KNOWING_TEMPLATE = (
    "{#<tool_call><tool_response>#}{{ tools | tojson }}{% for m in messages %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory = save_tiny(tmp_path_factory.mktemp("knowing") / "knowing", Tiny(positions=4096))
    save_tokenizer(directory, chat_template=KNOWING_TEMPLATE)
    with live_server(load_model(directory)) as running:
        yield running


@pytest.fixture(params=["by the server", "by the template"])
def writing_tools(request: pytest.FixtureRequest) -> Live:
    """Servers that differ in who writes tools and calls into the prompt."""
    name = "live" if request.param == "by the server" else "knowing"
    found: Live = request.getfixturevalue(name)
    return found


@pytest.mark.parametrize("depth", [200, 480, 600, 900, 950, 970, 990, 2000])
def test_what_is_nested_deeply_is_answered_or_a_400(writing_tools: Live, depth: int) -> None:
    """Row 31."""
    live = writing_tools
    deep = "[" * depth + "]" * depth
    turns = [{"role": "user", "content": "x"}]
    tool = {"name": "f", "parameters": {**ANYTHING, "default": "DEEP"}}
    tools = [{"type": "function", "function": tool}]
    pair = [{"type": "function", "function": {**tool, "description": "\U0001f600"}}]
    for fields in (
        {"messages": turns, "tools": tools, "max_tokens": 1},
        {"messages": turns, "tools": pair, "max_tokens": 1},
        called_with(f'{{"a": {deep}}}'),
    ):
        document = json.dumps({"model": live.model, **fields}).replace('"DEEP"', deep)
        answer = live.send("POST", "/v1/chat/completions", document.encode(), JSON)
        assert answer.status in (200, 400)
        assert answer.status == 200 or answer.error["type"] == "invalid_request_error"


def test_a_key_named_twice_is_refused_whatever_it_says(live: Live) -> None:
    """Row 31."""
    body = b'{"model":"tiny","prompt":"x","prompt":"x","max_tokens":1}'
    answer = live.send("POST", POSTS[0], body, JSON)
    assert answer.status == 400
    assert "twice" in answer.error["message"]


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_a_web_page_may_send_unasked_is_refused(live: Live, media_type: str) -> None:
    body = json.dumps({"model": live.model, "prompt": "x"}).encode()
    answer = live.send("POST", POSTS[0], body, {"Content-Type": media_type} if media_type else {})
    assert answer.status == 400
    assert "application/json" in answer.error["message"]


def test_a_content_type_may_have_parameters(live: Live) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    body = json.dumps({"model": live.model, "prompt": "x", "max_tokens": 1}).encode()
    assert live.send("POST", POSTS[0], body, headers).status == 200


def test_the_largest_allowed_body_is_read(live: Live) -> None:
    empty = json.dumps({"model": live.model, "prompt": ""})
    for size, status, code in (
        (LIMIT, 400, "context_length_exceeded"),
        (LIMIT + 1, 413, "request_too_large"),
    ):
        prompt = "x" * (size - len(empty))
        body = json.dumps({"model": live.model, "prompt": prompt}).encode()
        assert len(body) == size
        answer = live.send("POST", POSTS[0], body, JSON)
        assert (answer.status, answer.error["code"]) == (status, code)


def test_a_body_much_too_large_is_answered_while_it_is_still_coming(live: Live) -> None:
    """Row 32."""
    answer = live.send("POST", POSTS[1], b"x" * (4 * LIMIT), JSON)
    assert answer.status == 413
    assert answer.error["code"] == "request_too_large"
    assert answer.headers["connection"] == "close"


def test_a_body_that_hides_its_length_is_bounded_too(live: Live) -> None:
    """Row 32."""

    def pieces() -> Iterator[bytes]:
        for _ in range(40):
            yield b"y" * 10_000

    connection = live.begin("POST", POSTS[0], pieces(), JSON)  # type: ignore[arg-type]
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_that_never_ends_is_given_up(served_model: Model) -> None:
    """Row 32."""
    with live_server(served_model, ServerSettings(body_timeout_s=0.3)) as impatient:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        received = raw_exchange(impatient.port, head + b"Content-Length: 100\r\n\r\n{")
        assert received.startswith(b"HTTP/1.1 408 ")
        assert b'"code": "timeout"' in received
        assert impatient.complete(max_tokens=1).status == 200


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing(live: Live) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", live.port)) as sock:
        sock.sendall(head + b"Content-Length: 100\r\n\r\n{")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("OPTIONS", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("BREW", "/v1/completions", 405),
        ("GET", "/v1", 404),
        ("GET", "/docs", 404),
        ("POST", "/v1/completions/", 404),
        ("POST", "//v1/completions", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404),
        ("GET", "/v1/models/%00%ff%0d%0a", 404),
        ("GET", "/" + "a" * 20_000, 404),
    ],
    ids=lambda item: str(item)[:40],
)
def test_other_urls_and_methods_are_told_so(
    live: Live, method: str, path: str, status: int
) -> None:
    """Row 44."""
    answer = live.send(method, path)
    assert answer.status == status
    assert answer.error["type"] == "invalid_request_error"
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.body) < 1000
    if status == 405:
        assert answer.headers["allow"]


def test_a_head_request_is_refused_without_a_body(live: Live) -> None:
    answer = live.send("HEAD", "/v1/completions")
    assert (answer.status, answer.body) == (405, b"")


def test_bytes_that_are_no_http_do_not_stop_the_server(live: Live) -> None:
    assert raw_exchange(live.port, b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("given", ["has space", "a" * 65, "", "ünï", "a;b", "{}"])
def test_a_strange_request_id_is_replaced(live: Live, given: str) -> None:
    """Row 45."""
    headers = {"X-Request-Id": given.encode("latin-1")}
    answer = live.send("GET", "/health", headers=headers)  # type: ignore[arg-type]
    assert answer.headers["x-request-id"].startswith("req-")


def test_a_harmless_request_id_is_kept_on_every_kind_of_answer(live: Live) -> None:
    mine = {"X-Request-Id": "my_id-1"}
    answers = [
        live.send("GET", "/health", headers=mine),
        live.send("GET", "/nowhere", headers=mine),
        live.send("POST", "/health", headers=mine),
        live.post(POSTS[0], {"model": live.model, "prompt": "x", "stream": True}, mine),
        live.post(POSTS[0], {}, mine),
        live.send("POST", POSTS[0], b"x" * (LIMIT + 1), {**JSON, **mine}),
    ]
    assert [a.headers["x-request-id"] for a in answers] == ["my_id-1"] * 6
    assert [a.status for a in answers] == [200, 404, 405, 200, 400, 413]
