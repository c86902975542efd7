"""Text to token ids and back, by transformers' tokenizer. Knows no model and no requests.

Chat templates are rendered by template.py, and users' words kept apart from the template's control
tokens by control.py.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RefusedError, RequestError, UnsupportedModel
from ..files import read_json
from .control import ControlTokens
from .fields import token_ids
from .template import Scalar, TemplateRenderer

MAX_TEMPLATE_CHARS = 200_000
_PLAIN = "TokenizersBackend"  # what transformers writes for a tokenizer.json and nothing else
_OVERRULED = ("qwen2",)  # families for which AutoTokenizer trusts no settings
_MOST_HELD_TOKENS = 32  # far over the four bytes of a character: these are no characters at all
_INCOMPLETE = "\ufffd"  # what a decoder makes of bytes that are no character yet
_FILE_KEYS = ("vocab_file", "merges_file", "tokenizer_file", "added_tokens_file", "spm_file")

Message = Mapping[str, Any]


class Tokenizer:
    """The tokenizer of one model directory. Make it with `open`. Safe to use from threads."""

    def __init__(self, path: Path, inner: Any, eos_ids: frozenset[int]) -> None:
        self._path = path
        self._inner = inner
        self._lock = threading.Lock()
        added = inner.added_tokens_decoder
        self._control_ids = frozenset(at for at, token in added.items() if token.special)
        self._control_tokens = [str(added[at].content) for at in sorted(self._control_ids)]
        self.eos_ids = eos_ids

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Load from local files only; no code of the checkpoint is run.

        Raises:
            RefusedError: the tokenizer's config asks for code of its own.
            CheckpointError: there is no usable tokenizer, or an end token is out of range.
        """
        directory = Path(path)
        settings = directory / "tokenizer_config.json"
        config = read_json(settings) if settings.exists() else {}
        _refuse_unsafe(settings, config)
        try:
            inner = _library_class(directory, config).from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the library raises a dozen kinds for one damaged file
            raise CheckpointError(f"{directory}: no usable tokenizer: {error}") from error
        return cls(directory, inner, _eos_ids(directory, inner))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return 1 + max(self._inner.get_vocab().values(), default=-1)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; with `special`, whatever the model puts around a text too."""
        return self._encode(text, add_special_tokens=special, split_special_tokens=False)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of token ids, without special tokens, or with them."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=not special)
        return text

    def piece(self, token: int) -> str | None:
        """A token as its vocabulary writes it; None for an id that it lacks."""
        found: str | None = self._inner.convert_ids_to_tokens(token)
        return found

    def is_added(self, token: int) -> bool:
        """Whether a token was added to the vocabulary as it is, as control tokens are."""
        return token in self._inner.added_tokens_decoder

    @cached_property
    def byte_level(self) -> bool:
        """Whether the vocabulary writes bytes as letters."""
        return "ByteLevel" in repr(self._inner.backend_tokenizer.decoder)

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, if the tokenizer names one."""
        found: int | None = self._inner.bos_token_id
        return found

    @property
    def eos_id(self) -> int | None:
        """The token that the tokenizer itself says ends a text; `eos_ids` has the model's too."""
        found: int | None = self._inner.eos_token_id
        return found

    @property
    def control_ids(self) -> frozenset[int]:
        """The tokens that `decode` leaves out."""
        return self._control_ids

    def is_control(self, token: int) -> bool:
        """Whether a token is one of those that `decode` leaves out."""
        return token in self._control_ids

    def plain_backend(self) -> Any:
        """A copy of the tokenizers library's own object that takes control tokens for plain text.

        Raises:
            UnsupportedModel: the tokenizer is not one of that library's.
        """
        with self._lock:
            backend = copy.deepcopy(getattr(self._inner, "backend_tokenizer", None))
        if backend is None:
            raise UnsupportedModel(f"{self._path}: no tokenizer of the tokenizers library")
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        return backend

    def stream(self, skip_special: bool = True, after: Sequence[int] = ()) -> TextStream:
        """A decoder for tokens that arrive one at a time, behind those that were there before."""
        return TextStream(self, skip_special, after)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model comes with a chat template."""
        return self.chat_template is not None

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template, if there is one."""
        template = getattr(self._inner, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        return template if isinstance(template, str) else None

    @cached_property
    def _renderer(self) -> TemplateRenderer:
        template = self.chat_template
        if template is None:
            raise RequestError(
                "the model has no chat template; use plain completions instead", "messages"
            )
        if len(template) > MAX_TEMPLATE_CHARS:
            raise RequestError(f"the chat template has over {MAX_TEMPLATE_CHARS} characters")
        return TemplateRenderer(template, self._inner.special_tokens_map)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Scalar] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of a conversation, ready to be continued by the assistant.

        `tools` and `variables` are for the template to use or not. Control tokens come from the
        template alone: in everything that is given here they are plain text.

        Raises:
            RequestError: there is no template, or it fails on these messages, or takes too long; or
                something is nested too deeply.
        """
        control = ControlTokens(self._control_tokens)
        text = self._renderer.render(
            control.hide(list(messages), "messages"),
            add_generation_prompt,
            None if tools is None else control.hide(list(tools), "tools"),
            control.hide(variables or {}),
            continue_final_message,
        )
        return control.encode(text, self._encode_part)

    def chat_text(
        self, messages: Sequence[Message], add_generation_prompt: bool, open_end: bool
    ) -> str:
        """The text of a conversation, its last message left open if `open_end`.

        Tokenized again, control tokens that a message spells out are control tokens: this is for
        whoever trusts the messages. `apply_chat_template` is for all others.

        Raises as `apply_chat_template`.
        """
        return self._renderer.render(
            messages, add_generation_prompt, continue_final_message=open_end
        )

    def _encode_part(self, text: str, plain: bool) -> list[int]:
        return self._encode(text, add_special_tokens=False, split_special_tokens=plain)

    def _encode(self, text: str, **options: bool) -> list[int]:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RequestError("the text is not UTF-8") from error
        with self._lock:  # the options are attributes of the one shared tokenizer
            ids: list[int] = self._inner(text, verbose=False, **options)["input_ids"]
        return ids


class TextStream:
    """Turns tokens into text as they arrive, holding back characters that are not whole yet."""

    def __init__(
        self, tokenizer: Tokenizer, skip_special: bool = True, after: Sequence[int] = ()
    ) -> None:
        """`after` are tokens whose text is written already; many tokenizers strip the first space
        of what they decode, which is one of the text's own if it has something before it."""
        self._tokenizer, self._skip_special = tokenizer, skip_special
        last = [token for token in after[-1:] if not tokenizer.is_control(token)]
        whole = not tokenizer.decode(last, True).endswith(_INCOMPLETE)
        self._ids = last if whole else []
        self._context = 0  # first token of the window that is decoded
        self._emitted = len(self._ids)  # tokens before here have had their text returned

    def push(self, token: int) -> str:
        """Text that has become certain with this token; may be empty."""
        if self._skip_special and self._tokenizer.is_control(token):
            return ""  # it has no text, and must not make the window grow
        self._ids.append(token)
        return self._advance(final=len(self._ids) - self._emitted > _MOST_HELD_TOKENS)

    def finish(self) -> str:
        """Whatever was held back, incomplete characters included."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        # The window starts before the new tokens, since a token's text may depend on its
        # neighbours (a leading space, say); the difference of the two decodings is the new text.
        special = not self._skip_special
        before = self._tokenizer.decode(self._ids[self._context : self._emitted], special)
        after = self._tokenizer.decode(self._ids[self._context :], special)
        if len(after) <= len(before) or (after.endswith(_INCOMPLETE) and not final):
            return ""
        self._context, self._emitted = self._emitted, len(self._ids)
        return after[len(before) :]


def _library_class(directory: Path, settings: Mapping[str, Any]) -> Any:
    """AutoTokenizer; or the class that it would choose, where the settings name the plain one.

    That saves the import of what AutoTokenizer needs to choose, which takes seconds.
    """
    config = directory / "config.json"
    family = read_json(config).get("model_type") if config.exists() else None
    if settings.get("tokenizer_class") == _PLAIN and family not in _OVERRULED:
        from transformers.tokenization_utils_tokenizers import TokenizersBackend

        return TokenizersBackend
    from transformers import AutoTokenizer

    return AutoTokenizer


def _refuse_unsafe(settings: Path, config: Mapping[str, Any]) -> None:
    """No code, and no files but the directory's own, which the library would find by itself."""
    if "auto_map" in config:
        raise RefusedError(f"{settings} has an auto_map: code from a checkpoint is never run")
    named = [key for key in _FILE_KEYS if config.get(key) is not None]
    if named:
        raise RefusedError(
            f"{settings} has a {named[0]}: no path in a checkpoint is followed",
            "remove that key; the tokenizer's own files are found without it",
        )


def _eos_ids(directory: Path, inner: Any) -> frozenset[int]:
    """End tokens named by generation_config.json, config.json and the tokenizer together."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (directory / name).exists():
            found.update(token_ids(read_json(directory / name), "eos_token_id"))
    if inner.eos_token_id is not None:
        found.add(int(inner.eos_token_id))
    return frozenset(found)
