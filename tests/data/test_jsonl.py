"""JSON lines, good and bad: nothing is lost without a count."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import zstandard

from gemcut.data.document import Document, Dropped
from gemcut.data.readers import base
from gemcut.data.readers.base import list_files, read_lines
from gemcut.data.readers.jsonl import JsonlReader
from gemcut.errors import DataError

from .corpus import sentences


def read(path: Path) -> tuple[list[Document], Counter[str]]:
    reader = JsonlReader()
    items = [i for file in list_files(reader, [str(path)], "s") for i in reader.read(file, "s", "CC0-1.0")]
    kept = [item for item in items if isinstance(item, Document)]
    return kept, Counter(item.reason for item in items if isinstance(item, Dropped))


def test_bad_lines(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good", "id": 7, "url": "http://a.example", "licence": "MIT"}',
        b'{"text": "cut',
        b"",
        b'{"text": "\xff"}',
        b"[1]",
        b'{"text": 5}',
        b'{"other": ""}',
        b'{"text": "a\\u0000b"}',
        b'{"text": "half \\ud800"}',
        b'{"text": " \\n"}',
        b"[" * 100_000,
        b'{"text": "pair \\ud83d\\ude00", "id": true}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\r\n".join(lines))
    kept, dropped = read(path)
    assert [(d.id, d.text, d.url, d.licence) for d in kept] == [
        ("7", "good", "http://a.example", "MIT"),
        ("a.jsonl#12", "pair 😀", "", "CC0-1.0"),
    ]
    assert dropped == {
        "not JSON": 2, "not UTF-8": 1, "not a JSON object": 1, "no text under 'text'": 2, "NUL characters": 1,
        "lone surrogates": 1, "no text": 1,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_and_truncated(tmp_path: Path, kind: str) -> None:
    raw = "".join(json.dumps({"text": sentences(i)}) + "\n" for i in range(400)).encode()
    halves = [raw[: len(raw) // 2], raw[len(raw) // 2 :]]  # two members: both are read
    packed = b"".join(map(gzip.compress if kind == "gz" else zstandard.compress, halves))
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(packed)
    assert [len(read(path)[0]), read(path)[1]] == [400, Counter()]
    path.write_bytes(packed[: len(packed) - len(packed) // 8])
    kept, dropped = read(path)
    name = {"gz": "gzip", "zst": "zstandard"}[kind]
    assert dropped == {f"broken {name}: the rest of the file is lost": 1}
    assert 200 <= len(kept) < 400
    assert [d.text for d in kept] == [sentences(i) for i in range(len(kept))]
    path.write_bytes(b"no archive at all")
    assert read(path) == ([], Counter({f"broken {name}: the rest of the file is lost": 1}))


def test_a_long_line_is_passed_over_without_being_in_memory() -> None:
    class Endless(io.RawIOBase):
        """A line of 1 GB between two short ones; counts the largest block asked for."""

        left: ClassVar = [b"one\n", *[b"x" * base.BLOCK] * 1024, b"\nlast\n"]

        def read(self, size: int = -1) -> bytes:
            assert 0 < size <= base.BLOCK
            return self.left.pop(0) if self.left else b""

    assert list(read_lines(Endless())) == [(1, b"one"), (2, None), (3, b"last")]  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [1, 2, 3, 100])
@pytest.mark.parametrize("text", [b"", b"a", b"a\n", b"a\n\nbcd\ne", b"abcdef\nab\nabcdef", b"\n\n"])
def test_lines_in_blocks_of_any_size(text: bytes, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BLOCK", block)
    found = list(read_lines(io.BytesIO(text), limit=3))
    lines = text.split(b"\n")[: -1 if text.endswith(b"\n") or not text else None]
    assert found == [(i, line if len(line) <= 3 else None) for i, line in enumerate(lines, 1)]


def test_listing(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.jsonl", "b/c/3.jsonl.gz", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    reader = JsonlReader()
    found = list_files(reader, [str(tmp_path / "b"), str(tmp_path / "b" / "1.jsonl")], "s")
    names = [Path(f.path).relative_to(tmp_path).as_posix() for f in found]
    assert names == [
        "b/1.jsonl",
        "b/2.jsonl",
        "b/c/3.jsonl.gz",
    ]
    assert [f.name for f in list_files(reader, [f"{tmp_path}/b/*.txt"], "s")] == ["notes.txt"]
    remote = list_files(reader, [f"file://{tmp_path}/b/*.jsonl"], "s")
    assert [(f.name, f.path.startswith("file://")) for f in remote] == [("1.jsonl", True), ("2.jsonl", True)]
    with pytest.raises(DataError, match="nothing to read at"):
        list_files(reader, [f"{tmp_path}/none"], "s")
    with pytest.raises(DataError, match="cannot list nosuch://x"):
        list_files(reader, ["nosuch://x"], "s")
    with pytest.raises(DataError, match=r"/dev/null is a device; expected a regular file"):
        list_files(reader, ["/dev/null"], "s")


def test_remote_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"text": "remote"}).encode()))
    reader = JsonlReader()
    (file,) = list_files(reader, [f"file://{path}"], "s")
    assert [d.text for d in reader.read(file, "s", "") if isinstance(d, Document)] == ["remote"]
