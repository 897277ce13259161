"""Readers and filters of tiny.toml, for files that no general reader knows. Each gets (data, name), gives texts."""

from __future__ import annotations

import gzip
import html
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

TAG = re.compile(r"<[^>]*>")
SPACES = re.compile(r"[ \t]+")


def plain(markup: str) -> str:
    """The text of a piece of HTML or OSIS; paragraphs and line breaks stay."""
    text = re.sub(r"<(?:br|/?p|/?div|lb|/?lg|/?title|/li|/head)\b[^>]*>", "\n", markup)
    text = SPACES.sub(" ", html.unescape(TAG.sub("", text)))
    return re.sub(r" *\n *", "\n", re.sub(r"\n\s*\n\s*", "\n\n", text)).strip()


def sword(data: bytes, name: str) -> Iterator[str]:
    """A module of the SWORD project: zlib blocks one after another, with zeros between them."""
    while data := data.lstrip(b"\0"):
        block = zlib.decompressobj()
        text = block.decompress(data).decode("utf-8", "replace")
        data = block.unused_data
        if len(text) > 200:  # the first block says only which program made the file
            yield plain(text)


def austen(data: bytes, name: str) -> Iterator[dict[str, Any]]:
    """An R database of character vectors: the length in four bytes, then zlib over R's serialization.

    A string is its flags (type 9; -1 as length: missing), its length and its bytes. An empty line ends a paragraph.
    A document is a chapter.
    """
    while len(data) > 4:
        block = zlib.decompressobj()
        vector = block.decompress(data[4:])
        data = block.unused_data
        start = vector.find(b"\x00\x00\x00\x10")
        if start < 0:
            continue
        count, at, lines = int.from_bytes(vector[start + 4 : start + 8]), start + 8, []
        for _ in range(count):
            size = int.from_bytes(vector[at + 4 : at + 8], signed=True)
            if vector[at + 3] != 9 or size < 0:
                break
            lines.append(vector[at + 8 : at + 8 + size].decode())
            at += 8 + size
        book = lines[0].title() if lines else ""
        for number, chapter in enumerate(re.split(r"\n(?=CHAPTER |Chapter )", "\n".join(lines))):
            yield {"text": chapter.strip(), "id": f"{book} {number}"}


def dictionary(data: bytes, name: str) -> Iterator[str]:
    """The Devil's Dictionary in dictd's form, some entries a document; the front matter is left out."""
    text = gzip.decompress(data).decode()
    entries = [e for e in re.split(r"\n\n(?=[A-Z][A-Z' -]+,)", text)[1:] if e.strip()]
    for start in range(0, len(entries), 12):
        yield "\n\n".join(entries[start : start + 12])


#: Who wrote a paragraph of GCIDE stands behind it. These two are in the public domain or under WordNet's licence.
FREE = {"1913 Webster", "WordNet 1.5"}
SOURCE = re.compile(r"\[((?:1913 Webster|Webster|WordNet|PJC|Century|MW|RP|AS|RH|CIDE|FAO|Roget|Hist)[^\]]*)\]")


def gcide(data: bytes, name: str) -> Iterator[str]:
    """Entries of GCIDE of which each source is named and free, some entries a document."""
    text = gzip.decompress(data).decode("utf-8", "replace")
    some: list[str] = []
    for entry in re.split(r"\n\n?(?=\S)", text):
        sources = {found.strip() for found in SOURCE.findall(entry)}
        if sources and sources <= FREE:
            lines = [line.strip() for line in SOURCE.sub("", entry).replace("{", "").replace("}", "").splitlines()]
            some.append(re.sub(r"\n{2,}", "\n", "\n".join(lines)).strip())
        if sum(map(len, some)) > 3000:
            yield "\n\n".join(some)
            some = []
    if some:
        yield "\n\n".join(some)


def wordnet(data: bytes, name: str) -> Iterator[str]:
    """WordNet's synsets, each as its words and its gloss, some a document."""
    lines = []
    for line in data.decode().splitlines():
        fields, bar, gloss = line.partition(" | ")
        if bar and fields[:1].isdigit():
            parts = fields.split(" ")
            words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
            lines.append(
                f"{', '.join(re.sub(r'[(][a-z]+[)]$', '', w).replace('_', ' ') for w in words)}: {gloss.strip()}."
            )
    for start in range(0, len(lines), 25):
        yield "\n".join(lines[start : start + 25])


def factbook(data: bytes, name: str) -> Iterator[str]:
    """A country of the CIA World Factbook: each field that says more than a figure, under its name."""
    out = []
    for section, fields in json.loads(data).items():
        for field, value in fields.items() if isinstance(fields, dict) else ():
            text = plain(" ".join(texts(value)))
            if len(text) > 200:
                out.append(f"{section}: {field}\n{text}")
    yield "\n\n".join(out)


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "text" and isinstance(inner, str):
                yield inner
            elif isinstance(inner, dict):
                yield f"{key}: {' '.join(texts(inner))}<br>"


def chitchat(data: bytes, name: str) -> Iterator[dict[str, Any]]:
    """Conversations of two people, a turn a line behind a dash (with "A:" it is taken for Italian)."""
    for id, conversation in json.loads(data).items():
        turns = (" ".join(message["text"].strip() for message in turn) for turn in conversation["messages"])
        yield {"text": "\n".join(f"- {turn}" for turn in turns if turn), "id": id}


def metamath(data: bytes, name: str) -> Iterator[str]:
    """The comments of a Metamath database, some a document: what each theorem says, formulas between backquotes."""
    some: list[str] = []
    for found in re.finditer(r"\$\((.*?)\$\)", data.decode("utf-8", "replace"), re.DOTALL):
        comment = re.sub(r"[#*=\-._~]{8,}", "", found[1])
        comment = "\n".join(line.strip() for line in comment.splitlines() if line.strip())
        if len(comment) > 60 and "$" not in comment:
            some.append(re.sub(r"\s*\((?:Contributed|Revised|Proof shortened) by[^)]*\)", "", comment))
        if sum(map(len, some)) > 2500:
            yield "\n\n".join(some)
            some = []
    if some:
        yield "\n\n".join(some)


def lisp_comments(data: bytes, name: str) -> Iterator[dict[str, Any]]:
    """The long comments of an ACL2 book. A file whose header names the GPL is left out; others name BSD or MIT."""
    from gemcut.data.readers.tree import licence_of

    text = data.decode("utf-8", "replace")
    licence = licence_of(text[:4000])
    found = [re.sub(r"(?m)^\s*;+ ?", "", block) for block in re.findall(r"(?m)(?:^[ \t]*;.*\n?){4,}", text)[1:]]
    found += re.findall(r"#\|(.*?)\|#", text, re.DOTALL)
    found += [html.unescape(TAG.sub("", block)) for block in re.findall(r':long\s+"((?:[^"\\]|\\.)*)"', text)]
    some = [one.strip().replace('\\"', '"') for one in found if len(one) > 300]
    if some and licence:
        yield {"text": "\n\n".join(some), "licence": licence}


#: What people tell of themselves in a conversation, beyond what the step pii finds; and what a student need not read.
TOLD = re.compile(
    r"\b(?:my name is|my name's|i am called|facebook|instagram|snapchat|tinder|whatsapp|i'?m \d\d\b|i am \d\d\b|"
    r"years old|my number|my address|fuck\w*|shit\w*|bitch\w*|sex\w*|porn\w*|nude\w*|dick|rape\w*|"
    r"kill (?:you|my)self)\b",
    re.IGNORECASE,
)


def says_nothing_of_persons(document: Any) -> tuple[bool, str]:
    """Conversations of unnamed people: one in which a person is told of, or that is coarse, is dropped as a whole."""
    return TOLD.search(document.text) is None, "tells of a person, or is coarse"


def not_copyleft(document: Any) -> tuple[bool, str]:
    """Some books of ACL2 are under the GPL, and say so in their header."""
    free = not re.search(r"GPL|MPL|EPL", document.licence)
    return free, "a licence that asks for the same licence"
