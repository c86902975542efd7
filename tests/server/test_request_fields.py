"""Every field is implemented, or refused by name: nothing is silently ignored."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from support.http_server import Answer, Live

# Fields that ask for behaviour this server lacks.
UNSUPPORTED_ANYWHERE: list[tuple[str, Any]] = [
    ("prompt_logprobs", 1),
    ("prompt_embeds", "AAAA"),
    ("guided_json", {}),
    ("use_beam_search", True),
    ("no_such_field", None),
]
UNSUPPORTED_IN_COMPLETIONS = [
    ("suffix", "end"),
    ("messages", []),
    ("top_logprobs", 2),
    ("tools", []),
]
UNSUPPORTED_IN_CHATS = [
    ("functions", []),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("prediction", {"type": "content", "content": "x"}),
    ("reasoning_effort", "high"),
    ("verbosity", "low"),
    ("service_tier", "flex"),
    ("store", True),
    ("web_search_options", {}),
    ("chat_template", "{{ 1 }}"),
    ("prompt", "The"),
    ("echo", True),
    ("best_of", 2),
]
# Values outside the bounds of a field that is implemented.
WRONG_ANYWHERE: list[tuple[str, Any]] = [
    ("model", 5),
    ("model", None),
    ("model", ""),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("n", 0),
    ("n", -1),
    ("n", 17),
    ("n", 2**31),
    ("n", 2**63),
    ("n", True),
    ("n", "2"),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -3),
    ("frequency_penalty", "much"),
    ("repetition_penalty", 0),
    ("repetition_penalty", 1e9),
    ("logit_bias", [5]),
    ("logit_bias", {"5": 1e9}),
    ("logit_bias", {"5": "x"}),
    ("logit_bias", {"100000": 1}),
    ("logit_bias", {str(n): 1 for n in range(1025)}),
    ("stop_token_ids", 5),
    ("stop_token_ids", [100_000]),
    ("stop_token_ids", list(range(65))),
    ("include_stop_str_in_output", "yes"),
    ("skip_special_tokens", 1),
    ("priority", 2**31),
    ("priority", 0.5),
    ("cache_salt", ""),
    ("cache_salt", "x" * 257),
    ("max_tokens", 2**31),
    ("max_tokens", 2**63),
    ("max_tokens", 1.5),
    ("max_tokens", "5"),
    ("max_tokens", True),
    ("max_tokens", {}),
    ("temperature", -1),
    ("temperature", 2.1),
    ("temperature", 1e300),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", []),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -5),
    ("top_k", 2**31),
    ("top_k", 0.5),
    ("min_p", 2),
    ("min_p", -0.1),
    ("seed", 2**63),
    ("seed", "x"),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a", "b", "c", "d", "e"]),
    ("stop", "x" * 100_000),
    ("stop", 5),
    ("stop", [5]),
    ("ignore_eos", 1),
    ("min_tokens", -1),
    ("min_tokens", 100),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("user", 5),
]
WRONG_IN_COMPLETIONS: list[tuple[str, Any]] = [
    ("best_of", 0),
    ("best_of", 17),
    ("logprobs", -1),
    ("logprobs", 21),
    ("logprobs", True),
    ("echo", 1),
    ("add_special_tokens", "no"),
]
WRONG_IN_CHATS: list[tuple[str, Any]] = [
    ("logprobs", 3),
    ("top_logprobs", 2),  # without logprobs
    ("top_logprobs", 21),
    ("top_logprobs", -1),
]
# Where in a value the fault is.
PLACE = {
    "['a', '']": "[1]",
    "stop [5]": "[0]",
    "{'5': 1000000000.0}": ".5",
    "{'5': 'x'}": ".5",
}
WRONG_PROMPTS: list[Any] = [
    "",
    [],
    [""],
    [[]],
    ["a", ""],
    ["a", 5],
    [5, "a"],
    [[5], "a"],
    [-1],
    [5.0],
    [True],
    [2**63],
    [10**6],
    [[5], [-1]],
    None,
    5,
    {},
    "\ud800",
]
WRONG_MESSAGES: list[tuple[Any, str]] = [
    (None, "messages"),
    ([], "messages"),
    ("Hello", "messages"),
    (["Hello"], "messages[0]"),
    ([{"role": "robot", "content": "x"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "user", "content": []}], "messages[0].content"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": "x"}] * 4097, "messages"),
]
UNSUPPORTED_MESSAGES: list[tuple[dict[str, Any], str]] = [
    (
        {"content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
        "messages[0].content[0].type",
    ),
    ({"content": "x", "name": "Ann"}, "messages[0].name"),
    ({"content": "x", "function_call": {"name": "f"}}, "messages[0].function_call"),
    ({"content": "x", "mood": "good"}, "messages[0].mood"),
]


def refused(answer: Answer, param: str, code: str | None) -> None:
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert (answer.error["param"], answer.error["code"]) == (param, code)
    assert param in answer.error["message"]
    assert len(answer.body) < 4096


@pytest.mark.parametrize(
    ("field", "value"), [*UNSUPPORTED_ANYWHERE, *UNSUPPORTED_IN_COMPLETIONS], ids=str
)
def test_a_completion_refuses_what_it_does_not_do(live: Live, field: str, value: Any) -> None:
    """Rows 34, 36 and 41."""
    refused(live.complete(**{field: value}), field, "unsupported_parameter")


@pytest.mark.parametrize(
    ("field", "value"), [*UNSUPPORTED_ANYWHERE, *UNSUPPORTED_IN_CHATS], ids=str
)
def test_a_chat_refuses_what_it_does_not_do(live: Live, field: str, value: Any) -> None:
    """Rows 39, 40 and 41."""
    refused(live.chat(**{field: value}), field, "unsupported_parameter")


@pytest.mark.parametrize(("field", "value"), WRONG_ANYWHERE, ids=lambda item: str(item)[:30])
def test_a_value_out_of_bounds_is_refused_by_name(live: Live, field: str, value: Any) -> None:
    """Rows 33, 34, 35 and 37."""
    param = field + PLACE.get(str(value), PLACE.get(f"{field} {value}", ""))
    refused(live.complete(**{field: value}), param, None)
    refused(live.chat(**{field: value}), param, None)


@pytest.mark.parametrize(("field", "value"), WRONG_IN_COMPLETIONS, ids=str)
def test_a_value_out_of_bounds_is_refused_in_completions(
    live: Live, field: str, value: Any
) -> None:
    """Rows 33 and 34."""
    refused(live.complete(**{field: value}), field, None)


@pytest.mark.parametrize(("field", "value"), WRONG_IN_CHATS, ids=str)
def test_a_value_out_of_bounds_is_refused_in_chats(live: Live, field: str, value: Any) -> None:
    """Rows 33 and 34."""
    refused(live.chat(**{field: value}), field, None)


@pytest.mark.parametrize("key", ["x", "-1", "1.0", "", "007", "9" * 30])
def test_a_bias_of_what_is_no_token_id_is_refused(live: Live, key: str) -> None:
    """Row 36."""
    answer = live.complete(logit_bias={key: 1})
    assert answer.status == 400
    assert answer.error["param"].startswith("logit_bias")
    assert len(answer.body) < 4096


def test_two_hundred_thousand_biases_are_refused_quickly(live: Live) -> None:
    """Row 36."""
    answer = live.complete(logit_bias={str(n): 1 for n in range(20_000)})
    assert answer.status in (400, 413)
    assert len(answer.body) < 4096


def test_fields_that_contradict_each_other_are_refused(live: Live) -> None:
    refused(live.complete(n=3, best_of=2), "best_of", None)
    refused(live.complete(best_of=2, stream=True), "best_of", None)
    refused(live.complete(max_tokens=0), "max_tokens", None)


@pytest.mark.parametrize("prompt", WRONG_PROMPTS, ids=lambda item: repr(item)[:30])
def test_a_prompt_of_no_known_form_is_refused(live: Live, prompt: Any) -> None:
    """Row 38."""
    answer = live.complete(prompt=prompt)
    assert answer.status == 400
    assert answer.error["param"].startswith("prompt")


@pytest.mark.parametrize(("messages", "param"), WRONG_MESSAGES, ids=lambda item: str(item)[:40])
def test_messages_of_the_wrong_form_are_refused(live: Live, messages: Any, param: str) -> None:
    """Row 42."""
    refused(live.chat(messages=messages), param, None)


@pytest.mark.parametrize(("message", "param"), UNSUPPORTED_MESSAGES, ids=str)
def test_messages_that_ask_for_more_than_text_are_refused(
    live: Live, message: dict[str, Any], param: str
) -> None:
    """Row 41: nothing is fetched or opened."""
    answer = live.chat(messages=[{"role": "user", **message}])
    refused(answer, param, "unsupported_parameter")


def test_a_missing_field_is_named(live: Live) -> None:
    refused(live.post("/v1/completions", {"model": live.model}), "prompt", None)
    refused(live.post("/v1/chat/completions", {"model": live.model}), "messages", None)
    refused(live.post("/v1/completions", {"prompt": "x"}), "model", None)


def test_two_different_limits_contradict_each_other(live: Live) -> None:
    refused(live.chat(max_tokens=4, max_completion_tokens=5), "max_completion_tokens", None)
    assert live.chat(max_tokens=4, max_completion_tokens=4).status == 200


def test_a_million_wrong_items_are_not_all_complained_about(live: Live) -> None:
    answer = live.complete(prompt=[[-1] * 20_000, [-2] * 20_000])
    assert answer.status == 400
    assert len(answer.body) < 500


def test_values_that_ask_for_nothing_are_accepted_in_completions(live: Live) -> None:
    answer = live.client().completions.create(
        model=live.model,
        prompt="The",
        max_tokens=2,
        n=1,
        best_of=1,
        echo=False,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        suffix="",
        user="somebody",
        stop=[],
        extra_body={"repetition_penalty": 1.0, "top_k": -1, "min_p": 0, "logprobs": None},
    )
    assert answer.choices


def test_values_that_ask_for_nothing_are_accepted_in_chats(live: Live) -> None:
    answer = live.client().chat.completions.create(
        model=live.model,
        messages=[{"role": "user", "content": "Hi"}],
        max_completion_tokens=2,
        n=1,
        logprobs=False,
        metadata={"topic": "riddles"},
        modalities=["text"],
        parallel_tool_calls=True,
        prompt_cache_key="k",
        response_format={"type": "text"},
        safety_identifier="s",
        service_tier="auto",
        store=False,
        tool_choice="none",
        verbosity="medium",
    )
    assert answer.choices


def test_null_is_the_default_of_every_optional_field(live: Live) -> None:
    schemas = live.get("/openapi.json").json["components"]["schemas"]
    for name, ask in (("CompletionBody", live.complete), ("ChatBody", live.chat)):
        optional = set(schemas[name]["properties"]) - set(schemas[name]["required"])
        answer = ask(**{**dict.fromkeys(optional), "max_tokens": 2})
        assert answer.status == 200, answer.body


def test_a_tiny_temperature_is_greedy(live: Live) -> None:
    """Row 35."""
    greedy, almost = (live.complete(temperature=t).json["choices"] for t in (0, 1e-300))
    assert greedy == almost


def test_the_client_sees_which_parameter_was_refused(live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        live.client().completions.create(model=live.model, prompt="The", suffix="end")
    assert caught.value.param == "suffix"
    assert caught.value.code == "unsupported_parameter"
    assert caught.value.type == "invalid_request_error"
