"""Answers of a given form: JSON, JSON of a schema, calls of tools; whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from halfweave.runtime.model import Model
from jsonschema import validate
from support.http_server import JSON, Live, idle, live_server, read, run, wait_until

ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["good", "bad"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Tells it.", "parameters": CITY},
}
CLOCK: Any = {"type": "function", "function": {"name": "get_time"}}
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "person", "schema": PERSON, "strict": True},
}
RANDOM: dict[str, Any] = {"seed": 4, "temperature": 1.0, "max_tokens": 400}


@pytest.fixture(scope="module")
def shared_roomy(long_model: Model) -> Iterator[Live]:
    with live_server(long_model) as running:
        yield running


@pytest.fixture
def live(shared_roomy: Live) -> Iterator[Live]:
    """A server whose context has room for what models are told of tools."""
    yield shared_roomy
    wait_until(lambda: idle(shared_roomy))


def test_json_of_a_schema_is_valid_in_every_choice(live: Live) -> None:
    answer = live.client().chat.completions.create(
        model=live.model, messages=ASK, response_format=FORMAT, n=3, **RANDOM
    )
    texts = [choice.message.content or "" for choice in answer.choices]
    for text in texts:
        validate(json.loads(text), PERSON)
    assert len(set(texts)) == 3
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_a_json_object_is_one(live: Live) -> None:
    # Closing brackets and quotes are likelier, so that a random model comes to an end.
    closing = live.post("/tokenize", {"model": live.model, "prompt": '}"]'}).json["tokens"]
    document = live.chat(
        messages=ASK,
        response_format={"type": "json_object"},
        n=4,
        seed=1,
        max_tokens=300,
        logit_bias={str(token): 8.0 for token in closing},
    ).json
    ended = [c["message"]["content"] for c in document["choices"] if c["finish_reason"] == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)


def test_a_form_that_is_met_ends_before_the_least_length(live: Live) -> None:
    short = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 2]}}}
    choice = live.chat(response_format=short, max_tokens=60, min_tokens=50).json["choices"][0]
    assert choice["message"]["content"] in ("1", "2")
    assert choice["finish_reason"] == "stop"


def test_streamed_json_is_the_whole_json(live: Live) -> None:
    fields: dict[str, Any] = {"messages": ASK, "response_format": FORMAT, **RANDOM}
    whole = live.chat(**fields).json["choices"][0]["message"]["content"]
    *chunks, _ = live.chat(**fields, stream=True).events
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == whole


def test_the_asynchronous_client_parses_a_schema(live: Live) -> None:
    async def ask() -> Any:
        async with live.async_client() as client:
            answer = await client.chat.completions.create(
                model=live.model, messages=ASK, response_format=FORMAT, **RANDOM
            )
            return json.loads(answer.choices[0].message.content or "")

    validate(run(ask()), PERSON)


@pytest.mark.parametrize("choice", ["required", "named", "allowed"])
def test_a_tool_that_must_be_called_is_called(live: Live, choice: str) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    choices: dict[str, Any] = {
        "required": "required",
        "named": named,
        "allowed": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [named]},
        },
    }
    tools = [WEATHER] if choice == "required" else [CLOCK, WEATHER]
    answer = live.client().chat.completions.create(
        model=live.model,
        messages=ASK,
        tools=tools,
        tool_choice=choices[choice],
        parallel_tool_calls=False,
        **RANDOM,
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert call.id.startswith("call_")
    validate(json.loads(call.function.arguments), CITY)


def test_streamed_calls_are_put_together_by_the_client(live: Live) -> None:
    fields: dict[str, Any] = {"messages": ASK, "tools": [WEATHER], "tool_choice": "required"}
    fields |= {"parallel_tool_calls": False, **RANDOM}
    with live.client().chat.completions.stream(model=live.model, **fields) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls or []
    whole = live.chat(**fields).json["choices"][0]["message"]["tool_calls"][0]
    assert streamed.function.name == whole["function"]["name"]
    assert streamed.function.arguments == whole["function"]["arguments"]
    assert final.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_a_stop_string_cuts_is_not_to_be_carried_out(live: Live, stream: bool) -> None:
    only = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": only}}
    asked = {**RANDOM, "tools": [tool], "tool_choice": "required", "stream": stream}
    for stop, reason in ((["aris"], "stop"), ([], "tool_calls")):
        answer = live.chat(**asked, stop=stop)
        found = answer.events[-2] if stream else answer.json
        assert found["choices"][0]["finish_reason"] == reason


def test_forms_that_take_long_hold_up_nobody_else(live: Live) -> None:
    """Row 54: each takes a second or more, and there are more of them than threads."""
    slow = {f"^a{n}(b|c)*d{n}$": {"type": "string"} for n in range(1500)}
    schema = {"type": "object", "patternProperties": slow}
    document = {
        "model": live.model,
        "messages": ASK,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }
    body = json.dumps(document).encode()
    many = [live.begin("POST", "/v1/chat/completions", body, JSON) for _ in range(80)]
    try:
        wait_until(lambda: live.activity.in_flight >= 60)
        assert live.complete(max_tokens=2).status == 200
        assert live.activity.in_flight >= 60  # they wait still
        assert read(many[-1].getresponse()).status == 429
    finally:
        for each in many:
            each.close()


def test_a_tool_that_may_be_called_need_not_be(live: Live) -> None:
    choice = live.chat(messages=ASK, tools=[WEATHER], max_tokens=20, seed=2).json["choices"][0]
    assert choice["message"]["content"]
    assert "tool_calls" not in choice["message"]
    with_none = live.chat(
        messages=ASK, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=12
    ).json
    without = live.chat(messages=ASK, temperature=0, max_tokens=12).json
    assert with_none["choices"] == without["choices"], "tools that may not be called are not shown"


def test_the_turns_of_a_call_come_back_as_messages(live: Live) -> None:
    turns: Any = [
        *ASK,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    answer = live.client().chat.completions.create(
        model=live.model, messages=turns, tools=[WEATHER], max_tokens=5
    )
    assert answer.usage is not None
    shorter = live.chat(messages=ASK, tools=[WEATHER], max_tokens=5).json["usage"]
    assert answer.usage.prompt_tokens > shorter["prompt_tokens"] + 10


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "object", "properties": {"a": {"$ref": "http://example.com/x"}}}, "schema"),
        ({"type": "nonsense"}, "schema"),
        ({"type": "string", "pattern": "("}, "schema"),
        ({"type": "object", "description": "x" * 100_000}, "characters"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "schema"),
    ],
    ids=["remote", "no type", "no pattern", "large", "unsatisfiable"],
)
def test_a_schema_that_cannot_be_used_is_a_400(live: Live, schema: Any, said: str) -> None:
    """Row 39."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = live.chat(response_format=form)
    assert (answer.status, answer.error["code"]) == (400, "invalid_json_schema")
    assert answer.error["param"] == "response_format"
    assert said in answer.error["message"]
    assert len(answer.body) < 4096


def test_a_pattern_that_explodes_elsewhere_ends(live: Live) -> None:
    """Row 39: generation under it ends, and the server goes on."""
    schema = {"type": "string", "pattern": "^(a+)+$"}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = live.chat(response_format=form, max_tokens=40)
    assert answer.status in (200, 400)
    assert live.complete(max_tokens=2).status == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tools": [CLOCK] * 1000}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "other"}},
            },
            "tool_choice",
        ),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x y": 1}}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
    ids=lambda item: str(item)[:50],
)
def test_forms_and_tools_that_make_no_sense_are_refused(
    live: Live, fields: dict[str, Any], param: str
) -> None:
    """Rows 39, 40 and 41."""
    answer = live.chat(**fields)
    assert answer.status == 400
    assert (answer.error["param"] or "").startswith(param)
    assert len(answer.body) < 4096


def test_a_template_gets_its_variables_and_an_open_last_message(live: Live) -> None:
    assert live.chat(chat_template_kwargs={"enable_thinking": False}).status == 200
    turns = [*ASK, {"role": "assistant", "content": "The weather"}]
    fields: dict[str, Any] = {"messages": turns, "temperature": 0}
    open_end = live.chat(**fields, add_generation_prompt=False, continue_final_message=True)
    closed = live.chat(**fields)
    assert open_end.status == closed.status == 200
    counts = [each.json["usage"]["prompt_tokens"] for each in (open_end, closed)]
    assert counts[0] < counts[1]
