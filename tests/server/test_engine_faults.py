"""The engine fails or stops under the server: clients get an error they understand."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from halfweave.runtime.model import Model, load_model
from safetensors.torch import load_file, save_file
from support.http_server import Live, idle, live_server, read, wait_until

SECRET = "my dog's name is Barnabas"


@pytest.fixture
def doomed(long_model: Model) -> Iterator[Live]:
    """A server whose engine the test will stop."""
    with live_server(long_model) as running:
        yield running


@pytest.fixture
def broken(copy_of: Any, tiny_model: Path) -> Iterator[Live]:
    """A server whose model computes NaN, as one does after a bad conversion."""
    directory = copy_of(tiny_model)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with live_server(load_model(directory)) as running:
        yield running


def test_a_failed_generation_is_a_500_that_gives_nothing_away(broken: Live) -> None:
    """Row 50."""
    answer = broken.complete(prompt=SECRET)
    assert answer.status == 500
    assert answer.error["type"] == "server_error"
    assert answer.error["code"] == "internal_error"
    assert answer.headers["x-request-id"] in answer.error["message"]
    for word in ("Traceback", "/", ".py", "Barnabas", "halfweave"):
        assert word not in answer.body.decode()
    with pytest.raises(openai.InternalServerError):
        broken.client().completions.create(model=broken.model, prompt="x")


def test_a_failure_after_the_first_byte_is_an_event_and_then_the_end(broken: Live) -> None:
    """Row 50."""
    answer = broken.chat(stream=True)
    assert answer.status == 200
    first, error, done = answer.events
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert error["error"]["code"] == "internal_error"
    assert done == "[DONE]"
    with pytest.raises(openai.APIError, match="internal error"):
        list(
            broken.client().chat.completions.create(
                model=broken.model, messages=[{"role": "user", "content": "x"}], stream=True
            )
        )


def test_a_failure_of_one_request_leaves_the_server_in_service(broken: Live) -> None:
    for _ in range(3):
        assert broken.complete().status == 500
    assert broken.get("/health").status == 200
    wait_until(lambda: idle(broken))


def test_an_engine_that_stops_ends_the_answers_in_flight(doomed: Live) -> None:
    """Row 51."""
    forever = {"max_tokens": 8000, "ignore_eos": True}
    stream = doomed.begin_completion(**forever, stream=True)
    response = stream.getresponse()
    whole = doomed.begin_completion(**forever)
    wait_until(lambda: doomed.engine.stats().running == 2)
    closing = threading.Thread(target=doomed.engine.close)
    closing.start()
    *_, error, done = read(response).events
    assert done == "[DONE]"
    assert error["error"]["type"] == "server_error"
    answer = read(whole.getresponse())
    assert answer.status == 503
    assert answer.error["code"] in ("aborted", "engine_dead")
    closing.join()


def test_a_dead_engine_is_a_503_not_worth_repeating(doomed: Live) -> None:
    """Row 51: the server stops by itself; until it has, it tells the truth."""
    doomed.activity.in_flight += 1  # the test counts as a request, so that there is time to ask
    connection = doomed.begin("GET", "/health")
    connection.getresponse().read()
    doomed.engine.close()
    connection.request("GET", "/health")
    answer = read(connection.getresponse())
    assert (answer.status, answer.json) == (503, {"status": "dead"})


def test_no_text_of_a_request_or_its_answer_reaches_the_log(
    live: Live, broken: Live, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    text = live.complete(prompt=SECRET, max_tokens=30, ignore_eos=True).json["choices"][0]["text"]
    live.chat(messages=[{"role": "user", "content": SECRET}], stream=True)
    live.complete(prompt=SECRET, temperature=9, stop=[SECRET])
    live.get(f"/v1/models/{SECRET.replace(' ', '%20')}")
    broken.complete(prompt=SECRET)
    wait_until(lambda: idle(live))
    # pytest listens even to uvicorn's own log of URLs, which is cut off from every handler.
    assert not logging.getLogger("uvicorn.access").propagate
    records = [record for record in caplog.records if record.name != "uvicorn.access"]
    logged = "\n".join(logging.Formatter().format(record) for record in records)
    assert "Barnabas" not in logged
    assert text not in logged
    assert '"route": "/v1/completions", "status": 200' in logged
