"""GET /v1/models, /v1/models/{id}, /health and the OpenAPI document."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from halfweave import __version__
from halfweave.runtime.model import Model
from support.http_server import Live, live_server


def test_the_client_lists_and_retrieves_the_model(live: Live, served_model: Model) -> None:
    client = live.client()
    (listed,) = client.models.list().data
    assert listed == client.models.retrieve(live.model)
    assert listed.id == live.model
    card = live.get("/v1/models").json["data"][0]
    assert card["root"] == served_model.name
    assert card["max_model_len"] == served_model.max_model_len


def test_a_served_name_may_look_like_a_path_of_a_hub(served_model: Model) -> None:
    with live_server(served_model, name="org/tiny-2:4") as named:
        client = named.client()
        assert client.models.retrieve("org/tiny-2:4").id == "org/tiny-2:4"
        answer = client.completions.create(model="org/tiny-2:4", prompt="The", max_tokens=2)
        assert answer.model == "org/tiny-2:4"
        assert named.complete(model=served_model.name).status == 404


@pytest.mark.parametrize("name", ["other", "../../etc/passwd", "%2e%2e/x", "a" * 500, "\u2028"])
def test_another_model_is_not_found(live: Live, name: str) -> None:
    """Row 44."""
    answer = live.complete(model=name)
    assert answer.status == 404
    assert answer.error["code"] == "model_not_found"
    assert answer.error["param"] == "model"
    assert len(answer.body) < 1000


def test_the_client_raises_its_own_error_for_another_model(live: Live) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        live.client().models.retrieve("other")
    assert caught.value.code == "model_not_found"
    assert caught.value.request_id is not None


def test_health_is_good_while_requests_are_taken_on(live: Live) -> None:
    answer = live.get("/health")
    assert (answer.status, answer.json) == (200, {"status": "ok"})


def test_the_openapi_document_describes_fields_answers_and_errors(live: Live) -> None:
    document: dict[str, Any] = live.get("/openapi.json").json
    assert set(document["paths"]) == {
        "/v1/models",
        "/v1/models/{name}",
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
        "/version",
        "/metrics",
    }
    schemas = document["components"]["schemas"]
    assert schemas["CompletionBody"]["properties"]["temperature"]["anyOf"][0]["maximum"] == 2
    assert schemas["CompletionBody"]["properties"]["n"]["anyOf"][0]["maximum"] == 16
    assert schemas["CompletionBody"]["additionalProperties"] is False
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert "text/event-stream" in chat["responses"]["200"]["content"]
    assert "422" not in chat["responses"]
    assert chat["responses"]["429"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/ErrorAnswer"
    }


def test_the_prefix_may_be_left_out(live: Live) -> None:
    assert live.get("/models").json == live.get("/v1/models").json
    assert live.post("/completions", {"model": live.model, "prompt": "a"}).status == 200
    turns = [{"role": "user", "content": "Hello"}]
    document = {"model": live.model, "messages": turns, "max_tokens": 2}
    assert live.post("/chat/completions", document).status == 200


def test_what_an_operator_asks(live: Live) -> None:
    assert live.get("/version").json == {"version": __version__}
    for path in ("/health", "/ready", "/ping"):
        assert live.get(path).json == {"status": "ok"}


def test_tokens_and_back(live: Live, served_model: Model) -> None:
    text = "the lazy dog \U0001f98a"
    answer = live.post("/tokenize", {"model": live.model, "prompt": text}).json
    assert answer["tokens"] == served_model.tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == served_model.max_model_len
    more = {"model": live.model, "prompt": text, "return_token_strs": True}
    strings = live.post("/tokenize", more).json["token_strs"]
    assert len(strings) == answer["count"]
    back = live.post("/detokenize", {"model": live.model, "tokens": answer["tokens"]})
    assert back.json["prompt"] == served_model.tokenizer.decode(answer["tokens"], special=True)
    refused = live.post("/detokenize", {"model": live.model, "tokens": [10**6]})
    assert (refused.status, refused.error["param"]) == (400, "tokens")
    assert live.post("/tokenize", {"model": "other", "prompt": text}).status == 404


def test_two_models_behind_one_port(served_model: Model, long_model: Model) -> None:
    """Each answers as it does alone, also while the other works."""
    with live_server(served_model, beside=long_model) as both:
        names = [card.id for card in both.client().models.list().data]
        assert names == [served_model.name, long_model.name]
        alone = [both.complete(model=name, temperature=0).json["choices"] for name in names]
        busy = both.begin_completion(model=names[1], max_tokens=2000, ignore_eos=True, stream=True)
        busy.getresponse().read(100)
        again = [both.complete(model=name, temperature=0).json["choices"] for name in names]
        assert again == alone
        busy.close()
        answer = both.complete(model="neither")
        assert all(name in answer.error["message"] for name in names)
