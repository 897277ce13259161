"""Windows against documents laid out by hand; batches that go on where they stopped; shards that do not fit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from gemcut.errors import DataError, ParameterError
from gemcut.training.data import Windows, batches, read_texts, shard_windows

BOS = 2


def windows(length: int = 4, documents: int = 25, name: str = "made") -> Windows:
    """Documents of 1 to 7 tokens: <bos> and 10, 11, …; in two parts that cut a window."""
    sizes = [i % 7 + 1 for i in range(documents)]
    tokens = np.concatenate([[BOS, *range(10, 10 + size - 1)] for size in sizes])
    begins = np.cumsum([0, *sizes])[:-1].astype(np.int64)
    return Windows([tokens[:10], tokens[10:]], begins, length, name)


def test_windows_hold_the_documents_with_segments_and_positions() -> None:
    made = windows()
    # documents: 2 | 2 10 | 2 10 11 | 2 10 11 12 | …
    assert made[0]["tokens"].tolist() == [2, 2, 10, 2]
    assert made[0]["segments"].tolist() == [1, 2, 2, 3]
    assert made[0]["positions"].tolist() == [0, 0, 1, 0]
    assert made[1]["tokens"].tolist() == [10, 11, 2, 10]
    assert made[1]["positions"].tolist() == [0, 1, 0, 1]
    assert made[1]["segments"].tolist() == [1, 1, 2, 2]
    assert made[1]["document"] == 2
    assert made[2]["tokens"].tolist() == [11, 12, 2, 10]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterator_goes_on_with_the_next_batch_in_the_middle_of_an_epoch(workers: int) -> None:
    def start():
        return batches([(windows(), 2.0), (windows(name="other"), 1.0)], 3, seed=5, workers=workers)

    whole = start()
    right = [next(whole) for _ in range(24)]  # more than an epoch of 23 windows
    first = start()
    for _ in range(7):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    assert len(json.dumps(state)) < 500
    second = start()
    second.set_state(state)
    for expected in right[7:]:
        found = next(second)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_an_epoch_holds_each_window_once_and_processes_share_it() -> None:
    made = windows(documents=28)
    assert len(made) == 28
    seen = []
    for process in range(2):
        rows = batches([(made, 1.0)], 1, seed=1, process=process, processes=2)
        seen += [next(rows)["tokens"][0].tolist() for _ in range(len(made) // 2)]
    assert sorted(seen) == sorted(made[i]["tokens"].tolist() for i in range(len(made)))


def write_shards(folder: Path, tokens: list[int], begins: list[int], vocabulary: int = 32) -> Path:
    array = np.asarray(tokens, "<u2")
    array.tofile(folder / "0.tokens")
    np.save(folder / "0.begin.npy", np.asarray(begins, np.int64))
    np.save(folder / "0.source.npy", np.zeros(len(begins) - 1, np.uint16))
    shard = {
        "tokens": len(tokens),
        "tokens_file": "0.tokens",
        "begin_file": "0.begin.npy",
        "source_file": "0.source.npy",
    }
    shard["sha256"] = hashlib.sha256(array.tobytes()).hexdigest()
    index = {"dtype": "<u2", "sources": ["made"], "vocabulary": vocabulary, "tokenizer_sha256": "ab", "shards": [shard]}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_checked(tmp_path: Path) -> None:
    def read(tokens, begins=(0, 3, 6), vocabulary=32, model=32, tokenizer="ab", length=3):
        folder = write_shards(tmp_path, tokens, list(begins), vocabulary)
        return shard_windows(folder, length, vocabulary=model, bos=BOS, tokenizer_sha256=tokenizer)

    good = [2, 5, 6, 2, 7, 8]
    assert read(good)[1]["tokens"].tolist() == [2, 7, 8]
    for message, arguments in {
        "made with another tokenizer": {"tokenizer": "cd"},
        "vocabulary of 64, the model one of 32": {"vocabulary": 64},
        "holds 6 tokens; expected at least one window of 9": {"length": 9},
    }.items():
        with pytest.raises(DataError, match=message):
            read(good, **arguments)
    with pytest.raises(DataError, match="holds the id 40; the model's vocabulary ends at 31"):
        read([2, 5, 40, 2, 7, 8])
    with pytest.raises(DataError, match="a document without <bos>"):
        read([2, 5, 6, 9, 7, 8])
    with pytest.raises(DataError, match=r"<bos> .id 2. inside a document"):
        read([2, 2, 6, 2, 7, 8])
    read(good)
    (tmp_path / "0.tokens").write_bytes(np.asarray([2, 5, 7, 2, 7, 8], "<u2").tobytes())
    with pytest.raises(DataError, match="is damaged: its hash is not the index's"):
        shard_windows(tmp_path, 3, vocabulary=32, bos=BOS)


def test_mixtures_and_folders_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the mixture is empty"):
        batches([], 1, seed=0)
    with pytest.raises(ParameterError, match=r"weights of the mixture are \[nan\]"):
        batches([(windows(), float("nan"))], 1, seed=0)
    with pytest.raises(DataError, match="has no text; expected shards"):
        read_texts(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"cannot read .*a\.txt"):
        read_texts(tmp_path)
