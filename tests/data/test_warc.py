"""WARC files made by hand from the standard (ISO 28500), whole and broken, beside what fastwarc reads of the whole."""

from __future__ import annotations

import gzip
import hmac
import io
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import zstandard
from fastwarc.warc import ArchiveIterator, WarcRecordType

import support
from gemcut.data.readers import warc
from gemcut.data.readers.html import extract
from gemcut.data.readers.warc import WarcReader

from .corpus import run, sentences, write_recipe
from .test_readers import read


def record(
    uri: str, body: bytes, kind: str = "response", length: object = None, content: str = "", id: str = ""
) -> bytes:
    fields = {
        "WARC-Type": kind,
        "WARC-Record-ID": f"<urn:uuid:{id or uri[-4:]}>",
        "WARC-Target-URI": uri,
        "WARC-Date": "2024-01-01T00:00:00Z",
        "Content-Type": content or "application/http; msgtype=response",
        "Content-Length": len(body) if length is None else length,
    }
    head = "WARC/1.0\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{head}\r\n".encode() + body + b"\r\n\r\n"


def answer(body: bytes, kind: str = "text/html; charset=utf-8", status: str = "200 OK", more: str = "") -> bytes:
    content = f"Content-Type: {kind}\r\n" if kind else ""
    return f"HTTP/1.1 {status}\r\n{content}{more}\r\n".encode() + body


def page(text: str, head: str = "") -> str:
    return f"<html><head>{head}</head><body><article><p>{text}</p></article></body></html>"


ONE, TWO = (sentences(i).replace("\n", " ") for i in (1, 2))
XHTML = '<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><body><p>{}</p></body></html>'


def test_pages_and_what_is_none(tmp_path: Path) -> None:
    records = [
        record("http://a.example/", b"software: x", "warcinfo", content="application/warc-fields"),
        record("http://a.example/req1", b"GET / HTTP/1.1\r\n\r\n", "request"),
        record("http://a.example/one1", answer(page(ONE).encode())),
        record("http://a.example/xht2", answer(XHTML.format(TWO).encode(), "application/xhtml+xml")),
        record("http://a.example/xml3", answer(XHTML.format("x é").encode(), "application/xml")),
        record("http://a.example/lat4", answer(page("caf\xe9 " + ONE).encode("latin-1"), "text/html; charset=latin-1")),
        record("http://a.example/txt5", answer(b"plain text\n", "text/plain")),
        record("http://a.example/wet6", TWO.encode(), "conversion", content="text/plain"),
        record("http://a.example/chu7", answer(b"9\r\n<p>chunks\r\n6\r\n here.\r\n0\r\n\r\n",
                                               more="Transfer-Encoding: chunked\r\n")),
        record("http://a.example/gzi8", answer(gzip.compress(page(TWO).encode()), more="Content-Encoding: gzip\r\n")),
        record("http://a.example/gone", answer(page(ONE).encode(), status="404 Not Found")),
        record("http://a.example/png1", answer(b"\x89PNG", "image/png")),
        record("http://a.example/none", answer(b"", "text/html")),
        record("http://a.example/htt1", b"garbage"),
        record("http://a.example/txt9", answer(b"\xff\xfe\xfd", "text/plain")),
        record("http://a.example/odd1", answer(page(ONE).encode(), "text/html; charset=idna")),
    ]  # fmt: skip
    whole = b"".join(records)
    assert sum(1 for _ in ArchiveIterator(io.BytesIO(whole), record_types=WarcRecordType.response)) == 13
    (tmp_path / "a.warc").write_bytes(whole)
    (tmp_path / "b.warc.gz").write_bytes(b"".join(gzip.compress(r) for r in records))
    (tmp_path / "c.warc.zst").write_bytes(zstandard.compress(whole))
    expected = {
        "one1": ONE, "xht2": TWO, "xml3": "x é", "lat4": "café " + ONE, "txt5": "plain text\n", "wet6": TWO,
        "chu7": "chunks here.", "gzi8": TWO, "odd1": ONE,
    }  # fmt: skip
    for name in ("a.warc", "b.warc.gz", "c.warc.zst"):
        kept, dropped = read(WarcReader(), tmp_path / name)
        assert {id.removeprefix("urn:uuid:"): " ".join(d.text.split(" ")).strip() for id, d in kept.items()} == {
            id: text.strip() for id, text in expected.items()
        }
        assert dropped == {
            "HTTP status is not 200": 1, "not HTML": 1, "no text": 1, "no HTTP answer": 1, "not UTF-8": 1
        }  # fmt: skip
        assert kept["urn:uuid:one1"].url == "http://a.example/one1"


GOOD = record("http://a.example/good", answer(page(ONE).encode()))
LAST = record("http://a.example/last", answer(page(TWO).encode()))


@pytest.mark.parametrize("length", [20, 0, 5000, "-5", "abc", "", 10**30, "9" * 5000, "1e3", "²"])
def test_a_broken_length_costs_its_record_alone(tmp_path: Path, length: object) -> None:
    broken = record("http://a.example/bad1", answer(page("lost").encode()), length=length)
    (tmp_path / "a.warc").write_bytes(GOOD + broken + GOOD.replace(b"good", b"more") + LAST)
    kept, dropped = read(WarcReader(), tmp_path)
    assert [id[-4:] for id in kept] == ["good", "more", "last"]
    assert sum(dropped.values()) == 1
    assert set(dropped) <= {"broken length of a WARC record", "WARC record longer than 64 MB"}


def test_files_that_end_too_early(tmp_path: Path) -> None:
    for cut, reasons in (
        (len(GOOD) + 30, {"broken WARC header": 1}),
        (len(GOOD) + len(LAST) - 30, {"broken length of a WARC record": 1}),
    ):
        (tmp_path / "a.warc").write_bytes((GOOD + LAST)[:cut])
        kept, dropped = read(WarcReader(), tmp_path)
        assert [id[-4:] for id in kept] == ["good"]
        assert dropped == reasons
    (tmp_path / "a.warc").unlink()
    packed = gzip.compress(GOOD) + gzip.compress(LAST)[:-40]
    (tmp_path / "a.warc.gz").write_bytes(packed)
    kept, dropped = read(WarcReader(), tmp_path)
    assert [id[-4:] for id in kept] == ["good"]
    assert dropped["broken gzip: the rest of the file is lost"] == 1


def test_what_is_no_warc(tmp_path: Path) -> None:
    for data, reasons in (
        (b"", {}),
        (b"\r\n\r\n", {}),
        (b"<html>not an archive</html>", {"no WARC record": 1}),
        (b"junk\r\n\r\n" + GOOD, {"no WARC record": 1}),
        (b"WARC/1.0\r\n" + b"a" * 100_000, {"broken WARC header": 1}),
        (bytes(range(256)) * 100, {"no WARC record": 1}),
    ):
        (tmp_path / "a.warc").write_bytes(data)
        kept, dropped = read(WarcReader(), tmp_path)
        assert dropped == reasons
        assert len(kept) == (GOOD in data)


MEASURE = """
import re, sys
from gemcut.data.readers.base import File
from gemcut.data.readers.warc import WarcReader
items = list(WarcReader().read(File(sys.argv[1], 0, "a"), "s", ""))
peak = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
print([getattr(item, "reason", "kept") for item in items], peak >> 10)
"""


@pytest.mark.slow
def test_large_records_take_no_memory(tmp_path: Path) -> None:
    """A record of 70 MB, and a small page that becomes 150 MB."""
    head = record("http://a.example/huge", b"", length=70 << 20)[:-4]
    bomb = zlib.compressobj(1, wbits=31)
    packed = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(150)) + bomb.flush()
    with open(tmp_path / "a.warc", "wb") as file:
        file.write(head)
        file.write(b"x" * (70 << 20))
        file.write(
            b"\r\n\r\n" + record("http://a.example/bomb", answer(packed, more="Content-Encoding: gzip\r\n")) + LAST
        )
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a.warc")]
    env = {**os.environ, "PYTHONPATH": str(support.ROOT / "src")}
    found, _, megabytes = subprocess.run(
        command, env=env, check=True, capture_output=True, text=True
    ).stdout.rpartition(" ")
    assert found == "['WARC record longer than 64 MB', 'page larger than 64 MB', 'kept']"
    assert int(megabytes) < 260  # 64 MB of a page, twice, and the interpreter


RECIPE = '[[source]]\nname = "a"\nreader = "warc"\npaths = ["a.warc"]\n'
URL_BLOCK = '[[step]]\nuse = "url-block"\nlists = ["blocked.txt"]\n'
CHILD_SAFETY = '[[step]]\nuse = "child-safety"\nlists = ["list"]\nkey_file = "key"\n'


@pytest.mark.parametrize(
    ("steps", "made"),
    [
        (URL_BLOCK, {"two2", "the3"}),
        (URL_BLOCK + CHILD_SAFETY, {"the3"}),
        (CHILD_SAFETY, {"one1", "the3"}),
        # What is blocked must still be looked at for what must be reported.
        (CHILD_SAFETY + URL_BLOCK, {"one1", "the3"}),
        ('[[step]]\nuse = "exact-paragraphs"\n' + URL_BLOCK, {"one1", "two2", "the3"}),
    ],
)
def test_of_a_refused_address_no_text_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: str, made: set[str]
) -> None:
    names = {sentences(i).replace("\n", " ").split(".")[0]: name for i, name in enumerate(("one1", "two2", "the3"))}
    bodies = [page(sentences(i).replace("\n", " ")).encode() for i in range(3)]
    hosts = ("blocked.example", "listed.example", "good.example")
    (tmp_path / "a.warc").write_bytes(
        b"".join(
            record(f"http://{host}/{name}", answer(body))
            for host, name, body in zip(hosts, names.values(), bodies, strict=True)
        )
    )
    (tmp_path / "blocked.txt").write_text("blocked.example\n")
    (tmp_path / "key").write_bytes(b"0123456789abcdef0123456789abcdef")
    (tmp_path / "key").chmod(0o600)
    name = hmac.digest(b"0123456789abcdef0123456789abcdef", b"listed.example", "sha256").hex()
    (tmp_path / "list").write_text(f"url:{name}\n")
    seen = set()

    def spy(data: bytes, *more: object) -> str | None:
        text = extract(data, *more)  # type: ignore[arg-type]
        assert text is not None
        seen.add(names[text.split(".")[0]])
        return text

    monkeypatch.setattr(warc, "extract", spy)
    report = run(write_recipe(tmp_path, RECIPE + steps), tmp_path / "out")
    assert seen == made
    dropped = {
        (step["name"], reason): counts["documents"]
        for step in report["steps"]
        for reason, counts in step["sources"]["a"]["dropped"].items()
    }
    expected = {}
    if "url-block" in steps:
        expected["url-block", "url: domain is blocked"] = 1
    if "child-safety" in steps:
        expected["child-safety", "child safety: address"] = 1
    assert dropped == expected
