"""Text to tokens and back, one token at a time; and what a tokenizer's files may not do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from halfweave.errors import CheckpointError, HalfweaveError, RefusedError
from halfweave.runtime.llm import LLM
from halfweave.runtime.params import SamplingParams
from halfweave.runtime.request import TokenLogprob
from halfweave.runtime.tokenizer import Tokenizer
from halfweave.server.logprobs import LegacyLogprobs
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command import Command
from support.tiny import (
    EOS,
    FAMILIES,
    SPECIAL_TOKENS,
    VOCABULARY,
    edit_json,
    save_tiny,
    save_tokenizer,
)
from support.words import save_words
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoTokenizer

Copy = Callable[[Path], Path]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.open(tiny_model)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [stream.push(token) for token in ids] + [stream.finish()]


@pytest.mark.parametrize("text", ["", "The quick brown fox", "naïve 🙂 日本語", "\x00\t\n"])
def test_text_survives_the_way_there_and_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


def test_an_emoji_split_across_tokens_appears_whole(tokenizer: Tokenizer) -> None:
    """Row 37."""
    ids = tokenizer.encode("a🙂b", special=False)
    assert len(ids) == 6
    assert streamed(tokenizer, ids) == ["a", "", "", "", "🙂", "b", ""]


def test_an_emoji_that_never_becomes_whole_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂", special=False)[:-1]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == "a\ufffd"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, VOCABULARY - 9), max_size=30))
def test_any_tokens_streamed_give_the_text_of_all(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
def test_any_text_streams_to_itself(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, special=False)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_endless_rubbish_does_not_make_the_stream_slower_and_slower(tokenizer: Tokenizer) -> None:
    broken = tokenizer.encode("🙂", special=False)[0]
    control = tokenizer.encode(EOS, special=False)[0]
    stream = tokenizer.stream()
    shown = "".join(stream.push(token) for token in [broken, control] * 3000)
    assert len(shown) > 2900
    assert len(stream._ids) - stream._context < 100


def test_control_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{EOS}b", special=False)
    assert len(ids) == 3
    assert streamed(tokenizer, ids) == ["a", "", "b", ""]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_library_class_is_the_one_that_autotokenizer_chooses(name: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model", FAMILIES[name])
    assert '"TokenizersBackend"' in (directory / "tokenizer_config.json").read_text()
    chosen = AutoTokenizer.from_pretrained(directory)
    opened = Tokenizer.open(directory)
    assert type(opened._inner) is type(chosen)
    text = "<|im_start|>Two weights of every four\nare kept"
    assert opened.encode(text) == chosen(text)["input_ids"]


def test_a_tokenizer_opens_without_the_imports_that_take_seconds(tiny_model: Path) -> None:
    program = (
        "import sys; from halfweave.runtime.tokenizer import Tokenizer; "
        "Tokenizer.open(sys.argv[1]); assert 'transformers.activations' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tiny_model)], check=True)


def test_end_tokens_come_from_all_three_places(tiny_model: Path, copy_of: Copy) -> None:
    copy = copy_of(tiny_model)
    edit_json(copy / "config.json", lambda config: config.update(eos_token_id=5))
    edit_json(copy / "generation_config.json", lambda config: config.update(eos_token_id=[6, 7]))
    assert Tokenizer.open(copy).eos_ids == {5, 6, 7, SPECIAL_TOKENS.index(EOS)}


def test_code_in_the_tokenizer_config_is_refused(tiny_model: Path, copy_of: Copy) -> None:
    """Row 4."""
    copy = copy_of(tiny_model)
    hostile = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    edit_json(copy / "tokenizer_config.json", lambda config: config.update(hostile))
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(RefusedError, match="auto_map"):
        Tokenizer.open(copy)


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file"])
def test_a_path_in_the_tokenizer_config_is_refused(
    key: str, tiny_model: Path, copy_of: Copy
) -> None:
    """Row 23."""
    copy = copy_of(tiny_model)
    edit_json(copy / "tokenizer_config.json", lambda config: config.update({key: "/etc/passwd"}))
    with pytest.raises(RefusedError, match=key):
        Tokenizer.open(copy)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "not json"),
        ("tokenizer_config.json", "not json"),
        ("tokenizer_config.json", '{"a":' * 10_000),
    ],
)
def test_a_damaged_tokenizer_is_a_checkpoint_error(
    name: str, content: Any, tiny_model: Path, copy_of: Copy
) -> None:
    file = copy_of(tiny_model) / name
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(CheckpointError):
        Tokenizer.open(file.parent)


def test_a_tokenizer_config_of_50_mb_is_refused(tiny_model: Path, copy_of: Copy) -> None:
    """Row 28."""
    copy = copy_of(tiny_model)
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    save_tokenizer(copy, chat_template="x")
    big = {"chat_template": "x" * 50_000_000}
    edit_json(copy / "tokenizer_config.json", lambda config: config.update(big))
    with pytest.raises(HalfweaveError, match="bytes"):
        Tokenizer.open(copy)


def test_what_goes_on_keeps_its_first_space(tmp_path: Path) -> None:
    save_words(tmp_path, 9)
    words = Tokenizer.open(tmp_path)
    ids = words.encode("w3 w5 w1", special=False)
    assert "".join(streamed(words, ids)) == "w3 w5 w1"
    behind = words.stream(after=ids[:1])
    assert [behind.push(token) for token in ids[1:]] == [" w5", " w1"]
    offsets = LegacyLogprobs(words, True, ids[:1])
    written = offsets.written([TokenLogprob(token, -1.0, ()) for token in ids[1:]])
    assert written.text_offset == [0, 3]
    assert words.stream(after=[8]).push(ids[0]) == "w3"  # a control token begins a text


def test_offsets_of_a_prompt_that_spells_control_tokens_behind_one_that_is_added(
    tmp_path: Path,
) -> None:
    save_tokenizer(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    end = ("<|endoftext|>", backend.token_to_id("<|endoftext|>"))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{end[0]} $A", special_tokens=[end]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    adding = Tokenizer.open(tmp_path)
    text = "<|im_start|>user\nThe fox<|im_end|>\n"
    ids = adding.encode(text)
    assert ids[0] == end[1]
    scored = [TokenLogprob(token, -1.0, ()) for token in ids[1:]]
    found = LegacyLogprobs(adding, True, ids).prompt(scored, text)
    assert found.text_offset[:2] == [0, 0]
    for token, offset in zip(found.tokens[1:], found.text_offset[1:], strict=True):
        assert text[offset:].startswith(token)


def test_half_a_character_before_does_not_swallow_the_other_half(tokenizer: Tokenizer) -> None:
    first, *rest = tokenizer.encode("🙂", special=False)
    stream = tokenizer.stream(after=[first])
    shown = "".join([stream.push(token) for token in rest] + [stream.finish()])
    assert shown == tokenizer.decode(rest)


def test_a_completion_goes_on_from_its_prompt_and_a_chat_does_not(
    halfweave: Command, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model")
    save_words(model, VOCABULARY)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    with LLM(model) as llm:
        (went_on,) = llm.generate("w3 w5", params)
        answered = llm.chat([{"role": "user", "content": "w3 w5"}], params)
    assert went_on.token_ids == answered.token_ids
    assert went_on.text == " " + answered.text
    flags = ("--max-tokens", 3, "--temperature", 0)
    ran = halfweave("generate", model, "-p", "w3 w5", *flags)
    assert ran.out == went_on.text + "\n"
