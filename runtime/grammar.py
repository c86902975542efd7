"""Holds answers to a form: any JSON object, JSON of a schema, or calls of functions.

llguidance says which tokens may come next. A schema comes from a client and is hostile until proved
otherwise, and not everything that compiling one does counts against llguidance's own limits: 1500
`patternProperties` take minutes, and a chain of 1200 `$ref` overflows the stack. So a grammar is
first tried out in a process that can be ended, and compiled here only if that went well. Knows
nothing of requests.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from ..errors import RequestError, UnsupportedModel
from .child import Child, ChildEnded
from .tokenizer import Tokenizer

MAX_SCHEMA_CHARS = 2**16
MAX_GRAMMAR_CHARS = 2**18  # of all tools together
COMPILE_SECONDS = 1.0  # of processor time in the child, and as much again here
COMPILE_BYTES = 2**28
INVALID_SCHEMA = "invalid_json_schema"
_MAX_CACHED = 16
# Measured: a hostile pattern then costs 4 ms a token and 12 MB an answer, and 16 MB in the cache;
# formats, real patterns and a schema of all of them together need half as much. States grow with
# the length of a string whose length is bounded: there are enough for some 8000 characters.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,  # they would quote the schema
}
# Half of the smallest that this process' own threads may have, so what fits there fits here.
_STACK_BYTES = 2**20
_CHILD = "grammar_child"
# A space, or a line with its indentation: a model cannot fill its answer with blanks.
_WHITESPACE = r"[ ]|\n[ \t]{0,20}"
_MAX_ERROR_CHARS = 300


@dataclass(frozen=True)
class CallForm:
    """One function that may be called: `begin`, arguments as JSON of a schema, `end`.

    With `strict` a schema with keywords that cannot be kept is refused; else they are ignored.
    """

    begin: str
    arguments: Mapping[str, Any]
    end: str
    strict: bool = True


@dataclass(frozen=True)
class Grammar:
    """A form that answers can have, compiled for one tokenizer.

    `words` is the number of tokens that the tokenizer knows, `ends` are those that end an answer;
    `param` names the request's field that asked for the form.
    """

    matcher: LLMatcher
    words: int
    ends: NDArray[np.int64]
    param: str

    def constraint(self) -> AnswerConstraint:
        """The constraint of one answer, which is at its beginning. May be called from threads."""
        return AnswerConstraint(self)


class AnswerConstraint:
    """Which tokens may come next in one answer; see `request.Constraint`."""

    def __init__(self, grammar: Grammar) -> None:
        self._matcher = grammar.matcher.deep_copy()
        self._words, self._ends, self._param = grammar.words, grammar.ends, grammar.param

    def forbid(self, scores: NDArray[np.float32]) -> None:
        """Set the scores [vocab] of tokens that may not come next to -inf, in place.

        End tokens are allowed where the form is complete, and nowhere else. Rows of the model that
        the tokenizer lacks are forbidden.

        Raises:
            RequestError: the form has become too complex to follow.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(mask, count=len(scores), bitorder="little").view(np.bool_)
        allowed[self._words :] = False  # the matcher's own end token may be a row of the model
        allowed[self._ends[self._ends < len(scores)]] = self._matcher.is_accepting()
        np.copyto(scores, -np.inf, where=~allowed)

    def take(self, token: int) -> None:
        """The token has been written.

        Raises:
            RequestError: it is not allowed here, or the form has become too complex to follow.
        """
        if token not in self._ends:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _invalid(self._matcher.get_error(), self._param)


class GrammarCompiler:
    """Makes grammars for one tokenizer. Compiling takes milliseconds: keep it off event loops.

    Safe to use from threads; one grammar at a time is compiled, so that hostile ones can take no
    more than a core. The first takes a second more.
    """

    def __init__(self, tokenizer: Tokenizer, seconds: float = COMPILE_SECONDS) -> None:
        self._tokenizer = tokenizer
        setup = {
            "limits": _LIMITS,
            "seconds": seconds,
            "bytes": COMPILE_BYTES,
            "stack_bytes": _STACK_BYTES,
        }
        self._child = Child(_CHILD, setup)
        self._lock = threading.Lock()
        self._compiled = lru_cache(_MAX_CACHED)(self._compile)

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any], strict: bool = True) -> Grammar:
        """JSON that the schema (draft 2020-12) allows, its properties in the schema's order.

        With `strict` a schema with keywords that cannot be kept is refused; else they are ignored.

        Raises:
            RequestError: the schema is not valid, not satisfiable, too large, refers to anything
                outside of itself, or takes too long to compile.
        """
        param = "response_format"
        source = {"grammars": [{"json_schema": _prepared(schema, strict)}]}
        return self._compiled(_written(source, MAX_SCHEMA_CHARS, param), param)

    def tool_calls(
        self, forms: Sequence[CallForm], trigger: str | None = None, several: bool = False
    ) -> Grammar:
        """A call of one of the functions, or `several`, one on a line.

        With a `trigger`, with which each form begins, any text can come instead, and before or
        after calls; but where the trigger has been written a call must follow.

        Raises:
            RequestError: as `json_schema` does.
        """
        arguments = [
            {"name": _arguments(at), "json_schema": _prepared(form.arguments, form.strict)}
            for at, form in enumerate(forms)
        ]
        lark = _calls(forms, several) if trigger is None else _text(forms, several, trigger)
        source = {"grammars": [{"lark_grammar": lark}, *arguments]}
        return self._compiled(_written(source, MAX_GRAMMAR_CHARS, "tools"), "tools")

    def _compile(self, source: str, param: str) -> Grammar:
        self._try_out(source, param)
        with self._lock:
            try:
                vocabulary = self._vocabulary
            except UnsupportedModel as error:
                message = f"this model's answers cannot be held to a form: {error.message}"
                raise RequestError(message, param) from error
            limits = LLParserLimits(**_LIMITS)
            matcher = LLMatcher(vocabulary, source, log_level=0, limits=limits)
            if not matcher.is_error():
                matcher.compute_bitmask()  # shows whether anything satisfies it; answers copy it
        if matcher.is_error():
            raise _invalid(matcher.get_error(), param)
        ends = np.array(sorted(self._tokenizer.eos_ids), np.int64)
        return Grammar(matcher, vocabulary.vocab_size - 1, ends, param)

    def _try_out(self, source: str, param: str) -> None:
        try:
            error = self._child.ask(json.dumps(source))["error"]
        except ChildEnded as ended:
            error = "it takes too long" if ended.too_long else "it is too large or nests too deeply"
        if error:
            raise _invalid(error, param)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        """The tokenizer as llguidance knows it.

        Its end token is one that the model lacks: which of the model's own may come is not the
        matcher's to say.

        Raises:
            UnsupportedModel: answers could not end, or the tokenizer's kind is unknown.
        """
        if not self._tokenizer.eos_ids:
            raise UnsupportedModel("the model has no end token, so that no answer could be whole")
        try:
            return LLTokenizer(TokenizerWrapper(_Words(self._tokenizer)))
        except ValueError as error:
            raise UnsupportedModel(f"the tokenizer's kind is unknown: {error}") from error


class _Words:
    """The tokens' bytes, and how a text is cut into tokens, as llguidance asks for them."""

    eos_token_id = None
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.plain_backend()
        self._bytes = LLTokenizer(self._backend.to_str())
        self.tokens = [self._bytes.decode_bytes([at]) for at in range(self._bytes.vocab_size)]
        self.special_token_ids = sorted(tokenizer.control_ids)

    def __call__(self, text: str) -> list[int]:
        """Tokens of exactly this text, a control token in it as plain text.

        Where the form leaves no choice, the model is held to these.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if b"".join(self.tokens[at] for at in ids) == text.encode():
            return ids
        return self._bytes.greedy_tokenize(text)  # a tokenizer that puts a space before a text


def _prepared(schema: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    """The schema with our options, whatever options of llguidance's it brings along."""
    options = {"whitespace_pattern": _WHITESPACE, "lenient": not strict}
    return {**schema, "x-guidance": options}


def _written(source: Mapping[str, Any], limit: int, param: str) -> str:
    try:
        text = json.dumps(source, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _invalid(f"it is no JSON: {error}", param) from error
    if len(text) > limit:
        raise _invalid(f"it has over {limit} characters", param)
    return text


def _calls(forms: Sequence[CallForm], several: bool) -> str:
    start = 'call ("\\n" call)*' if several else "call"
    rules = [
        f"call_{at}: {_literal(form.begin)} @{_arguments(at)} {_literal(form.end)}"
        for at, form in enumerate(forms)
    ]
    return _lark([f"start: {start}", f"call: {_choice('call', forms)}", *rules])


def _text(forms: Sequence[CallForm], several: bool, trigger: str) -> str:
    start = "call* text" if several else "text | call"
    rules = [
        f"rest_{at}: {_literal(form.begin.removeprefix(trigger))} @{_arguments(at)} "
        f"{_literal(form.end)}"
        for at, form in enumerate(forms)
    ]
    return _lark(
        [
            f"start: {start}",
            f"call: head ({_choice('rest', forms)})",
            f"head[lazy]: TEXT {_literal(trigger)}",
            "text: TEXT",
            r"TEXT: /(.|\n)*/",
            *rules,
        ]
    )


def _lark(rules: Iterable[str]) -> str:
    return "\n".join(("%llguidance {}", *rules))


def _choice(name: str, forms: Sequence[CallForm]) -> str:
    return " | ".join(f"{name}_{at}" for at in range(len(forms)))


def _arguments(at: int) -> str:
    return f"arguments_{at}"


def _literal(text: str) -> str:
    return json.dumps(text)


def _invalid(error: str, param: str) -> RequestError:
    if error.startswith("NoExtension"):
        error = "nothing satisfies it"
    reason = " ".join(error.replace("<non-verbose/>", "").split())[:_MAX_ERROR_CHARS]
    return RequestError(f"the schema cannot be used: {reason}", param, INVALID_SCHEMA)
