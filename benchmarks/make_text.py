"""Make disjoint calibration and evaluation text from a small Wikipedia dump.

    pip download --no-deps gensim==4.4.0
    pip install mwparserfromhell
    python benchmarks/make_text.py gensim-4.4.0-*.whl --out work/text

The dump (88 articles) is test data inside gensim's wheel, so its bytes are the same for everybody.
Every article is prose paragraphs only: no lists, tables, captions or references. Articles go to
one side or the other whole, by the hash of their title; topics may still overlap. The text is
Wikipedia's (CC BY-SA 4.0): measure with it, and do not ship it inside a package.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import hashlib
import re
import sys
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

try:
    import mwparserfromhell as wiki
except ImportError:
    sys.exit("make_text.py needs a MediaWiki parser: pip install mwparserfromhell")

DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
DUMP_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
MIN_ARTICLE_CHARS = 2000
MIN_PARAGRAPH_CHARS = 60

NOT_PROSE_TAGS = {
    "ref", "table", "gallery", "math", "timeline", "code", "source", "syntaxhighlight", "pre",
    "imagemap", "score", "chem", "references",
}  # fmt: skip
LIST_TAGS = {"li", "dt", "dd"}
NOT_PROSE_LINKS = re.compile(r"\s*:?(file|image|category|media)\s*:", re.IGNORECASE)
BACK_MATTER = {
    "references", "see also", "external links", "further reading", "notes", "bibliography",
    "notes and references", "footnotes", "sources", "citations", "gallery", "works cited",
}  # fmt: skip
LIST_MARK = "\x01"


class Article(NamedTuple):
    title: str
    text: str


def read_dump(source: Path) -> bytes:
    """The dump's compressed bytes, from gensim's wheel or from the bz2 file itself."""
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            data = wheel.read(f"gensim/test/test_data/{DUMP}")
    else:
        data = source.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != DUMP_SHA256:
        sys.exit(f"{source}: the dump's sha256 is {digest}, expected {DUMP_SHA256}")
    return data


def pages(dump: bytes) -> Iterator[tuple[str, str]]:
    """(title, wikitext) of every article of the main namespace that is prose, not a list."""
    for page in ET.fromstring(bz2.decompress(dump)).iterfind("{*}page"):
        title = page.findtext("{*}title") or ""
        text = page.findtext("{*}revision/{*}text") or ""
        redirect = text[:9].lower() == "#redirect"
        if not redirect and ":" not in title and not title.startswith("List of"):
            yield title, text


def prose(wikitext: str) -> str:
    """The paragraphs of an article, one a line, under the headings that have any."""
    code = wiki.parse(wikitext, skip_style_tags=False)
    for section in code.get_sections(matches=is_back_matter, include_lead=False):
        drop(code, section)
    drop_what_is_not_prose(code)
    text = code.strip_code(normalize=True, collapse=False)
    return "\n".join(filter(None, map(clean_paragraph, text.split("\n"))))


def is_back_matter(heading: str) -> bool:
    return heading.strip().lower() in BACK_MATTER


def drop_what_is_not_prose(code: Any) -> None:
    """Remove references, tables, pictures and headings; mark list items; spell out units."""
    for tag in code.filter_tags(recursive=True):
        name = str(tag.tag).strip().lower()
        if name in NOT_PROSE_TAGS:
            drop(code, tag)
        elif name in LIST_TAGS:
            replace(code, tag, LIST_MARK)
        elif name == "br":
            replace(code, tag, "\n")
    for link in code.filter_wikilinks(recursive=True):
        if NOT_PROSE_LINKS.match(str(link.title)):
            drop(code, link)
    for template in code.filter_templates(recursive=True):
        replace(code, template, spelled_out(template))
    for heading in code.filter_headings():
        drop(code, heading)


def spelled_out(template: Any) -> str:
    """What a reader sees of the few templates that stand inside sentences."""
    name = str(template.name).strip().lower()
    values = [str(p.value).strip() for p in template.params if not p.showkey]
    if name in {"convert", "cvt"} and len(values) >= 2:
        return f"{values[0]} {values[1]}"
    if name == "lang" and len(values) >= 2:
        return values[1]
    if name in {"nowrap", "small", "smallcaps"} and values:
        return values[0]
    return ""


def drop(code: Any, node: Any) -> None:
    replace(code, node, "")


def replace(code: Any, node: Any, text: str) -> None:
    """Replace a node, unless it went with one that held it."""
    with contextlib.suppress(ValueError):
        code.replace(node, text)


def clean_paragraph(line: str) -> str:
    """One paragraph with the scars of removed mark-up closed, or '' for what is no sentence."""
    line = re.sub(r"\s+", " ", line).strip()
    if len(line) < MIN_PARAGRAPH_CHARS or line[0] in LIST_MARK + "|!*#:;{}[]=<":
        return ""
    if not re.search(r"[a-z]{3}", line):
        return ""
    line = line.replace(LIST_MARK, "")
    line = re.sub(r"\(\s*[,;:\s]*\)", "", line)
    line = re.sub(r"\(\s*[;,:]\s*", "(", line)
    line = re.sub(r"\s+([,.;:)])", r"\1", line)
    return re.sub(r" {2,}", " ", line).strip()


def split(articles: list[Article]) -> dict[str, list[Article]]:
    """Every fourth article, in the order of the titles' hashes, is kept to measure by."""
    ordered = sorted(articles, key=lambda a: hashlib.sha256(a.title.encode()).hexdigest())
    rest = [article for index, article in enumerate(ordered) if index % 4]
    return {"eval.wiki.txt": ordered[0::4], "calib.wiki.txt": rest}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="gensim 4.4.0's wheel, or the dump out of it")
    parser.add_argument("--out", type=Path, required=True, help="directory for the two texts")
    arguments = parser.parse_args()

    articles = [Article(title, prose(text)) for title, text in pages(read_dump(arguments.source))]
    articles = [a for a in articles if len(a.text) >= MIN_ARTICLE_CHARS]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, part in split(articles).items():
        text = "\n\n".join(f"{a.title}\n{a.text}" for a in part) + "\n"
        (arguments.out / name).write_text(text, encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()
        print(f"{name}: {len(part)} articles, {len(text)} characters, sha256 {digest}")


if __name__ == "__main__":
    main()
