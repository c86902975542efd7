"""Text to token ids and back, by transformers' tokenizer. Knows no model and no requests.

Chat templates come from the checkpoint and are therefore hostile until proved otherwise: they are
rendered by transformers' sandboxed Jinja, bounded in size, and in a process of their own with a
time limit, since a template may loop for ever and Python cannot stop a thread.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, RefusedError, RequestError
from ..files import read_json
from .fields import token_ids

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

MAX_TEMPLATE_CHARS = 200_000
TEMPLATE_SECONDS = 20.0
_INCOMPLETE = "\ufffd"  # what a decoder makes of bytes that are no character yet

Message = Mapping[str, Any]


class Tokenizer:
    """The tokenizer of one model directory. Make it with `open`. Safe to use from threads."""

    def __init__(self, path: Path, inner: Any, eos_ids: frozenset[int]) -> None:
        self._path = path
        self._inner = inner
        self.eos_ids = eos_ids

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Load from local files only; no code of the checkpoint is run.

        Raises:
            RefusedError: the tokenizer's config asks for code of its own.
            CheckpointError: there is no usable tokenizer, or an end token is out of range.
        """
        from transformers import AutoTokenizer

        directory = Path(path)
        settings = directory / "tokenizer_config.json"
        if settings.exists() and "auto_map" in read_json(settings):
            raise RefusedError(f"{settings} has an auto_map: code from a checkpoint is never run")
        try:
            inner = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the library raises a dozen kinds for one damaged file
            raise CheckpointError(f"{directory}: no usable tokenizer: {error}") from error
        return cls(directory, inner, _eos_ids(directory, inner))

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self._inner)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; with `special`, whatever the model puts around a text too."""
        ids: list[int] = self._inner(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self) -> TextStream:
        """A decoder for tokens that arrive one at a time."""
        return TextStream(self)

    @cached_property
    def has_chat_template(self) -> bool:
        """Whether the model comes with a chat template."""
        return self._template is not None

    @cached_property
    def _template(self) -> str | None:
        template = getattr(self._inner, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        return template if isinstance(template, str) else None

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, ready to be continued by the assistant.

        Raises:
            RequestError: there is no template, or it fails on these messages, or takes too long.
        """
        if self._template is None:
            raise RequestError(
                "the model has no chat template; use plain completions instead", "messages"
            )
        if len(self._template) > MAX_TEMPLATE_CHARS:
            raise RequestError(f"the chat template has over {MAX_TEMPLATE_CHARS} characters")
        text = self._render(list(messages), add_generation_prompt)
        return self.encode(text, special=False)

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        # fork: the child needs the loaded tokenizer, and lives for one rendering.
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        arguments = (sender, self._inner, messages, add_generation_prompt)
        child = context.Process(target=_render_in_child, args=arguments, daemon=True)
        child.start()
        sender.close()
        try:
            if not receiver.poll(TEMPLATE_SECONDS):
                raise RequestError(f"the chat template took over {TEMPLATE_SECONDS:g} seconds")
            kind, text = receiver.recv()
        except EOFError as error:
            raise RequestError("the chat template could not be rendered") from error
        finally:
            child.kill()
            child.join()
            receiver.close()
        if kind == "error":
            raise RequestError(f"the chat template refused these messages: {text}", "messages")
        return str(text)


class TextStream:
    """Turns tokens into text as they arrive, holding back characters that are not whole yet."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # first token of the window that is decoded
        self._emitted = 0  # tokens before here have had their text returned

    def push(self, token: int) -> str:
        """Text that has become certain with this token; may be empty."""
        self._ids.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """Whatever was held back, incomplete characters included."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        # The window starts before the new tokens, since a token's text may depend on its
        # neighbours (a leading space, say); the difference of the two decodings is the new text.
        before = self._tokenizer.decode(self._ids[self._context : self._emitted])
        after = self._tokenizer.decode(self._ids[self._context :])
        if len(after) <= len(before) or (after.endswith(_INCOMPLETE) and not final):
            return ""
        self._context, self._emitted = self._emitted, len(self._ids)
        return after[len(before) :]


def _render_in_child(
    sender: Connection, inner: Any, messages: list[Message], add_generation_prompt: bool
) -> None:
    try:
        text = inner.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        sender.send(("text", text))
    except Exception as error:  # a template can raise anything; the message goes to the user
        sender.send(("error", str(error)[:200]))


def _eos_ids(directory: Path, inner: Any) -> frozenset[int]:
    """End tokens named by generation_config.json, config.json and the tokenizer together."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (directory / name).exists():
            found.update(token_ids(read_json(directory / name), "eos_token_id"))
    if inner.eos_token_id is not None:
        found.add(int(inner.eos_token_id))
    return frozenset(found)
