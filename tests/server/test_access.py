"""API keys: who may ask what (row 43)."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from halfweave.cli.flags import Serving
from halfweave.cli.serving import KEY_VARIABLE, api_keys
from halfweave.errors import UsageError
from halfweave.runtime.model import Model
from halfweave.server.settings import ServerSettings
from support.http_server import JSON, Live, live_server

KEY, OTHER = "sk-first-key-1", "sk-second-key"
PATHS = [
    ("GET", "/"),
    ("GET", "/v1/models"),
    ("GET", "/models"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/ping"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/no/such/path"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("OPTIONS", "/v1/completions"),
    ("GET", "/health/"),
    ("GET", "//health"),
]
WRONG = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer "},
    {"Authorization": f"Bearer {KEY.upper()}"},
    {"Authorization": f"Bearer {KEY[:-1]}"},
    {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": KEY},
    {"Authorization": f"Token {KEY}"},
    {"Authorization": "Basic !!!"},
    {"Authorization": "Basic \u00e9"},
    {"Authorization": "Basic " + base64.b64encode(b"user:\xe9").decode()},
    {"Authorization": "Basic " + base64.b64encode(b"user:wrong").decode()},
    {"X-Api-Key": KEY},
]


@pytest.fixture(scope="module")
def guarded(served_model: Model) -> Iterator[Live]:
    with live_server(served_model, ServerSettings(api_keys=(KEY, OTHER))) as running:
        yield running


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_without_a_key_every_url_is_refused_alike(guarded: Live, method: str, path: str) -> None:
    answer = guarded.send(method, path, b"{}", JSON)
    assert answer.status == 401
    assert answer.error["code"] == "invalid_api_key"
    assert answer.error["type"] == "authentication_error"
    assert answer.headers["www-authenticate"].startswith("Basic" if path == "/" else "Bearer")


@pytest.mark.parametrize("headers", WRONG, ids=str)
def test_a_wrong_key_is_no_key_and_gets_no_hint(guarded: Live, headers: dict[str, str]) -> None:
    answer = guarded.send("GET", "/v1/models", headers=headers)
    assert answer.status == 401
    assert answer.json == guarded.get("/v1/models").json
    assert KEY not in answer.body.decode()


def test_a_key_in_the_url_is_no_key(guarded: Live) -> None:
    assert guarded.get(f"/v1/models?api_key={KEY}").status == 401


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_a_supervisor_needs_none(guarded: Live, path: str) -> None:
    assert guarded.get(path).status == 200


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_each_key_opens_everything(guarded: Live, key: str) -> None:
    bearer = {"Authorization": f"Bearer {key}"}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/version", "/"):
        assert guarded.send("GET", path, headers=bearer).status == 200
    client = guarded.client().with_options(api_key=key)
    assert client.completions.create(model=guarded.model, prompt="The", max_tokens=2).choices
    with pytest.raises(openai.AuthenticationError):
        guarded.client().models.list()


def test_a_browser_is_asked_for_a_password_and_can_give_the_key(guarded: Live) -> None:
    assert "Basic realm" in guarded.get("/").headers["www-authenticate"]
    assert "Basic" not in guarded.get("/v1/models").headers["www-authenticate"]
    basic = "Basic " + base64.b64encode(f"anybody:{KEY}".encode()).decode()
    assert guarded.send("GET", "/", headers={"Authorization": basic}).status == 200
    assert guarded.send("GET", "/v1/models", headers={"Authorization": basic}).status == 200


def test_callers_of_different_keys_share_no_beginnings(guarded: Live) -> None:
    """Else one could find out by timing what another has asked."""
    fields = {"model": guarded.model, "prompt": "a beginning of some length " * 8, "max_tokens": 1}

    def cached(key: str) -> int:
        answer = guarded.post("/v1/completions", fields, {"Authorization": f"Bearer {key}"})
        return int(answer.json["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(KEY) == 0
    assert cached(OTHER) == 0
    assert cached(KEY) > 0


# ---- where keys come from


def test_keys_of_flags_file_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\n  {OTHER}  \n")
    file.chmod(0o600)
    assert api_keys(Serving(api_key=["sk-flag-key"], api_key_file=file)) == (
        "sk-flag-key",
        KEY,
        OTHER,
    )
    assert api_keys(Serving()) == ()
    monkeypatch.setenv(KEY_VARIABLE, OTHER)
    assert api_keys(Serving()) == (OTHER,)
    monkeypatch.setenv(KEY_VARIABLE, "")  # a secret that is missing is no wish for no keys
    with pytest.raises(UsageError):
        api_keys(Serving())


@pytest.mark.parametrize(
    "key", ["", "short", "with\nbreak-in-it", " leading-space", "schl\u00fcssel-1"]
)
def test_what_can_be_no_key_is_refused(key: str) -> None:
    with pytest.raises(UsageError):
        api_keys(Serving(api_key=[key]))


def test_a_file_of_keys_must_be_private_and_hold_some(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    with pytest.raises(UsageError):
        api_keys(Serving(api_key_file=file))
    file.write_text(KEY)
    file.chmod(0o644)
    with pytest.raises(UsageError, match="others can read"):
        api_keys(Serving(api_key_file=file))
    file.chmod(0o600)
    file.write_text("\n")
    with pytest.raises(UsageError, match="no key"):
        api_keys(Serving(api_key_file=file))
