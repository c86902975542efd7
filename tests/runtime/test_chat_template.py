"""Chat templates: rendered as transformers does, and harmless however hostile they are."""

from __future__ import annotations

import gc
import os
import resource
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from halfweave.errors import NoProcessError, RequestError
from halfweave.runtime import child
from halfweave.runtime.template import TemplateRenderer
from halfweave.runtime.tokenizer import Tokenizer
from support.tiny import EOS, save_tokenizer
from transformers import AutoTokenizer

HELLO = [{"role": "user", "content": "Hello"}]
TOOLS_TEMPLATE = (
    "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'bad' -%}"
    "{{ raise_exception('no such role') }}{%- endif -%}"
    "{% generation %}{{ m.content | tojson }}{% endgeneration %}{%- endfor -%}{{ eos_token }}"
)


@pytest.fixture
def with_template(tiny_model: Path, tmp_path: Path) -> Callable[[str | None], Tokenizer]:
    def make(template: str | None) -> Tokenizer:
        save_tokenizer(tmp_path, chat_template=template)
        return Tokenizer.open(tmp_path)

    return make


def test_an_interrupt_leaves_no_answer_for_the_next_question(
    with_template: Callable[[str | None], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = with_template("{{ messages[0].content }}")
    assert tokenizer.decode(tokenizer.apply_chat_template(HELLO)) == "Hello"
    real = child._write

    def interrupted(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt  # Ctrl-C, while the answer is on its way

    monkeypatch.setattr(child, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.apply_chat_template(HELLO)
    monkeypatch.undo()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Bye"}])
    assert tokenizer.decode(ids) == "Bye"


@pytest.mark.parametrize("generation", [True, False])
def test_a_conversation_becomes_the_tokens_of_transformers(
    tiny_model: Path, generation: bool
) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?\n"},
        {"role": "assistant", "content": "naïve 🙂"},
    ]
    wanted = AutoTokenizer.from_pretrained(tiny_model).apply_chat_template(
        messages, add_generation_prompt=generation, return_dict=False
    )
    assert Tokenizer.open(tiny_model).apply_chat_template(messages, generation) == wanted


def test_a_template_sees_the_special_tokens_and_transformers_extensions(
    with_template: Callable[[str | None], Tokenizer],
) -> None:
    tokenizer = with_template(TOOLS_TEMPLATE)
    wanted = tokenizer.encode(f'<|endoftext|>"Hello"{EOS}', special=False)
    assert tokenizer.apply_chat_template(HELLO) == wanted


def test_a_users_control_token_stays_text(tiny_model: Path) -> None:
    """Row 42."""
    tokenizer = Tokenizer.open(tiny_model)
    end = tokenizer.encode(EOS, special=False)[0]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": f"a{EOS}b"}])
    assert ids.count(end) == 1
    assert f"a{EOS}b" in tokenizer.decode(ids)


def test_without_a_template_chat_is_refused(
    with_template: Callable[[str | None], Tokenizer],
) -> None:
    tokenizer = with_template(None)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat_template(HELLO)


def test_what_the_template_says_reaches_the_user(
    with_template: Callable[[str | None], Tokenizer],
) -> None:
    with pytest.raises(RequestError, match="no such role"):
        with_template(TOOLS_TEMPLATE).apply_chat_template([{"role": "bad", "content": ""}])


HOSTILE = [
    "''.__class__.__mro__[1].__subclasses__()",
    "messages.__class__.__base__",
    "cycler.__init__.__globals__.os.system('true')",
    "self._TemplateReference__context.vars",
    "messages.append(1)",
    "1 / 0",
    "[0] * 10_000_000_000",
    "'x' * 100_000_000",
]


@pytest.fixture(scope="module")
def hostile() -> TemplateRenderer:
    branches = "".join(
        f"{{% if messages[0].n == {n} %}}{{{{ {expression} }}}}{{% endif %}}"
        for n, expression in enumerate(HOSTILE)
    )
    return TemplateRenderer(f"{branches}done", {})


@pytest.mark.parametrize("n", range(len(HOSTILE)), ids=HOSTILE)
def test_a_hostile_template_is_an_error_and_the_next_conversation_works(
    hostile: TemplateRenderer, n: int
) -> None:
    """Row 28."""
    with pytest.raises(RequestError):
        hostile.render([{"n": n}], True)
    assert hostile.render([{"n": -1}], True) == "done"


@pytest.mark.parametrize("template", ["{% for", "{% include '/etc/passwd' %}"])
def test_a_template_that_is_broken_or_reaches_for_files_is_an_error(template: str) -> None:
    """Row 28."""
    with pytest.raises(RequestError):
        TemplateRenderer(template, {}).render(HELLO, True)


def test_one_endless_operation_is_ended() -> None:
    """Row 28."""
    renderer = TemplateRenderer("{{ 9 ** (9 ** (9 ** 9)) }}", {}, seconds=0.2)
    with pytest.raises(RequestError, match="too long"):
        renderer.render(HELLO, True)


def test_an_endless_conversation_is_ended_and_does_not_spoil_the_next_one() -> None:
    """Row 28."""
    template = (
        "{% for a in range(messages[0].n) %}{% for b in range(messages[0].n) %}"
        "{% endfor %}{% endfor %}done"
    )
    renderer = TemplateRenderer(template, {}, seconds=0.3)
    assert renderer.render([{"n": 1}], True) == "done"
    with pytest.raises(RequestError, match="too long"):
        renderer.render([{"n": 99999}], True)
    assert renderer.render([{"n": 2}], True) == "done"


def test_a_template_of_50_mb_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Row 28."""
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x" * 50_000_000)
    with pytest.raises(RequestError, match="characters"):
        Tokenizer.open(tmp_path).apply_chat_template(HELLO)


def test_messages_that_are_no_json_are_refused() -> None:
    renderer = TemplateRenderer("x", {})
    loop: list[Any] = []
    loop.append(loop)
    for content in (object(), loop):
        with pytest.raises(RequestError):
            renderer.render([{"role": "user", "content": content}], True)


def test_threads_share_one_renderer() -> None:
    renderer = TemplateRenderer("{{ messages[0].content }}", {})
    wrong: list[str] = []

    def render(name: str) -> None:
        for _ in range(20):
            text = renderer.render([{"content": name}], True)
            wrong.extend([text] if text != name else [])

    threads = [threading.Thread(target=render, args=(f"thread {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_renderer_that_is_dropped_leaves_no_process() -> None:
    renderer = TemplateRenderer("x", {})
    renderer.render(HELLO, True)
    child = renderer._child
    assert child is not None
    del renderer
    assert child.poll() is not None


def test_processes_that_ended_are_not_kept() -> None:
    template = (
        "{% if messages[0].n %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}done"
    )
    renderer = TemplateRenderer(template, {}, seconds=0.3)
    ended: list[weakref.ref[Any]] = []
    for _ in range(2):
        assert renderer.render([{"n": 0}], True) == "done"
        assert renderer._child is not None
        ended.append(weakref.ref(renderer._child))
        with pytest.raises(RequestError, match="too long"):
            renderer.render([{"n": 1}], True)
        assert renderer.render([{"n": 0}], True) == "done"
        ended.append(weakref.ref(renderer._child))
        renderer._child.kill()  # as the system does when memory runs out
        renderer._child.wait()
    assert renderer.render([{"n": 0}], True) == "done"
    gc.collect()
    assert [process() for process in ended] == [None] * 4


def test_without_files_to_spare_a_template_has_to_wait_and_works_afterwards(
    tiny_model: Path,
) -> None:
    tokenizer = Tokenizer.open(tiny_model)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, hard))
    try:
        with pytest.raises(NoProcessError, match="no process could be started"):
            tokenizer.apply_chat_template(HELLO)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert tokenizer.apply_chat_template(HELLO)
