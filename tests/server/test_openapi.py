"""The OpenAPI document is a promise: what it allows gets an answer of its kind, all else a refusal.

schemathesis makes the requests: each field at each of its bounds and beyond, and random documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from halfweave.runtime.engine import Engine
from halfweave.runtime.engine_settings import EngineSettings
from halfweave.runtime.model import Model
from halfweave.server.app import create_app
from halfweave.server.errors import UNSUPPORTED
from halfweave.server.service import Served
from hypothesis import HealthCheck, settings
from support.http_server import Live, live_server

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

MODEL = "tiny"
ASKS = {
    "/v1/completions": {"model": MODEL, "prompt": "The", "max_tokens": 4},
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 4,
    },
}


def document() -> dict[str, Any]:
    """The application's own, which is the same for every model, so that none is needed."""
    found = create_app([Served(MODEL, Mock(spec=Engine))]).openapi()
    for path in ASKS:
        # A stream is described as one string, and schemathesis would look for one in each event.
        success = found["paths"][path]["post"]["responses"]["200"]["content"]
        assert success["text/event-stream"].pop("schema") == {"type": "string"}
    return dict(found)


SCHEMA = schemathesis.openapi.from_dict(document())
SCHEMA.config.generation.update(deterministic=True)
RANDOM = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def small(served_model: Model) -> Iterator[Live]:
    """A server whose context is so short that no request lasts."""
    with live_server(served_model, None, EngineSettings(max_model_len=48), name=MODEL) as running:
        yield running


def promised(path: str) -> Any:
    """A test of all that one path promises.

    Each has a name of its own: with one for all, pytest's workers would take them for the same.
    """

    @SCHEMA.include(path=path).parametrize()
    @RANDOM
    def test(case: Any, small: Live) -> None:
        """Rows 31, 33, 34, 35 and 44: status, type and shape; what is not allowed is refused."""
        allowed = case.meta.generation.mode is schemathesis.GenerationMode.POSITIVE
        if allowed and isinstance(case.body, dict):
            case.body = agreed(case.body)
        answer = case.call(base_url=small.url)
        # A model has bounds that a document has not, such as its context's and its vocabulary's.
        not_asked = [schemathesis.checks.positive_data_acceptance]
        case.validate_response(answer, excluded_checks=not_asked)
        if allowed and answer.status_code == 400:
            assert answer.json()["error"]["code"] != UNSUPPORTED, "it is documented"

    return test


test_completions_are_as_documented = promised("/v1/completions")
test_chats_are_as_documented = promised("/v1/chat/completions")
test_tokens_of_texts_are_as_documented = promised("/tokenize")
test_texts_of_tokens_are_as_documented = promised("/detokenize")
test_models_are_as_documented = promised("/v1/models")
test_one_model_is_as_documented = promised("/v1/models/{name}")
test_health_is_as_documented = promised("/health")
test_readiness_is_as_documented = promised("/ready")
test_the_version_is_as_documented = promised("/version")
test_metrics_are_as_documented = promised("/metrics")


def test_no_path_is_left_out() -> None:
    tests = [name for name in globals() if name.endswith("_as_documented")]
    assert len(tests) == len(SCHEMA)


def agreed(body: dict[str, Any]) -> dict[str, Any]:
    """The same, where most fields would contradict others in a way that no schema forbids."""
    body = {**body, "model": MODEL}
    if body.get("max_tokens") == 0:
        body["echo"] = True
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True
    if body.get("stream_options"):
        body["stream"] = True
    if "messages" in body:
        body["messages"] = [spoken(message) for message in body["messages"]]
    return body


def spoken(message: dict[str, Any]) -> dict[str, Any]:
    """Only an assistant calls tools, and who calls none says something."""
    message = dict(message)
    if message["role"] != "assistant":
        message.pop("tool_calls", None)
    if not message.get("tool_calls"):
        message["content"] = message.get("content") or "x"
    return message


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ASKS)
def test_an_answer_and_a_stream_have_their_own_types(small: Live, path: str, stream: bool) -> None:
    case = SCHEMA[path]["POST"].Case(body={**ASKS[path], "stream": stream})
    answer = case.call_and_validate(base_url=small.url)
    assert answer.status_code == 200
    kind = "text/event-stream" if stream else "application/json"
    assert answer.headers["content-type"][0].startswith(kind)


def test_the_model_that_is_served_is_described(small: Live) -> None:
    case = SCHEMA["/v1/models/{name}"]["GET"].Case(path_parameters={"name": MODEL})
    assert case.call_and_validate(base_url=small.url).status_code == 200
