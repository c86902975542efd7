"""Tools: what a client may ask, what the model is told, and its calls read back from its text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from halfweave.errors import RequestError
from halfweave.runtime.grammar import GrammarCompiler
from halfweave.runtime.params import SamplingParams
from halfweave.runtime.sampler import Sampler
from halfweave.runtime.tokenizer import Tokenizer
from halfweave.server.errors import to_api_error
from halfweave.server.protocol import Body
from halfweave.server.tool_parser import parse_calls
from halfweave.server.tool_protocol import (
    ResponseFormat,
    ToolBody,
    ToolChoiceBody,
    Turn,
    tool_choice,
)
from halfweave.server.tool_text import CALL_TRIGGER, conversation
from halfweave.server.tools import MAX_TOOLS, Tool, ToolChoice, ToolSet, tool_set
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from support.tiny import EOS, SPECIAL_TOKENS, VOCABULARY, save_tokenizer

Json = dict[str, Any]
CITY: Json = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = Tool("get_weather", "Tells the weather.", CITY, strict=True)
CLOCK = Tool("clock")
PARIS = '{"city": "Paris", "days": 3}'
# As Qwen's templates do it: tools, calls and results are the template's own affair.
KNOWING_TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>"
    "{% else %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if shout is defined %}{{ shout }}{% endif %}"
)
TALK: list[Json] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": f"call_{n}",
                "type": "function",
                "function": {"name": "get_weather", "arguments": f'{{"days":{n}}}'},
            }
            for n in (1, 2)
        ],
    },
    {"role": "tool", "content": "sun", "tool_call_id": "call_1"},
    {"role": "tool", "content": "rain", "tool_call_id": "call_2"},
    {"role": "user", "content": "Thanks"},
]


class Asked(Body):
    """The part of a request that is about tools."""

    tools: list[ToolBody] | None = None
    tool_choice: ToolChoiceBody | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None


def asked(**fields: Any) -> ToolSet | None:
    """Read the fields of a request as the server does."""
    body = Asked.model_validate(fields)
    tools = None if body.tools is None else [tool.tool() for tool in body.tools]
    return tool_set(tools, tool_choice(body.tool_choice), body.parallel_tool_calls)


def function(name: Any = "f", **fields: Any) -> Json:
    return {"type": "function", "function": {"name": name, **fields}}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.open(tiny_model)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def answer(
    tokenizer: Tokenizer, compiler: GrammarCompiler, tools: ToolSet, seed: int, begin: str = ""
) -> str:
    """A text that begins so and goes on as the tools allow, by a model that likes to end."""
    form = tools.grammar(compiler)
    assert form is not None
    random, ids = np.random.default_rng(seed), tokenizer.encode(begin, special=False)
    constraint = form.constraint()
    for token in ids:
        constraint.take(token)
    sampler = Sampler(SamplingParams(seed=seed), (), tokenizer.eos_ids, constraint)
    for _ in range(2000):
        scores = random.standard_normal(VOCABULARY).astype(np.float32) * 3
        scores[tokenizer.encode('"}\n', special=False)] += 3
        scores[sorted(tokenizer.eos_ids)] += 7
        token = sampler.choose(scores)
        if token in tokenizer.eos_ids:
            return tokenizer.decode(ids)
        ids.append(token)
    raise AssertionError("no end")


# What a client may ask.


def test_the_defaults_are_those_of_openai() -> None:
    assert asked() is None
    assert asked(tool_choice="none") is asked(tool_choice="auto") is None
    assert asked(tools=[function("f")]) == ToolSet((Tool("f"),), ToolChoice("auto"), True)
    assert asked(tools=[function("f")], parallel_tool_calls=False) == ToolSet(
        (Tool("f"),), ToolChoice("auto"), False
    )


def test_a_choice_among_tools() -> None:
    tools = [function(name) for name in "abc"]
    allowed = [{"type": "function", "function": {"name": name}} for name in "ca"]
    choices: list[tuple[Any, str, str]] = [
        ("none", "none", ""),
        ("required", "required", "abc"),
        (function("b"), "required", "b"),
        *(
            (
                {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}},
                mode,
                "ac",
            )
            for mode in ("auto", "required")
        ),
    ]
    for choice, mode, offered in choices:
        told = asked(tools=tools, tool_choice=choice)
        assert told is not None
        assert (told.choice.mode, "".join(tool.name for tool in told.offered)) == (mode, offered)


REFUSED: dict[str, tuple[Json, str]] = {
    "no tools": ({"tools": []}, "tools"),
    "1000 tools": ({"tools": [function(f"f{n}") for n in range(1000)]}, "tools"),
    "one too many": ({"tools": [function(f"f{n}") for n in range(MAX_TOOLS + 1)]}, "tools"),
    "one name twice": ({"tools": [function("a"), function("b"), function("a")]}, "tools"),
    "an empty name": ({"tools": [function("")]}, "tools"),
    "a long name": ({"tools": [function("x" * 65)]}, "tools"),
    "a name with a space": ({"tools": [function("a b")]}, "tools"),
    "a name with a line": ({"tools": [function("a\n")]}, "tools"),
    "a name in other letters": ({"tools": [function("é")]}, "tools"),
    "parameters of a list": ({"tools": [function(parameters={"type": "array"})]}, "tools"),
    "another tool": ({"tools": [function("a")], "tool_choice": function("b")}, "tool_choice"),
    "a choice of nothing": ({"tool_choice": function("b")}, "tool_choice"),
    "a call of nothing": ({"tool_choice": "required"}, "tool_choice"),
    "none allowed": (
        {
            "tools": [function("a")],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": []},
            },
        },
        "tool_choice",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tools_that_make_no_sense_are_refused(name: str) -> None:
    """Row 40."""
    fields, param = REFUSED[name]
    with pytest.raises(RequestError) as caught:
        asked(**fields)
    error = to_api_error(caught.value)
    assert (error.status_code, error.param) == (400, param)
    assert len(error.detail) < 200


MALFORMED: list[tuple[Json, tuple[str | int, ...], bool]] = [
    ({"tools": {}}, ("tools",), False),
    ({"tools": ["f"]}, ("tools", 0), False),
    ({"tools": [{"type": "function"}]}, ("tools", 0, "function"), False),
    ({"tools": [function(5)]}, ("tools", 0, "function", "name"), False),
    ({"tools": [function(parameters=[])]}, ("tools", 0, "function", "parameters"), False),
    ({"tools": [function(strict="yes")]}, ("tools", 0, "function", "strict"), False),
    ({"tools": [function(mood="good")]}, ("tools", 0, "function", "mood"), False),
    ({"tools": [{"type": "custom", "custom": {}}]}, ("tools", 0, "type"), True),
    ({"tool_choice": "always"}, ("tool_choice", "<mode>"), False),
    ({"tool_choice": 5}, ("tool_choice", "<mode>"), False),
    ({"tool_choice": {}}, ("tool_choice", "<named>", "type"), False),
    ({"tool_choice": {"type": "custom"}}, ("tool_choice", "<named>", "type"), True),
    ({"parallel_tool_calls": 1}, ("parallel_tool_calls",), False),
    ({"response_format": "json"}, ("response_format", "<text>"), False),
    ({"response_format": {"type": "grammar"}}, ("response_format", "<text>", "type"), True),
    (
        {"response_format": {"type": "json_schema"}},
        ("response_format", "<schema>", "json_schema"),
        False,
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        ("response_format", "<schema>", "json_schema", "name"),
        False,
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": True}}},
        ("response_format", "<schema>", "json_schema", "schema"),
        False,
    ),
]


@pytest.mark.parametrize(("fields", "where", "unsupported"), MALFORMED, ids=str)
def test_malformed_tools_are_refused(
    fields: Json, where: tuple[str | int, ...], unsupported: bool
) -> None:
    """Row 40."""
    with pytest.raises(ValidationError) as caught:
        Asked.model_validate(fields)
    first = caught.value.errors()[0]
    assert first["loc"] == where
    assert (first["type"] == "unsupported_parameter") == unsupported


def test_only_an_assistant_has_calls() -> None:
    calls = TALK[1]["tool_calls"]
    assert len(Turn(role="assistant", tool_calls=calls).tool_calls or ()) == 2
    for fields in ({"role": "user", "tool_calls": calls}, {"role": "assistant", "tool_calls": []}):
        with pytest.raises(ValidationError):
            Turn.model_validate(fields)


def test_the_form_of_an_answer(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    def form(**fields: Any) -> Any:
        body = Asked.model_validate({"response_format": fields})
        assert body.response_format is not None
        return body.response_format.grammar(compiler)

    assert form(type="text") is None
    assert form(type="json_object") is compiler.json_object()
    unkept = {"type": "array", "uniqueItems": True}
    schema = {"name": "x", "schema": unkept}
    assert form(type="json_schema", json_schema=schema) is not None
    with pytest.raises(RequestError, match="uniqueItems"):
        form(type="json_schema", json_schema={**schema, "strict": True})


def test_a_tool_with_an_unusable_schema_is_refused(compiler: GrammarCompiler) -> None:
    """Rows 39 and 40."""
    for parameters in ({"$ref": "http://example.com"}, {"properties": {"a": {"pattern": "((("}}}):
        with pytest.raises(RequestError) as caught:
            ToolSet((Tool("f", None, parameters),)).grammar(compiler)
        assert (caught.value.param, caught.value.code) == ("tools", "invalid_json_schema")


# What the model is told.


def test_tools_are_put_into_the_first_system_message() -> None:
    tools = ToolSet((WEATHER, CLOCK)).described()
    system = {"role": "system", "content": "Be brief."}
    messages, given = conversation([system, TALK[0]], tools, "{{ messages }}")
    assert given is None
    assert [message["role"] for message in messages] == ["system", "user"]
    text = messages[0]["content"]
    assert text.startswith("Be brief.\n\n")
    lines = text.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    assert [json.loads(line) for line in lines] == tools
    assert conversation([TALK[0]], tools, None)[0][0]["role"] == "system"


def test_without_tools_messages_stay_as_they_are() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    for template in (None, "{{ messages }}", KNOWING_TEMPLATE):
        assert conversation(messages, [], template) == (messages, None)


def test_calls_and_results_become_text_that_is_read_back() -> None:
    messages, _ = conversation(TALK, [], "a template that knows nothing")
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "user"]
    content, calls, _ = parse_calls(messages[1]["content"])
    assert content == ""
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("get_weather", {"days": 1}),
        ("get_weather", {"days": 2}),
    ]
    assert messages[2]["content"] == (
        "<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n</tool_response>"
    )
    assert all(isinstance(message["content"], str) for message in messages)


def test_broken_arguments_of_an_earlier_call_are_no_error() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a'}}
    turn = {"role": "assistant", "content": "Well", "tool_calls": [call]}
    for template in (None, KNOWING_TEMPLATE):
        assert conversation([turn], [], template)[0][0]["content"].startswith("Well")


@pytest.fixture
def knowing(tmp_path: Path) -> Tokenizer:
    save_tokenizer(tmp_path, chat_template=KNOWING_TEMPLATE)
    return Tokenizer.open(tmp_path)


def test_a_template_that_knows_tools_writes_them_itself(knowing: Tokenizer) -> None:
    described = ToolSet((WEATHER,)).described()
    messages, tools = conversation(TALK, described, knowing.chat_template)
    assert tools == described
    text = knowing.decode(knowing.apply_chat_template(messages, tools=tools), special=True)
    assert text.startswith(f"<tools>{json.dumps(described[0])}\n</tools>\n<|im_start|>user\n")
    assert '<tool_call>get_weather{"days": 1}</tool_call>' in text
    assert "<|im_start|>tool\n<tool_response>rain</tool_response>" in text
    assert "None" not in text


@pytest.mark.parametrize("other", ["{{ tools }}", f"<function=x>{KNOWING_TEMPLATE}"])
def test_a_template_with_a_form_of_its_own_is_not_given_tools(other: str) -> None:
    """Calls in that form could not be read back."""
    messages, tools = conversation(TALK, ToolSet((CLOCK,)).described(), other)
    assert tools is None
    assert messages[0]["role"] == "system"


def test_control_tokens_in_tools_and_calls_stay_text(
    knowing: Tokenizer, tokenizer: Tokenizer
) -> None:
    """Row 42."""
    end = SPECIAL_TOKENS.index(EOS)
    schema = {"type": "object", "properties": {EOS: {"enum": [EOS]}}, EOS: EOS}
    described = ToolSet((Tool("f", f"Say {EOS}.", schema),)).described()
    called = {"name": EOS, "arguments": json.dumps({EOS: [EOS]})}
    turn = {
        "role": "assistant",
        "content": EOS,
        "tool_calls": [{"id": "1", "type": "function", "function": called}],
    }
    for model in (knowing, tokenizer):
        messages, tools = conversation([turn], described, model.chat_template)
        ids = model.apply_chat_template(messages, tools=tools)
        assert ids.count(end) == len(messages)  # the template's own
        assert model.decode(ids).count(EOS) == 9


def test_variables_reach_the_template(knowing: Tokenizer) -> None:
    hi = [{"role": "user", "content": "Hi"}]
    text = knowing.decode(knowing.apply_chat_template(hi, variables={"shout": f"HEY{EOS}"}))
    assert text.endswith(f"assistant\nHEY{EOS}")
    for taken in ("messages", "tools", "chat_template", "eos_token"):
        with pytest.raises(RequestError) as caught:
            knowing.apply_chat_template(hi, variables={taken: "x"})
        assert caught.value.param == "chat_template_kwargs"


def test_the_last_message_can_be_left_open(tokenizer: Tokenizer) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Well {EOS}"}]
    ids = tokenizer.apply_chat_template(talk, False, continue_final_message=True)
    assert tokenizer.decode(ids, special=True).endswith(f"assistant\nWell {EOS}")
    assert ids.count(SPECIAL_TOKENS.index(EOS)) == 1
    with pytest.raises(RequestError, match="continued"):
        tokenizer.apply_chat_template(talk, True, continue_final_message=True)


# What the model may write.


def checked(text: str, tools: ToolSet) -> tuple[str, int]:
    """The content and the number of calls in an answer, each of which is one of the tools'."""
    content, calls, _ = parse_calls(text)
    schemas = {tool.name: tool.described()["function"]["parameters"] for tool in tools.offered}
    for call in calls:
        Draft202012Validator(schemas[call.name]).validate(json.loads(call.arguments))
    return content, len(calls)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("parallel", [True, False])
def test_a_required_call_is_made(
    tokenizer: Tokenizer, compiler: GrammarCompiler, parallel: bool, seed: int
) -> None:
    tools = ToolSet((WEATHER, CLOCK), ToolChoice("required"), parallel)
    content, calls = checked(answer(tokenizer, compiler, tools, seed), tools)
    assert content == ""
    assert calls >= 1 if parallel else calls == 1


def test_a_named_tool_is_called(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    tools = ToolSet((WEATHER, CLOCK), ToolChoice("required", ("clock",)))
    _, calls, _ = parse_calls(answer(tokenizer, compiler, tools, 0))
    assert {call.name for call in calls} == {"clock"}
    assert {call.arguments.replace("\n", "").replace(" ", "") for call in calls} == {"{}"}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("parallel", [True, False])
def test_where_a_call_begins_a_call_follows(
    tokenizer: Tokenizer, compiler: GrammarCompiler, parallel: bool, seed: int
) -> None:
    tools = ToolSet((WEATHER, CLOCK), ToolChoice("auto"), parallel)
    content, calls = checked(answer(tokenizer, compiler, tools, seed, "Hm\n<tool_call>"), tools)
    assert content.startswith("Hm")
    assert CALL_TRIGGER not in content
    assert calls >= 1 if parallel else (content, calls) == ("Hm", 1)


def test_a_text_without_calls_may_say_anything(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    text = answer(tokenizer, compiler, ToolSet((CLOCK,)), 1, "Two <tool> or <tool_cal")
    assert parse_calls(text) == (text, [], False)


def test_tools_that_must_not_be_called_are_no_constraint(compiler: GrammarCompiler) -> None:
    tools = ToolSet((CLOCK,), ToolChoice("none"))
    assert (tools.grammar(compiler), tools.described()) == (None, [])
