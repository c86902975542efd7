"""Last words: which are asked for, and that one pass per paragraph answers as one per word does."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import last_word
import pytest
import torch
from halfweave.runtime.model import Model, load_model
from last_word import Item, find_items, score
from support.tiny import dense_model

FILLER = (
    "Two foxes and a dog walk over the old stone bridge in the rain and speak of a lazy fox with"
)
PARAGRAPH = (
    f"{FILLER} some weights that nobody will mind, and so the dog keeps the bridge, the stone, and "
    "the weights. The rain keeps on over the bridge. Only the dog sees the comet. It is the end of "
    "what there was."
)
TEXT = "\n".join([PARAGRAPH, f"{FILLER} riddles and riddles, then foxes.", "Short foxes, foxes."])


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return load_model(tiny_model)


def test_items_are_content_words_that_end_a_clause_and_were_seen_before() -> None:
    found = {item.word: item.context for items in find_items(TEXT) for item in items}
    # Not mind or comet, which are new, and not was, which says nothing.
    assert found.keys() == {" bridge", " stone", " weights", " riddles", " foxes"}
    assert found[" weights"].endswith("the stone, and the")
    assert found[" foxes"] == f"{FILLER} riddles and riddles, then"


def test_a_context_has_at_least_twenty_words() -> None:
    assert all(len(i.context.split(" ")) >= 20 for items in find_items(TEXT) for i in items)
    assert not find_items("The foxes keep two foxes.")


def test_a_smaller_count_takes_the_beginning_of_the_same_order() -> None:
    everything = [item for items in find_items(TEXT) for item in items]
    for count in range(len(everything) + 1):
        assert [item for items in find_items(TEXT, count) for item in items] == everything[:count]


def test_the_same_paragraph_twice_is_asked_once() -> None:
    assert find_items(f"{TEXT}\n{PARAGRAPH}") == find_items(TEXT)


def naive(directory: Path, model: Model, items: list[Item]) -> list[tuple[bool, float]]:
    """Transformers' model, one pass per item, one token after the other."""
    oracle = dense_model(directory)
    answers = []
    for item in items:
        context = model.tokenizer.encode(item.context, special=False)
        word = model.tokenizer.encode(item.word, special=False)
        right, nll = True, 0.0
        for at, token in enumerate(word):
            with torch.no_grad():
                logits = oracle(torch.tensor([context + word[:at]])).logits[0, -1]
            right &= int(logits.argmax()) == token
            nll -= float(logits.log_softmax(-1)[token])
        answers.append((right, nll))
    return answers


def greedy_items(model: Model) -> list[Item]:
    """Items whose word is what the model itself says, for some contexts; they must count as right.

    A random model guesses no real word.
    """
    made = []
    for length in range(3, 15):
        context = " ".join(FILLER.split(" ")[:length])
        ids = model.tokenizer.encode(context, special=False)
        hidden = model.decoder.forward(torch.tensor(ids), model.decoder.new_cache(len(ids)))
        said = model.tokenizer.decode([int(model.decoder.logits(hidden[-1]).argmax())])
        if model.tokenizer.encode(context + said, special=False)[:-1] == ids:
            made.append(Item(context, said))
    return made


def test_the_figures_are_those_of_a_pass_per_item(model: Model, tiny_model: Path) -> None:
    paragraphs = [*find_items(TEXT), greedy_items(model)]
    flat = [item for items in paragraphs for item in items]
    answers = naive(tiny_model, model, flat)
    result = score(model, paragraphs)
    assert result.items == len(flat)
    assert 0 < result.accuracy < 1
    assert result.accuracy == pytest.approx(sum(right for right, _ in answers) / len(flat))
    mean = sum(nll for _, nll in answers) / len(flat)
    assert math.log(result.word_ppl) == pytest.approx(mean, rel=1e-4)


def test_items_of_one_paragraph_share_a_pass(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    read_off = last_word._read_off
    monkeypatch.setattr(
        last_word, "_read_off", lambda *args: passes.append(args[1]) or read_off(*args)
    )
    paragraphs = find_items(TEXT)
    score(model, paragraphs)
    assert sum(map(len, paragraphs)) == 6
    assert len(passes) == len(paragraphs) == 2


def test_the_standard_error_takes_paragraphs_as_the_draws(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = last_word.Guess(True, 0.0), last_word.Guess(False, 0.0)
    monkeypatch.setattr(last_word, "_guess_all", lambda _, items: [one[item] for item in items])
    alone: list[list[int]] = [[0], [1], [0], [1]]
    binomial = math.sqrt(0.5 * 0.5 / 4)
    assert score(model, alone).standard_error == pytest.approx(binomial)  # type: ignore[arg-type]
    together: list[list[int]] = [[0, 0], [1, 1]]
    expected = pytest.approx(binomial * math.sqrt(2))
    assert score(model, together).standard_error == expected  # type: ignore[arg-type]


def test_the_command_prints_one_document(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["last_word.py", str(tiny_model), "--text", str(tmp_path / "text.txt"), "--json"]
    monkeypatch.setattr(sys, "argv", command)
    last_word.main()
    document = json.loads(capsys.readouterr().out)
    assert document["items"] == 6
    assert document["models"][0]["model"] == tiny_model.name
