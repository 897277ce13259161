"""Tokenizing, mixing, packing and reading back, beside the tokenizer itself and arithmetic by hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import support
from gemcut.data.recipe import read_recipe
from gemcut.data.store import read_documents
from gemcut.data.tokens.mixture import Mixture, order
from gemcut.data.tokens.reader import PackedReader, ShardReader
from gemcut.data.tokens.tokenize import DocumentTokenizer, check_bos
from gemcut.data.tokens.train import MARKS, common_characters, train
from gemcut.errors import DataError, ParameterError, RecipeError

from ..cli.conftest import Cli, cli  # noqa: F401
from .corpus import files, run, sentences, write_jsonl, write_recipe

RECIPE = """
seed = 7
part_mb = 0.004
[[source]]
name = "a"
reader = "jsonl"
paths = ["a*.jsonl"]
[[source]]
name = "b"
reader = "jsonl"
paths = ["b.jsonl"]
[tokens]
tokenizer = "tokenizer.json"
shard_tokens = 900
"""
ODD = "Numbers 1234, tabs\tand  two spaces\n\n    indented <bos> <eos> 中文 \U0001f600 x"


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train(lambda: iter([sentences(i) for i in range(60)] + [ODD]), 420).save(str(path))
    return path


@pytest.fixture
def folder(tmp_path: Path, tokenizer_json: Path) -> Path:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    for i in range(3):
        write_jsonl(tmp_path / f"a{i}.jsonl", [{"text": sentences(10 * i + j)} for j in range(10)])
    write_jsonl(tmp_path / "b.jsonl", [{"text": sentences(100 + i)} for i in range(6)] + [{"text": ODD}])
    return tmp_path


def test_a_trained_tokenizer(tokenizer_json: Path) -> None:
    import tokenizers

    found = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    assert found.get_vocab_size() == 420
    assert [found.token_to_id(m) for m in MARKS] == list(range(108))
    assert (MARKS[:4], MARKS[106:]) == (("<pad>", "<eos>", "<bos>", "<unk>"), ("<start_of_turn>", "<end_of_turn>"))
    assert found.token_to_id("<0x41>") == 108 + 0x41
    found.encode_special_tokens = True
    for text in (sentences(3), ODD, "", "a", " a", "\x07é<0x41>"):
        ids = found.encode(text, add_special_tokens=False).ids
        assert found.decode(ids, skip_special_tokens=False) == text
        assert not set(ids) & set(range(108))
    pieces = [p for p in found.encode(" 12 river  stone").tokens if not p.startswith("<0x")]
    assert pieces
    assert not any(any(c.isdigit() for c in piece) and len(piece.lstrip("▁")) > 1 for piece in pieces)


def test_too_little_to_learn() -> None:
    with pytest.raises(DataError, match="the texts hold"):
        train(lambda: iter(["a b c"]), 1000)
    with pytest.raises(ParameterError, match="the size is 10; expected 365"):
        train(lambda: iter(["a"]), 10)


def test_the_characters_of_a_tokenizer() -> None:
    """The most frequent; of equally many the lower code point, whatever the order of the texts."""
    texts = ["bbb aaa c d", "d c é"]
    for some in (texts, texts[::-1]):
        assert common_characters(iter(some), 5) == ["▁", "a", "b", "c", "d"]
        assert common_characters(iter(some), 4) == ["▁", "a", "b", "c"]
        assert common_characters(iter(some), 99) == ["▁", "a", "b", "c", "d", "é"]


def test_a_recipe_that_trains_its_tokenizer(folder: Path) -> None:
    """Trained on what the run kept, written beside the shards, the same bytes each time."""
    recipe = write_recipe(folder, RECIPE.replace('tokenizer = "tokenizer.json"', "train = 420"))
    run(recipe, folder / "out")
    run(recipe, folder / "again")
    assert files(folder / "out") == files(folder / "again")
    made = folder / "out" / "tokenizer.json"
    index = ShardReader(folder / "out" / "tokens").index
    assert index["tokenizer_sha256"] == hashlib.sha256(made.read_bytes()).hexdigest()
    assert index["vocabulary"] == 420
    import tokenizers

    reader, text = ShardReader(folder / "out" / "tokens"), tokenizers.Tokenizer.from_file(str(made))
    kept = {d.text for path in (folder / "out" / "documents").iterdir() for d in read_documents(path)}
    assert {text.decode(reader[i][1:-1].tolist(), skip_special_tokens=False) for i in range(len(reader))} == kept
    for table in ("", 'train = 420\ntokenizer = "tokenizer.json"', "train = 5"):
        with pytest.raises(RecipeError, match=r"\[tokens\]: (expected either tokenizer|the size is 5)"):
            read_recipe(write_recipe(folder, RECIPE.replace('tokenizer = "tokenizer.json"', table)))


def test_grain_reads_shards(folder: Path) -> None:
    """An epoch of grain's loader, shuffled: each window once, as it stands in the shards."""
    grain = pytest.importorskip("grain", reason="grain is not installed; gemcut[train] brings it")
    from grain import samplers, transforms

    run(write_recipe(folder, RECIPE), folder / "out")
    packed = PackedReader(folder / "out" / "tokens", 64)
    sampler = samplers.IndexSampler(len(packed), num_epochs=1, shuffle=True, seed=3)
    batch = transforms.Batch(batch_size=5, drop_remainder=False)
    loader = grain.DataLoader(data_source=packed, sampler=sampler, operations=[batch], worker_count=0)
    batches = list(loader)
    assert {name: array.shape for name, array in batches[0].items()} == dict.fromkeys(packed[0], (5, 64))
    rows = [row.tobytes() for b in batches for row in np.concatenate([b[n] for n in sorted(b)], 1)]
    whole = [np.concatenate([packed[i][n] for n in sorted(packed[i])]).tobytes() for i in range(len(packed))]
    assert sorted(rows) == sorted(whole)
    assert rows != whole


PIECES_OF_TEXTS = st.sampled_from(
    [" ", "  ", "\n", "\n\n", "\t", "\r", "\x0b", "\xa0", "\x85", "▁", "}", "{", ");", "\r\n", "12", "river", "stone",
     "the", "é", "中文", "\U0001f600", "<bos>", "<0x41>", "<table>", "a\u0301", "\u2003", "\x1c"]
)  # fmt: skip


def test_words_give_what_whole_texts_give(tokenizer_json: Path) -> None:
    """Beside the library on whole texts, for our tokenizer and Gemma's."""
    paths = [tokenizer_json]
    real = support.real_dir()
    if real is not None and (gemma := real / "gemma2-tokenizer" / "tokenizer.json").exists():
        paths.append(gemma)
    for path in paths:
        tokenizer = DocumentTokenizer(path)
        assert tokenizer._words is not None

        _same_by_words(tokenizer)


def _same_by_words(tokenizer: DocumentTokenizer) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.lists(PIECES_OF_TEXTS, max_size=40).map("".join), max_size=4))
    def same(texts: list[str]) -> None:
        assert tokenizer._encode(texts) == tokenizer._whole(texts)

    same()


def test_tokenizers_whose_words_are_not_alone(tokenizer_json: Path, tmp_path: Path) -> None:
    """A piece that spans the end of a word, or another normalizer: the whole text goes to the library."""
    spec = json.loads(tokenizer_json.read_text())
    spans, other, prefix = (json.loads(json.dumps(spec)) for _ in range(3))
    spans["model"]["vocab"]["e▁r"] = 420
    other["normalizer"] = {"type": "Lowercase"}
    prefix["added_tokens"].append(
        {"id": 420, "content": "er st", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": False}
    )  # fmt: skip
    for number, changed in enumerate((spans, other, prefix)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(changed))
        assert DocumentTokenizer(path)._words is None
    assert 420 in DocumentTokenizer(path)._encode(["river stone"])[0]


def test_shards_hold_every_document_once(folder: Path) -> None:
    report = run(write_recipe(folder, RECIPE), folder / "out")
    reader = ShardReader(folder / "out" / "tokens")
    tokenizer = DocumentTokenizer(folder / "tokenizer.json")
    paths = sorted((folder / "out" / "documents").iterdir())
    documents = [d for path in paths for d in read_documents(path)]
    expected = []
    for d in documents:
        ids = tokenizer._tokenizer.encode(d.text, add_special_tokens=False).ids
        expected.append((d.source, (2, *ids, 1)))
    found = [(reader.source(i), tuple(reader[i].tolist())) for i in range(len(reader))]
    assert sorted(found) == sorted(expected)
    assert found != expected  # shuffled
    assert all(ids.count(2) == 1 for _, ids in found)  # the <bos> in a text is spelled out
    assert reader.index["dtype"] == "<u2"
    index = json.loads((folder / "out" / "tokens" / "index.json").read_text())
    assert index == report["tokens"]
    assert index["tokens"] == sum(len(ids) for _, ids in expected) == reader.tokens
    assert len(index["shards"]) > 3
    for shard in index["shards"]:
        data = (folder / "out" / "tokens" / shard["tokens_file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        assert len(data) == 2 * shard["tokens"]
    for bad in (-1, len(reader)):
        with pytest.raises(IndexError):
            reader[bad]


def test_windows(folder: Path) -> None:
    run(write_recipe(folder, RECIPE), folder / "out")
    reader, packed = ShardReader(folder / "out" / "tokens"), PackedReader(folder / "out" / "tokens", 257)
    stream = [(t, i, k, reader.source(i)) for i in range(len(reader)) for k, t in enumerate(reader[i].tolist())]
    assert len(packed) == len(stream) // 257
    for n in range(len(packed)):
        window, part = packed[n], stream[257 * n : 257 * (n + 1)]
        assert window["tokens"].tolist() == [t for t, _, _, _ in part]
        assert window["segment_ids"].tolist() == [i - part[0][1] + 1 for _, i, _, _ in part]
        first = {i: next(k for _, j, k, _ in part if j == i) for _, i, _, _ in part}
        assert window["positions"].tolist() == [k - first[i] for _, i, k, _ in part]
        assert [reader.sources[s] for s in window["source_ids"]] == [s for _, _, _, s in part]
    with pytest.raises(IndexError):
        packed[len(packed)]


@pytest.mark.slow
def test_the_same_shards_on_several_workers(folder: Path) -> None:
    recipe = write_recipe(folder, RECIPE + "[mixture]\ntokens = 20000\n")
    run(recipe, folder / "one")
    run(recipe, folder / "three", 3)
    assert files(folder / "one") == files(folder / "three")


def test_shares() -> None:
    sizes = {"a": 1000, "b": 100, "c": 10}
    assert Mixture().shares(sizes) == sizes
    assert Mixture(tokens=555).shares(sizes) == {"a": 500, "b": 50, "c": 5}
    assert Mixture(tokens=300, weights={"a": 1, "b": 1, "c": 1}).shares(sizes) == {"a": 130, "b": 130, "c": 40}
    # Square roots of 1000, 100 and 10 are as 10 to 3.162 to 1.
    flat = Mixture(tokens=300, temperature=2.0, max_epochs=9).shares(sizes)
    assert flat == {"a": 211, "b": 66, "c": 21}
    assert Mixture(tokens=10**6).shares(sizes) == {"a": 4000, "b": 400, "c": 40}
    assert Mixture(epochs={"b": 2.5, "c": 0}, budgets={"a": 300}).shares(sizes) == {"a": 300, "b": 250, "c": 0}
    with pytest.raises(DataError, match="names the source d"):
        Mixture(weights={"d": 1}).shares(sizes)
    with pytest.raises(ParameterError, match=r"weights.a is -1; expected at least 0"):
        Mixture(weights={"a": -1})


def test_order() -> None:
    lengths = {"a": np.full(100, 10), "b": np.full(50, 10)}
    number, owner = order(lengths, {"a": 2500, "b": 200}, 3)
    counts = np.bincount(number[owner == 0], minlength=100)
    assert (counts.min(), counts.max(), counts.sum()) == (2, 3, 250)  # two and a half epochs
    assert sorted(np.bincount(number[owner == 1], minlength=50).tolist()) == [0] * 30 + [1] * 20
    again = order(lengths, {"a": 2500, "b": 200}, 3)
    assert (again[0] == number).all()
    assert (order(lengths, {"a": 2500, "b": 200}, 4)[0] != number).any()
    alone = order({"a": lengths["a"], "b": np.full(7, 3)}, {"a": 2500, "b": 0}, 3)[0]
    assert sorted(alone) == sorted(number[owner == 0])  # another source changes none of its draws


def test_bos_is_checked() -> None:
    good = np.array([2, 5, 1])
    check_bos([good], 2)
    for bad in ([5, 2, 1], [2, 2, 1], [5, 1], []):
        with pytest.raises(DataError, match="<bos>"):
            check_bos([good, np.array(bad)], 2)


def test_damaged_shards(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no index.json in"):
        ShardReader(tmp_path / "none")
    run(write_recipe(folder, RECIPE), folder / "out")
    path = folder / "out" / "tokens" / "00000.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="tokens, the index says"):
        ShardReader(folder / "out" / "tokens")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"tokenizer.json"', '"none.json"'), r"\[tokens\]: cannot read .*none.json: No such file"),
        (("shard_tokens = 900", "shard_tokens = 0"), r"\[tokens\]: shard_tokens is 0"),
        (("shard_tokens", "shard_token"), r"\[tokens\]: unknown key 'shard_token'"),
        (
            ("[tokens]", "[mixture]\nweights = {c = 1}\n[tokens]"),
            r"\[mixture\]: weights names 'c'; expected one of a, b",
        ),
        (("[tokens]", "[mixture]\ntemperature = 0\n[tokens]"), r"\[mixture\]: mixture: tokens must be"),
        (("[tokens]", "[mixture]\nepochs = {a = 'x'}\n[tokens]"), r"epochs is \{'a': 'x'\}; expected a table"),
    ],
)
def test_mistakes(folder: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(write_recipe(folder, RECIPE.replace(*change)))


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ParameterError, match=r"t.json is no tokenizer.json"):
        DocumentTokenizer(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
    )
    with pytest.raises(ParameterError, match="has no <bos>"):
        DocumentTokenizer(tmp_path / "t.json")


def test_the_command(folder: Path, cli: Cli) -> None:  # noqa: F811
    run(write_recipe(folder, RECIPE), folder / "out")
    made = cli("data", "train-tokenizer", folder / "out", folder / "new.json", "--size", "400")
    assert made.code == 0, made.err
    assert made.out.startswith("400 pieces from ")
    assert DocumentTokenizer(folder / "new.json").vocabulary == 400
    refused = cli("data", "train-tokenizer", folder / "none", folder / "new.json")
    assert refused.error.startswith("error: there are no documents in")
