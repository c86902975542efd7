"""Last words of clauses, guessed from what stands before them: accuracy and word perplexity.

    python benchmarks/last_word.py --text work/text/eval.wiki.txt MODEL... [--json]

An item is a content word before a comma or the end of a sentence that has stood before in its
paragraph, so that the context can tell it; a model gets it right when every token of the word is
its greedy choice. After LAMBADA (Paperno et al., 2016, arXiv 1606.06031), whose own passages are
not at hand: the items come from the given text, are not filtered by human guesses, and are easier.
Compare models on one text; do not compare with published LAMBADA figures.

Items of one paragraph are read off one forward pass, which in a causal model gives what a pass per
item would give.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from halfweave.runtime.eval import read_text
from halfweave.runtime.model import Model, load_model
from halfweave.runtime.tokenizer import Tokenizer

ITEMS = 1000
EXACT = "float32"  # what a method is worth, not what the fastest kernels round
LEAST_WORDS, MOST_WORDS = 20, 300  # before the word; more would be slow and change little
ENDING = re.compile(r"([a-z]{3,})[.,!?;:]")
_FUNCTION_WORDS = """
    about after all also and any are been before both but can could did does down during each
    few for from had has have her here him his how into its may more most nor not now off one
    only other our out over same she should some such than that the their them then there
    these they this those through too two under until upon very was well were what when where
    which while who whom will with would you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


@dataclass(frozen=True)
class Item:
    """One word to guess. `context` ends before the space that `word` begins with."""

    context: str
    word: str


@dataclass(frozen=True)
class Result:
    """What one model made of the items.

    Attributes:
        model: name of its directory.
        items: words asked for.
        accuracy: share of them of which every token was the greedy choice.
        standard_error: of the accuracy, with paragraphs as the independent draws, since words of
            one paragraph are right or wrong together.
        word_ppl: exp of the mean negative log-likelihood of a whole word.
    """

    model: str
    items: int
    accuracy: float
    standard_error: float
    word_ppl: float


@dataclass(frozen=True)
class Guess:
    """What a model made of one item: whether greedy, and the word's negative log-likelihood."""

    right: bool
    nll: float


@dataclass(frozen=True)
class _Span:
    """Token ids up to and with an item's word, and where the word begins."""

    ids: tuple[int, ...]
    start: int


def find_items(text: str, count: int = ITEMS) -> list[list[Item]]:
    """The items of a text, paragraph by paragraph (one a line), `count` in all or what there are.

    Paragraphs come in the order of their SHA-256, so that a part of the items is spread over the
    whole text and is the same on every machine.
    """
    ordered = sorted(set(text.split("\n")), key=lambda p: hashlib.sha256(p.encode()).digest())
    chosen: list[list[Item]] = []
    missing = count
    for paragraph in ordered:
        found = list(_items_of(paragraph))[:missing]
        if found:
            chosen.append(found)
            missing -= len(found)
    return chosen


def _items_of(paragraph: str) -> Iterator[Item]:
    words = paragraph.split(" ")
    for at in range(LEAST_WORDS, min(len(words), MOST_WORDS + 1)):
        match = ENDING.fullmatch(words[at])
        if match is None or match[1] in FUNCTION_WORDS:
            continue
        context = " ".join(words[:at])
        if re.search(rf"\b{match[1]}\b", context.lower()):
            yield Item(context, f" {match[1]}")


def score(model: Model, paragraphs: Sequence[Sequence[Item]]) -> Result:
    """Ask a model for every item.

    Raises:
        CapacityError: a paragraph is longer than the model reads.
    """
    guesses = [_guess_all(model, items) for items in paragraphs]
    flat = [guess for paragraph in guesses for guess in paragraph]
    accuracy = sum(guess.right for guess in flat) / len(flat)
    # The variance of a ratio of sums over independent paragraphs (Cochran, Sampling Techniques).
    deviations = [sum(guess.right - accuracy for guess in paragraph) for paragraph in guesses]
    return Result(
        model=model.name,
        items=len(flat),
        accuracy=accuracy,
        standard_error=math.sqrt(sum(d * d for d in deviations)) / len(flat),
        word_ppl=math.exp(min(sum(guess.nll for guess in flat) / len(flat), 700.0)),
    )


def _guess_all(model: Model, items: Sequence[Item]) -> list[Guess]:
    """The guesses of one paragraph's items, in their order."""
    spans = [_span(model.tokenizer, item) for item in items]
    guesses: dict[_Span, Guess] = {}
    for ids, served in _passes(spans):
        guesses |= zip(served, _read_off(model, ids, served), strict=True)
    return [guesses[span] for span in spans]


def _span(tokenizer: Tokenizer, item: Item) -> _Span:
    """Tokenize context and word together; apart, where the word would swallow the context's end."""
    context = tokenizer.encode(item.context, special=False)
    whole = tokenizer.encode(item.context + item.word, special=False)
    if whole[: len(context)] != context:
        whole = context + tokenizer.encode(item.word, special=False)
    return _Span(tuple(whole), len(context))


def _passes(spans: Sequence[_Span]) -> list[tuple[tuple[int, ...], list[_Span]]]:
    """The fewest sequences of which every span is a beginning, each with its spans."""
    passes: list[tuple[tuple[int, ...], list[_Span]]] = []
    for span in sorted(set(spans), key=lambda span: len(span.ids), reverse=True):
        for ids, served in passes:
            if ids[: len(span.ids)] == span.ids:
                served.append(span)
                break
        else:
            passes.append((span.ids, [span]))
    return passes


@torch.inference_mode()
def _read_off(model: Model, ids: tuple[int, ...], spans: Sequence[_Span]) -> Iterator[Guess]:
    """One forward pass over `ids`, and the guess of each of the spans it covers."""
    tokens = torch.tensor(ids, dtype=torch.int64)
    hidden = model.decoder.forward(tokens[:-1], model.decoder.new_cache(len(tokens)))
    for span in spans:
        targets = tokens[span.start : len(span.ids)]
        rows = hidden[span.start - 1 : len(span.ids) - 1]
        scores = model.decoder.logits(rows).float().log_softmax(-1).cpu()
        picked = scores.gather(-1, targets[:, None])
        right = bool((scores.argmax(-1) == targets).all())
        yield Guess(right, -float(picked.sum(dtype=torch.float64)))


def measure(text: str, models: Sequence[Path], count: int) -> dict[str, Any]:
    """The document of a run: what was asked, and one result per model."""
    paragraphs = find_items(text, count)
    return {
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "items": sum(map(len, paragraphs)),
        "paragraphs": len(paragraphs),
        "models": [asdict(score(load_model(path, EXACT), paragraphs)) for path in models],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="model directories")
    parser.add_argument(
        "--text", type=Path, required=True, help="held-out text, a paragraph a line"
    )
    parser.add_argument("--items", type=int, default=ITEMS, help="words to ask for")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()

    document = measure(read_text(options.text), options.models, options.items)
    if options.json:
        print(json.dumps(document))
        return
    print(f"{document['items']} items in {document['paragraphs']} paragraphs")
    for row in document["models"]:
        share = f"{row['accuracy']:.3f} +- {row['standard_error']:.3f}"
        print(f"{row['model']}: accuracy {share}, word perplexity {row['word_ppl']:.1f}")


if __name__ == "__main__":
    main()
