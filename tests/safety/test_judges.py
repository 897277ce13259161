"""Lexicon and linear model beside plain Python; child safety with invented tokens."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import zstandard

from gemcut.data.document import Document
from gemcut.errors import DataError, ParameterError, RecipeError
from gemcut.safety.child_safety import ChildSafety
from gemcut.safety.lexicon import Lexicon
from gemcut.safety.linear import LinearJudge, Training, features, train

from ..cli.conftest import Cli, cli  # noqa: F401
from ..data.corpus import WORDS, flow, run, sentences, write_jsonl, write_recipe

ENTRIES = ["zorble", "Green Flumox", "flumox", "x-y", "quite a long zorble phrase"]


def by_hand(text: str) -> float:
    """Hits of each entry as whole words, for each hundred words."""
    words = re.findall(r"\w+", text.lower())
    hits = 0
    for entry in {tuple(re.findall(r"\w+", e.lower())) for e in ENTRIES}:
        hits += sum(tuple(words[i : i + len(entry)]) == entry for i in range(len(words)))
    rate = 100 * hits / max(1, len(words))
    return rate / (rate + 1)


def test_lexicon() -> None:
    lexicon = Lexicon(ENTRIES)
    draw = random.Random(1)
    words = [*WORDS, "Zorble", "zorbles", "GREEN", "flumox!", "X-Y", "quite a long zorble phrase", "xy"]
    texts = [" ".join(draw.choice(words) for _ in range(draw.randint(0, 80))) for _ in range(100)]
    documents = [Document(str(i), "s", text) for i, text in enumerate(texts)]
    assert lexicon.scores(documents) == pytest.approx([by_hand(text) for text in texts])
    assert lexicon.score("a zorble here", "lexicon") == pytest.approx(by_hand("a zorble here"))
    assert len(lexicon) == 5
    with pytest.raises(ParameterError, match="unknown policy 'other'; expected one of lexicon"):
        lexicon.score("x", "other")


def test_lexicon_files(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# comment\nzorble\n\n")
    assert len(Lexicon.read(path)) == 1
    for content, message in ((b"\n", "is empty"), (b"\xff", "not UTF-8"), (b"a b c d e f g h i\n", "has 9 words")):
        path.write_bytes(content)
        with pytest.raises(ParameterError, match=message):
            Lexicon.read(path)
    with pytest.raises(ParameterError, match="cannot read the lexicon"):
        Lexicon.read(tmp_path / "none")


def two_kinds(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Texts that prefer one half of the words, and texts that prefer the other."""
    draw = random.Random(seed)
    half = len(WORDS) // 2

    def one(first: bool) -> str:
        own = WORDS[:half] if first else WORDS[half:]
        return " ".join(draw.choice(own if draw.random() < 0.7 else WORDS) for _ in range(40))

    return [one(True) for _ in range(count)], [one(False) for _ in range(count)]


def test_a_model_learns_and_is_kept(tmp_path: Path) -> None:
    judge = train(*two_kinds(200, 1), "first half")
    good, bad = two_kinds(100, 2)
    scores = [judge.score(text, "first half") for text in good + bad]
    assert np.mean([s > 0.5 for s in scores[:100]] + [s < 0.5 for s in scores[100:]]) > 0.97
    judge.save(tmp_path / "m.npz")
    again = LinearJudge.load(tmp_path / "m.npz")
    assert [again.score(text, "first half") for text in good[:5]] == scores[:5]
    assert train(*two_kinds(200, 1), "first half").score(good[0], "first half") == scores[0]


def test_a_score_is_the_logistic_function_of_the_mean_of_its_weights() -> None:
    weights = np.zeros((1, 1 << 10), np.float32)
    document = Document("1", "s", "river stone river")
    found = features([document], 10)
    assert len(found.index) == 4  # river, stone, and two pairs; river counts once
    weights[0, found.index] = [1, 2, 3, 4]
    judge = LinearJudge(["p"], weights, np.array([-1], np.float32))
    assert judge.score(document.text, "p") == pytest.approx(1 / (1 + math.exp(-(10 / math.sqrt(4) - 1))))
    assert judge.score("", "p") == pytest.approx(1 / (1 + math.exp(1)))


def test_unbalanced_sets_weigh_the_same() -> None:
    good, bad = two_kinds(300, 3)
    judge = train(good[:15], bad, "p", Training(epochs=20))
    held, _ = two_kinds(50, 4)
    assert np.mean([judge.score(text, "p") > 0.5 for text in held]) > 0.9


def test_files_that_are_no_model(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    for content in (b"", b"PK\x03\x04", b"no zip"):
        path.write_bytes(content)
        with pytest.raises(ParameterError, match="is no linear model"):
            LinearJudge.load(path)
    about = {"format": "gemcut-linear-1", "hash": "other", "policies": ["p"]}
    arrays = {"weights": np.zeros((1, 256), np.float32), "bias": np.zeros(1, np.float32)}
    for change, message in (
        ({}, "trained with other hashes"),
        ({"weights": np.zeros((1, 255), np.float32)}, "is no linear model"),
        ({"weights": np.full((1, 256), np.nan, np.float32)}, "is no linear model"),
        ({"bias": np.array([object()])}, "is no linear model"),
    ):
        np.savez(path, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **(arrays | change))
        with pytest.raises(ParameterError, match=message):
            LinearJudge.load(path)
    with pytest.raises(ParameterError, match="cannot read the model"):
        LinearJudge.load(tmp_path / "none.npz")
    with pytest.raises(ParameterError, match="negative texts are missing"):
        train(["a"], [], "p")


KEY = b"an invented key of the tests"


def keyed(text: str) -> str:
    return hmac.new(KEY, text.encode(), hashlib.sha256).hexdigest()


@pytest.fixture
def lists(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "key").write_bytes(KEY + b"\n")
    lines = [f"term:{keyed('zorble')}", f"phrase-2:{keyed('green flumox')}", f"url:{keyed('bad.example/x')}", ""]
    (tmp_path / "list").write_text("\n".join([*lines, f"url:{keyed('worse.example')}"]))
    return str(tmp_path / "list"), str(tmp_path / "key")


def test_child_safety(lists: tuple[str, str]) -> None:
    matcher = ChildSafety.read((lists[0],), lists[1])
    texts = {
        "a ZORBLE.": True,
        "zorbles": False,
        "Green, flumox": True,
        "green": False,
        "flumox green": False,
        "": False,
    }
    assert {text: matcher.match_text(text) for text in texts} == texts
    urls = {
        "https://www.Bad.example/x/": True, "http://bad.example/x/y?q": True, "http://bad.example/xy": False,
        "http://bad.example": False, "http://a.worse.example:8080/z": True, "http://notworse.example": False, "": False,
    }  # fmt: skip
    assert {url: matcher.match_url(url) for url in urls} == urls
    scored = ChildSafety.read((), lists[1], classifier=lambda text: 0.9 if "mimsy" in text else 0.1, threshold=0.8)
    assert scored.match_text("all mimsy")
    assert not scored.match_text("all zorble")


def test_child_safety_files(lists: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="cannot read the list /none"):
        ChildSafety.read(("/none",), lists[1])
    with pytest.raises(ParameterError, match="has no entries and no classifier"):
        ChildSafety.read((), lists[1])
    (tmp_path / "short").write_text("short")
    with pytest.raises(ParameterError, match="has 5 bytes; expected at least 16"):
        ChildSafety.read((lists[0],), str(tmp_path / "short"))
    (tmp_path / "bad").write_text("\nsecretword\n")
    with pytest.raises(ParameterError, match="bad, line 2: expected term:") as error:
        ChildSafety.read((str(tmp_path / "bad"),), lists[1])
    assert "secretword" not in str(error.value)


def test_nothing_of_a_match_is_written(lists: tuple[str, str], tmp_path: Path) -> None:
    """A whole run: no file of it holds the text, the address or the id of what was dropped."""
    texts = [
        {"id": "idofmatch", "text": f"{sentences(1)} zorble"},
        {"id": "idofurl", "text": sentences(3), "url": "bad.example/x"},
    ]
    write_jsonl(tmp_path / "a.jsonl", [*texts, {"id": "good", "text": sentences(2)}])
    source = '[[source]]\nname = "a"\nreader = "jsonl"\npaths = ["a.jsonl"]\n'
    step = '[[step]]\nuse = "child-safety"\nlists = ["list"]\nkey_file = "key"\n'
    report = run(write_recipe(tmp_path, source + step), tmp_path / "out")
    assert flow(report, "child-safety", "a")["documents_out"] == 1
    (found,) = [s for s in report["steps"] if s["name"] == "child-safety"]
    names = {f"quarantined {keyed('a/' + id)}" for id in ("idofmatch", "idofurl")}
    assert set(found["notes"]) == names
    assert found["examples"] == {}
    import zstandard

    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if path.suffix == ".zst":
                data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
            for secret in (b"zorble", b"idofmatch", b"idofurl", b"bad.example", sentences(3)[:40].encode()):
                assert secret not in data, path


def test_steps(tmp_path: Path) -> None:
    good, bad = two_kinds(60, 1)
    train(good, bad, "quality").save(tmp_path / "m.npz")
    (tmp_path / "words.txt").write_text("zorble\n")
    texts = [good[0], bad[0], f"{good[1]} zorble zorble", f"{good[2]} mail me@some.host.org"]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    recipe = write_recipe(
        tmp_path,
        '[[source]]\nname = "a"\nreader = "jsonl"\npaths = ["a.jsonl"]\n[[step]]\nuse = "pii"\n'
        '[[step]]\nuse = "lexicon"\nlist = "words.txt"\n'
        '[[step]]\nuse = "linear"\nmodel = "m.npz"\npolicy = "quality"\nmin_score = 0.5\n',
    )
    report = run(recipe, tmp_path / "out")
    assert flow(report, "lexicon", "a")["dropped"] == {"lexicon": {"documents": 1, "bytes": len(texts[2])}}
    assert list(flow(report, "linear", "a")["dropped"]) == ["linear: quality too low"]
    assert next(s for s in report["steps"] if s["name"] == "pii")["notes"] == {"email": 1}
    assert report["totals"]["documents_out"] == 2


def test_the_command(tmp_path: Path, cli: Cli) -> None:  # noqa: F811
    good, bad = two_kinds(100, 5)
    write_jsonl(tmp_path / "good.jsonl", [{"text": text} for text in good])
    (tmp_path / "bad.txt").write_text("\n".join(bad))
    made = cli("safety", "train", tmp_path / "good.jsonl", tmp_path / "bad.txt", tmp_path / "m.npz")
    assert made.code == 0, made.err
    assert "90 and 90 texts" in made.out
    right = re.search(r"held out: 10 and 10 texts, ([\d.]+)% on the right side", made.out)
    assert right is not None
    assert float(right[1]) >= 90
    assert LinearJudge.load(tmp_path / "m.npz").score(good[0], "quality") > 0.5
    for arguments, line in {
        (
            tmp_path / "good.jsonl",
            tmp_path / "none",
            tmp_path / "m.npz",
        ): f"cannot read {tmp_path / 'none'}: No such file",
        (tmp_path / "good.jsonl", tmp_path / "bad.txt", tmp_path / "m.bin"): "expected a name that ends in .npz",
        (tmp_path / "good.jsonl", tmp_path / "bad.txt", tmp_path / "m.npz", "--bits", "30"): "bits must be 8 to 24",
    }.items():
        found = cli("safety", "train", *arguments)
        assert found.code == 2
        assert line in found.error


SCORES = """
def zorbles(text):
    return min(1.0, text.count("zorble") / 2)

def raises(text):
    raise ValueError(text)

def wrong(text):
    return text
"""


def test_a_classifier_of_the_operator(tmp_path: Path) -> None:
    """Matches are counted and written nowhere; one that fails ends the run, and its error holds no text."""
    (tmp_path / "key").write_text("an invented key of some length 0123456789")
    (tmp_path / "mine.py").write_text(SCORES)
    texts = ["zorble zorble here", "one zorble of text", "a fine text"]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    source = '[[source]]\nname = "a"\nreader = "jsonl"\npaths = ["a.jsonl"]\n'
    step = '[[step]]\nuse = "child-safety"\nlists = []\nkey_file = "key"\nthreshold = 0.9\nclassifier = "mine.py:{}"\n'
    report = run(write_recipe(tmp_path, source + step.format("zorbles")), tmp_path / "out")
    found = flow(report, "child-safety", "a")
    assert (found["documents_out"], sum(c["documents"] for c in found["dropped"].values())) == (2, 1)
    for path in (p for p in (tmp_path / "out").rglob("*") if p.is_file()):
        data = path.read_bytes()
        some = zstandard.ZstdDecompressor().decompressobj().decompress(data) if path.suffix == ".zst" else data
        assert b"zorble zorble" not in some
    for name, what in (("raises", "raised ValueError"), ("wrong", "gave str, no number from 0 to 1")):
        with pytest.raises(DataError, match=f"^the child-safety classifier {what}; mend it and run again$"):
            run(write_recipe(tmp_path, source + step.format(name)), tmp_path / name)
    with pytest.raises(RecipeError, match="has no function nobody"):
        run(write_recipe(tmp_path, source + step.format("nobody")), tmp_path / "none")
