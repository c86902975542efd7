"""POST /v1/chat/completions, through the official client at its strictest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from halfweave.runtime.model import Model, load_model
from support.http_server import Live, live_server, run
from support.tiny import VOCABULARY, save_tiny, save_tokenizer
from support.words import save_words

TURNS: list[Any] = [
    {"role": "system", "content": "Speak in riddles."},
    {"role": "user", "content": "What is kept?"},
]


def test_a_message_that_is_continued_keeps_the_first_space(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    save_words(path, VOCABULARY)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (path / "chat_template.jinja").write_text(template)
    asked = {"logit_bias": {"7": 100}, "max_tokens": 2, "add_generation_prompt": False}
    with live_server(load_model(path)) as words:
        answers = [
            words.chat(
                messages=[{"role": "assistant", "content": "w3 w5"}],
                continue_final_message=continued,
                **asked,
            ).json
            for continued in (True, False)
        ]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts == [" w7 w7", "w7 w7"]


def test_a_reply_is_the_continuation_of_the_rendered_template(
    live: Live, served_model: Model
) -> None:
    ids = served_model.tokenizer.apply_chat_template(TURNS)
    same = live.complete(prompt=ids, temperature=0, max_tokens=10).json
    answer = live.client().chat.completions.create(
        model=live.model, messages=TURNS, temperature=0, max_completion_tokens=10
    )
    assert answer.choices[0].message.content == same["choices"][0]["text"]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == same["choices"][0]["finish_reason"]
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)


def test_a_stream_says_what_the_whole_reply_says(live: Live) -> None:
    client = live.client()
    whole = client.chat.completions.create(
        model=live.model, messages=TURNS, temperature=0, max_tokens=20
    )
    with client.chat.completions.create(
        model=live.model,
        messages=TURNS,
        temperature=0,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage == whole.usage


def test_chunks_carry_exactly_the_keys_of_the_api(live: Live) -> None:
    first, *middle, end, done = live.chat(stream=True, temperature=0, ignore_eos=True).events
    assert done == "[DONE]"
    keys = {"id", "object", "created", "model", "choices"}
    assert set(first) == keys
    assert set(end) == keys | {"timings"}
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
    assert end["choices"][0]["delta"] == {}
    assert {chunk["object"] for chunk in (first, *middle, end)} == {"chat.completion.chunk"}


def test_the_asynchronous_client_streams(live: Live) -> None:
    async def ask() -> str:
        async with live.async_client() as client:
            stream = await client.chat.completions.create(
                model=live.model, messages=TURNS, temperature=0, max_tokens=12, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    whole = live.chat(messages=TURNS, temperature=0, max_tokens=12).json
    assert run(ask()) == whole["choices"][0]["message"]["content"]


def test_text_parts_are_one_text(live: Live) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "kept?"}]
    fields = {"temperature": 0, "max_tokens": 8}
    as_parts = live.chat(messages=[{"role": "user", "content": parts}], **fields).json
    as_text = live.chat(messages=[{"role": "user", "content": "What is kept?"}], **fields).json
    assert as_parts["choices"] == as_text["choices"]
    counts = ("prompt_tokens", "completion_tokens")
    assert all(as_parts["usage"][each] == as_text["usage"][each] for each in counts)


def test_a_developer_speaks_as_the_system(live: Live) -> None:
    def ask(role: str) -> Any:
        turns = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        return live.chat(messages=turns, temperature=0).json["choices"]

    assert ask("developer") == ask("system")


def test_what_the_client_gives_back_of_a_reply_is_accepted(live: Live) -> None:
    client = live.client()
    reply = client.chat.completions.create(model=live.model, messages=TURNS, max_tokens=4)
    again = [*TURNS, reply.choices[0].message.model_dump(), {"role": "user", "content": "Why?"}]
    assert client.chat.completions.create(model=live.model, messages=again, max_tokens=4).choices


def test_without_a_limit_the_reply_may_fill_the_context(live: Live, served_model: Model) -> None:
    usage = live.chat(max_tokens=None, ignore_eos=True).json["usage"]
    assert usage["total_tokens"] == served_model.max_model_len


def test_a_conversation_too_long_for_the_context_names_the_messages(live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        live.client().chat.completions.create(
            model=live.model, messages=[{"role": "user", "content": "riddle " * 500}]
        )
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"


def test_a_template_that_refuses_the_messages_is_a_client_error(
    copy_of: Any, tiny_model: Any
) -> None:
    directory = copy_of(tiny_model)
    for leftover in directory.glob("chat_template*"):
        leftover.unlink()
    save_tokenizer(directory, chat_template="{{ raise_exception('only users may speak') }}")
    with live_server(load_model(directory)) as strict:
        answer = strict.chat()
        assert answer.status == 400
        assert answer.error["param"] == "messages"
        assert "only users may speak" in answer.error["message"]
        assert strict.complete().status == 200


def test_a_model_without_a_template_still_completes(copy_of: Any, tiny_model: Any) -> None:
    directory = copy_of(tiny_model)
    for leftover in directory.glob("chat_template*"):
        leftover.unlink()
    save_tokenizer(directory, chat_template=None)
    with live_server(load_model(directory)) as plain:
        assert plain.chat().status == 400
        assert plain.complete().status == 200


def test_special_tokens_in_a_message_are_only_what_the_template_makes_of_them(live: Live) -> None:
    """Row 42: the server itself adds and removes nothing."""
    answer = live.chat(messages=[{"role": "user", "content": "<|im_end|> \x00 \u2028"}])
    assert answer.status == 200
