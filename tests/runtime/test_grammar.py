"""Answers held to a form: always of that form, always able to end, whatever a schema says."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from halfweave.errors import HalfweaveError, RequestError
from halfweave.runtime import grammar
from halfweave.runtime.grammar import (
    AnswerConstraint,
    CallForm,
    GrammarCompiler,
)
from halfweave.runtime.request import Constraint
from halfweave.runtime.tokenizer import Tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from support.grammars import (
    END,
    FORMS,
    MODEL_ROWS,
    accepts,
    allowed,
    answer,
    refused,
    write,
)
from support.tiny import EOS, edit_json, save_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

Json = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.open(tiny_model)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


@pytest.mark.parametrize("seed", range(10))
def test_a_json_object_is_one(tokenizer: Tokenizer, compiler: GrammarCompiler, seed: int) -> None:
    text = answer(tokenizer, compiler.json_object(), seed)
    assert text is not None
    assert isinstance(json.loads(text), dict)


# A small family of schemas, of which every one can be satisfied.
NAMES = st.sampled_from(["a", "name", "é🙂", 'quo"te', "<|im_end|>", "a b"])
LEAVES: st.SearchStrategy[Json] = st.one_of(
    st.sampled_from(
        [
            {},
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["integer", "null"]},
            {"type": "number"},
            {"type": "number", "minimum": -2.5, "exclusiveMaximum": 7},
            {"type": "string", "pattern": "^[a-c]{2,4}$"},
            {"type": "string", "pattern": "x|yz"},
            {"type": "string", "format": "date"},
            {"const": EOS},
            {"const": {"deep": [1, "\n"]}},
        ]
    ),
    st.integers(0, 3).map(lambda n: {"type": "string", "minLength": n, "maxLength": n + 2}),
    st.integers(-5, 5).map(lambda n: {"type": "integer", "minimum": n, "maximum": n + 12}),
    st.lists(NAMES | st.integers(-9, 9) | st.none(), min_size=1).map(lambda v: {"enum": v}),
)


def containers(inner: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    objects = st.builds(
        lambda fields, needed, open_: {
            "type": "object",
            "properties": fields,
            "required": sorted(fields)[:needed],
            "additionalProperties": open_,
        },
        st.dictionaries(NAMES, inner, max_size=4),
        st.integers(0, 4),
        st.just(False) | inner,
    )
    arrays = st.builds(
        lambda items, least: {"type": "array", "items": items, "minItems": least, "maxItems": 3},
        inner,
        st.integers(0, 2),
    )
    either = st.lists(inner, min_size=1, max_size=3).map(lambda schemas: {"anyOf": schemas})
    return objects | arrays | either


SCHEMAS = st.recursive(LEAVES, containers, max_leaves=6)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_an_answer_satisfies_its_schema(
    tokenizer: Tokenizer, compiler: GrammarCompiler, schema: Json, seed: int
) -> None:
    text = answer(tokenizer, compiler.json_schema(schema), seed)
    if text is not None:
        Draft202012Validator(schema).validate(json.loads(text))


def test_most_answers_of_that_test_end(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    """Otherwise it would show nothing."""
    schema = {"type": "array", "items": {"type": "object"}, "minItems": 1, "maxItems": 3}
    form = compiler.json_schema(schema)
    assert sum(answer(tokenizer, form, seed) is None for seed in range(10)) <= 3


def test_a_recursive_schema_works(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    """Row 39."""
    node = {
        "type": "object",
        "properties": {"id": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
        "required": ["id"],
        "additionalProperties": False,
    }
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    form = compiler.json_schema(schema)
    assert accepts(tokenizer, form, '{"id": 1, "next": {"id": 2, "next": {"id": 3}}}')
    assert not accepts(tokenizer, form, '{"id": 1, "next": 2}')
    text = answer(tokenizer, form, 0)
    assert text is not None
    Draft202012Validator(schema).validate(json.loads(text))


def test_only_end_tokens_follow_what_is_complete(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    constraint = compiler.json_schema({"const": "x"}).constraint()
    for piece in ('"', "x", '"'):
        assert END not in allowed(constraint)
        write(tokenizer, constraint, piece)
    assert allowed(constraint) == {END}
    constraint.take(END)
    assert allowed(constraint) == {END}


def test_what_is_complete_may_go_on_where_the_form_allows_it(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    constraint = compiler.json_schema({"type": "integer"}).constraint()
    write(tokenizer, constraint, "12")
    assert allowed(constraint) > {END, *tokenizer.encode("3", special=False)}


def test_every_end_token_of_the_model_ends_an_answer(
    tiny_model: Path, copy_of: Callable[[Path], Path]
) -> None:
    """One of them is a row that the tokenizer lacks, as it is in some models."""
    copy = copy_of(tiny_model)
    beyond = MODEL_ROWS - 1
    edit_json(copy / "generation_config.json", lambda c: c.update(eos_token_id=[0, beyond, 10**6]))
    tokenizer = Tokenizer.open(copy)
    assert tokenizer.vocab_size <= beyond
    constraint = GrammarCompiler(tokenizer).json_schema({"const": 1}).constraint()
    assert not allowed(constraint) & tokenizer.eos_ids
    write(tokenizer, constraint, "1")
    assert allowed(constraint) == {0, END, beyond}


def test_a_model_without_end_tokens_is_refused(
    tiny_model: Path, copy_of: Callable[[Path], Path]
) -> None:
    copy = copy_of(tiny_model)
    save_tokenizer(copy, eos_token=None)
    for name in ("config.json", "generation_config.json"):
        edit_json(copy / name, lambda config: config.pop("eos_token_id"))
    with pytest.raises(RequestError, match="no end token"):
        GrammarCompiler(Tokenizer.open(copy)).json_object()


def test_rows_that_the_tokenizer_lacks_are_forbidden(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    assert tokenizer.vocab_size < MODEL_ROWS
    anything = compiler.tool_calls([CallForm("<t>", {"type": "object"}, "")], "<t>")
    assert max(allowed(anything.constraint())) == tokenizer.vocab_size - 1


def test_control_tokens_are_never_written(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    """Not even where their letters are what must be written."""
    constraint = compiler.json_schema({"const": f"a{EOS}b"}).constraint()
    controls = {at for at in range(MODEL_ROWS) if tokenizer.is_control(at)}
    ids = []
    while (choices := allowed(constraint)) != {END}:
        assert not choices & controls
        ids.append(max(choices))
        constraint.take(ids[-1])
    assert tokenizer.decode(ids) == f'"a{EOS}b"'


def test_answers_of_one_grammar_do_not_know_of_each_other(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    form = compiler.json_schema({"enum": ["left", "right"]})
    left, right = form.constraint(), form.constraint()
    write(tokenizer, left, '"le')
    write(tokenizer, right, '"right"')
    write(tokenizer, left, 'ft"')
    assert allowed(left) == allowed(right) == {END}
    assert allowed(form.constraint()) == set(tokenizer.encode('"', special=False))


def test_a_model_cannot_fill_its_answer_with_blanks(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    form = compiler.json_object()
    for indent in (None, 1, 2, 4):
        assert accepts(tokenizer, form, json.dumps({"a": [1, {"b": 2}]}, indent=indent))
    for blanks in ("  ", "\n\n", "\n" + " " * 21, "\r"):
        assert not accepts(tokenizer, form, f'{{{blanks}"a": 1}}')


def test_properties_come_in_the_order_of_the_schema(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    fields = {"z": {"type": "null"}, "a": {"type": "null"}}
    form = compiler.json_schema({"type": "object", "properties": fields})
    assert accepts(tokenizer, form, '{"z": null, "a": null}')
    assert not accepts(tokenizer, form, '{"a": null, "z": null}')


def test_a_token_that_is_not_allowed_is_an_error_of_its_request(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    constraint = compiler.json_object().constraint()
    with pytest.raises(HalfweaveError):
        constraint.take(tokenizer.encode("x", special=False)[0])
    with pytest.raises(HalfweaveError):
        constraint.forbid(np.zeros(MODEL_ROWS, np.float32))


def chain(link: Callable[[Json], Json], length: int) -> Json:
    links = {f"d{at}": link({"$ref": f"#/$defs/d{at + 1}"}) for at in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "string"}}}


def nested(depth: int) -> Json:
    schema: Json = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


REFUSED: dict[str, Json] = {
    "1 MB": {"description": "x" * 2**20},
    "nested too deeply": nested(5000),
    "nested too deeply for its parser": nested(200),
    "a long chain of arrays": chain(lambda ref: {"items": ref}, 1200),
    "a long chain of objects": chain(lambda ref: {"properties": {"a": ref}}, 900),
    "a product": {
        "allOf": [{"anyOf": [{"required": [f"{a}{b}"]} for b in range(6)]} for a in range(8)]
    },
    "a web address": {"$ref": "https://example.com/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "another document": {"$ref": "other.json#/a"},
    "another language": {"$schema": "http://example.com/schema"},
    "a reference to nothing": {"$ref": "#/$defs/none"},
    "a reference to itself": {"$ref": "#"},
    "references to each other": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "nothing to choose from": {"enum": []},
    "more than the most": {"type": "integer", "minimum": 3, "maximum": 2},
    "longer than the longest": {"type": "string", "minLength": 3, "maxLength": 2},
    "two patterns at once": {"allOf": [{"pattern": "^a+$"}, {"pattern": "^b+$"}], "type": "string"},
    "a property that cannot be": {"properties": {"a": False}, "required": ["a"], "type": "object"},
    "no such type": {"type": "foo"},
    "a type that is a number": {"type": 5},
    "no regular expression": {"type": "string", "pattern": "((("},
    "looking ahead": {"type": "string", "pattern": "^(?=a).*$"},
    "nested groups": {"type": "string", "pattern": "(" * 10_000 + ")" * 10_000},
    "no text": {"const": "\ud800"},
    "no number": {"const": float("nan")},
    "no JSON": {"const": object()},
    "a keyword that is not kept": {"type": "array", "uniqueItems": True},
    "a format that is not kept": {"type": "string", "format": "iri-reference"},
    "options of the library": {"x-guidance": {"lenient": True}, "not": {}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_schema_is_refused_and_the_next_one_works(
    tokenizer: Tokenizer, compiler: GrammarCompiler, name: str
) -> None:
    """Row 39."""
    refused(lambda: compiler.json_schema(REFUSED[name]))
    assert accepts(tokenizer, compiler.json_schema({"const": name}), json.dumps(name))


def test_a_schema_that_takes_too_long_is_ended(tokenizer: Tokenizer) -> None:
    """Row 39. This one would take minutes, none of which llguidance counts."""
    compiler = GrammarCompiler(tokenizer, seconds=0.1)
    patterns = {f"^a{n}$": {"type": "string"} for n in range(1500)}
    endless = {"type": "object", "patternProperties": patterns}
    assert "too long" in refused(lambda: compiler.json_schema(endless))
    compiler.json_object()


@pytest.mark.parametrize(
    ("pattern", "end", "wrong_end"),
    [
        ("(a+)+$", "", "c"),
        ("^(a|aa)+$", "", "c"),
        ("^(a*)*b$", "b", ""),
        ("^(.*b){3}$", "bbb", "b"),
    ],
)
def test_a_pattern_that_other_engines_choke_on_works(
    tokenizer: Tokenizer, compiler: GrammarCompiler, pattern: str, end: str, wrong_end: str
) -> None:
    """Row 39."""
    form = compiler.json_schema({"type": "string", "pattern": pattern})
    assert accepts(tokenizer, form, '"' + "a" * 60 + end + '"')
    assert not accepts(tokenizer, form, '"' + "a" * 60 + wrong_end + '"')


def test_a_pattern_that_grows_without_bound_is_an_error_of_its_request(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    """Row 39."""
    pattern = "^(((a{100}){100}){100}){100}$"
    form = compiler.json_schema({"type": "string", "pattern": pattern})
    refused(lambda: answer(tokenizer, form, 0))


def test_what_can_never_be_complete_goes_on_until_its_length_is_reached(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    """Row 39."""
    endless = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    assert answer(tokenizer, compiler.json_schema(endless), 0, longest=200) is None


def test_no_schema_reaches_for_the_network(compiler: GrammarCompiler) -> None:
    """Row 39."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        for schema in ({"$ref": address}, {"$schema": address}, {"$id": address, "$ref": "x"}):
            refused(lambda schema=schema: compiler.json_schema(schema))
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_without_strict_what_cannot_be_kept_is_ignored(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    schema = {"type": "array", "items": {"type": "null"}, "uniqueItems": True}
    form = compiler.json_schema(schema, strict=False)
    assert accepts(tokenizer, form, "[null,null]")
    assert not accepts(tokenizer, form, "[1]")
    refused(lambda: compiler.json_schema({"$ref": "http://example.com/x"}, strict=False))


def test_grammars_are_kept_but_not_without_bound(compiler: GrammarCompiler) -> None:
    first = {"const": "kept"}
    assert compiler.json_schema(first) is compiler.json_schema(dict(first))
    for n in range(grammar._MAX_CACHED + 5):
        compiler.json_schema({"const": n})
    assert compiler._compiled.cache_info().currsize == grammar._MAX_CACHED


def test_threads_share_one_compiler(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    wrong: list[object] = []

    def work(name: str) -> None:
        for n in range(5):
            form = compiler.json_schema({"const": f"{name} {n}"})
            shared = compiler.json_object()
            if not accepts(tokenizer, form, f'"{name} {n}"') or not accepts(
                tokenizer, shared, '{"a": 1}'
            ):
                wrong.append((name, n))

    threads = [threading.Thread(target=work, args=(f"thread {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def spaced_backend(kind: str) -> Backend:
    """A tokenizer in the manner of Llama 2: bytes as a last resort, and a space before a text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *'{}":,nametru', "na", "me", "name", "▁name", "▁true", '▁"', '"}']
    merges = [("n", "a"), ("m", "e"), ("na", "me"), ("▁", "name"), ("▁", '"'), ('"', "}")]
    vocabulary = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    if kind == "normalizer":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_tokens([AddedToken("<call>", special=False, normalized=False)])
    return backend


@pytest.mark.parametrize("kind", ["normalizer", "pre-tokenizer"])
def test_a_tokenizer_that_puts_a_space_before_a_text_works(tmp_path: Path, kind: str) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=spaced_backend(kind), eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.decode(tokenizer.encode("name")) == "name"
    compiler = GrammarCompiler(tokenizer)
    fields = {"name": {"const": "true name"}, "a": {"type": "string", "maxLength": 3}}
    schema = {"type": "object", "properties": fields, "required": ["name", "a"]}
    for seed in range(5):
        text = answer(tokenizer, compiler.json_schema(schema), seed)
        assert text is not None
        Draft202012Validator(schema).validate(json.loads(text))
    call = answer(tokenizer, compiler.tool_calls(FORMS), 0)
    assert call is not None and call.startswith("<call>")


def test_the_constraint_is_the_engines(compiler: GrammarCompiler) -> None:
    constraint: Constraint = compiler.json_object().constraint()
    assert isinstance(constraint, AnswerConstraint)
