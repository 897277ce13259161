"""Duplicates beside sets and datasketch: what is found, what is left alone, and how far clusters grow."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gemcut.data.dedup import minhash
from gemcut.data.dedup.near import Clusters, NearDuplicates, buckets
from gemcut.data.document import Document
from gemcut.data.store import read_documents, read_records
from gemcut.errors import DataError, ParameterError

from .corpus import WORDS, flow, run, sentences, write_jsonl, write_recipe

RECIPE = 'part_mb = 0.01\n[[source]]\nname = "a"\nreader = "jsonl"\npaths = ["a*.jsonl"]\n[[step]]\nuse = "{}"\n'


def grams(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def jaccard(one: str, other: str) -> float:
    a, b = grams(one), grams(other)
    return len(a & b) / len(a | b) if a | b else 0.0


def changed(text: str, draw: random.Random, every: int) -> str:
    """The text with about one word in ``every`` replaced."""
    words = text.split(" ")
    return " ".join(draw.choice(WORDS) + "x" if draw.random() < 1 / every else word for word in words)


def kept(out: Path) -> list[Document]:
    return [d for path in sorted((out / "documents").iterdir()) for d in read_documents(path)]


def write(folder: Path, texts: Sequence[str], files: int = 4) -> None:
    records = [{"id": f"{i:04d}", "text": text} for i, text in enumerate(texts)]
    size = -(-len(records) // files)
    for i in range(files):
        write_jsonl(folder / f"a{i}.jsonl", records[i * size : (i + 1) * size])


def test_exact_documents(tmp_path: Path) -> None:
    texts = [sentences(i % 7) + ("  \n" if i % 2 else "") for i in range(30)] + ["A", "a", "A "]
    write(tmp_path, texts)
    report = run(write_recipe(tmp_path, RECIPE.format("exact-duplicates")), tmp_path / "out")
    assert [d.id for d in kept(tmp_path / "out")] == [f"{i:04d}" for i in (*range(7), 30, 31)]
    assert flow(report, "exact-duplicates", "a")["dropped"]["exact duplicate"]["documents"] == 24
    assert next(s for s in report["steps"] if s["name"] == "exact-duplicates")["notes"] == {
        "pieces": 33,
        "repeated": 24,
    }


def test_exact_paragraphs(tmp_path: Path) -> None:
    long, other = sentences(1, 3), sentences(2, 3)
    texts = [f"{long}\n\nshort", f"short\n\n{other}\n\n{long.replace(' ', '  ', 1)}", f"{long}\n\n{other}", long + "."]
    write(tmp_path, texts, 2)
    report = run(write_recipe(tmp_path, RECIPE.format("exact-paragraphs")), tmp_path / "out")
    assert [d.text for d in kept(tmp_path / "out")] == [texts[0], f"short\n\n{other}", texts[3]]
    step = next(s for s in report["steps"] if s["name"] == "exact-paragraphs")
    assert step["notes"]["paragraphs cut"] == 1
    assert step["sources"]["a"]["dropped"]["all paragraphs stood before"]["documents"] == 1


def planted() -> tuple[list[str], dict[int, int]]:
    """300 originals, 60 of which have a near copy; copies by their originals."""
    draw = random.Random(5)
    texts = [" ".join(draw.choice(WORDS) + str(draw.randrange(40)) for _ in range(200)) for _ in range(300)]
    copies = {}
    for original in draw.sample(range(300), 60):
        copies[len(texts)] = original
        texts.append(changed(texts[original], draw, 60))
    return texts, copies


@pytest.mark.parametrize("kind", ["rensa", "numpy"])
def test_near_duplicates_that_were_planted(tmp_path: Path, kind: str) -> None:
    texts, copies = planted()
    write(tmp_path, texts)
    recipe = write_recipe(tmp_path, RECIPE.format("near-duplicates") + f'signatures = "{kind}"\n')
    report = run(recipe, tmp_path / "out", workers=1)
    left = {int(d.id) for d in kept(tmp_path / "out")}
    removed = set(range(len(texts))) - left
    alike = {copy for copy, original in copies.items() if jaccard(texts[copy], texts[original]) >= 0.8}
    assert len(alike) > 40
    assert removed <= alike  # nothing that is not alike, by sets of words
    assert len(removed) >= 0.97 * len(alike)
    notes = next(s for s in report["steps"] if s["name"] == "near-duplicates")["notes"]
    assert notes["clusters"] == len(removed)
    assert notes["largest cluster"] == 2


@pytest.mark.slow
def test_both_kinds_of_signatures_remove_the_same(tmp_path: Path) -> None:
    """600 pairs whose similarities are spread from 0.7 to 1: of those that are alike both find the same, up to 1 %."""
    draw = random.Random(9)
    originals = [" ".join(draw.choice(WORDS) + str(draw.randrange(40)) for _ in range(200)) for _ in range(600)]
    texts = originals + [changed(text, draw, draw.randint(60, 200)) for text in originals]
    alike = {600 + i for i in range(600) if jaccard(texts[600 + i], texts[i]) >= 0.8}
    assert 300 < len(alike) < 600
    removed = []
    for kind in ("rensa", "numpy"):
        (tmp_path / kind).mkdir()
        write(tmp_path / kind, texts)
        recipe = write_recipe(tmp_path / kind, RECIPE.format("near-duplicates") + f'signatures = "{kind}"\n')
        run(recipe, tmp_path / kind / "out")
        removed.append(set(range(len(texts))) - {int(d.id) for d in kept(tmp_path / kind / "out")})
        assert removed[-1] <= alike
        assert len(removed[-1]) >= 0.99 * len(alike)
    assert len(removed[0] ^ removed[1]) <= 0.01 * len(alike)


def test_signatures_estimate_jaccard() -> None:
    """Both ways agree with the similarity of the sets as far as 112 values can, as datasketch does."""
    datasketch = pytest.importorskip("datasketch", reason="needs the dev extra")
    draw = random.Random(2)
    base = " ".join(draw.choice(WORDS) + str(draw.randrange(30)) for _ in range(400))
    texts = [base] + [changed(base, draw, every) for every in (200, 80, 40, 20, 10, 5)]
    documents = [Document(str(i), "a", text) for i, text in enumerate(texts)]
    hashes, begin = minhash.shingles(documents, 5)
    assert np.diff(begin).tolist() == [len(grams(text)) for text in texts]
    peer = []
    for text in texts:
        sketch = datasketch.MinHash(num_perm=112, seed=1)
        for gram in grams(text):
            sketch.update(" ".join(gram).encode())
        peer.append(sketch)
    for kind in ("rensa", "numpy"):
        found = minhash.signatures(hashes, begin, kind)
        for i in range(1, len(texts)):
            exact = jaccard(base, texts[i])
            tolerance = 4 * (exact * (1 - exact) / 112) ** 0.5 + 1e-9  # four standard deviations
            assert abs((found[0] == found[i]).mean() - exact) <= tolerance, kind
            assert abs(peer[0].jaccard(peer[i]) - exact) <= tolerance


def test_signatures_do_not_depend_on_their_neighbours() -> None:
    documents = [Document(str(i), "a", text) for i, text in enumerate(["one two", *planted()[0][:20], ""])]
    for kind in ("rensa", "numpy"):
        together = minhash.signatures(*minhash.shingles(documents, 5), kind)
        alone = [minhash.signatures(*minhash.shingles([d], 5), kind)[0] for d in documents]
        assert (together == np.array(alone)).all()
        assert (together[[0, -1]] == 0xFFFFFFFF).all()  # fewer than five words


def test_a_chain_is_not_one_cluster_without_end(tmp_path: Path) -> None:
    """Each text is near the next one; a cluster stops at its cap, and the report says so."""
    draw = random.Random(3)
    texts = [" ".join(draw.choice(WORDS) + str(draw.randrange(40)) for _ in range(200))]
    for _ in range(39):
        texts.append(changed(texts[-1], draw, 100))
    write(tmp_path, texts)
    recipe = write_recipe(tmp_path, RECIPE.format("near-duplicates") + "max_cluster = 5\nmin_jaccard = 0.7\n")
    report = run(recipe, tmp_path / "out")
    notes = next(s for s in report["steps"] if s["name"] == "near-duplicates")["notes"]
    assert notes["largest cluster"] == 5
    assert notes["left by the cap"] > 0
    assert len(kept(tmp_path / "out")) >= 8


def test_clusters() -> None:
    clusters = Clusters(6, 3)
    assert clusters.join(5, 3)
    assert clusters.join(3, 1)
    assert clusters.join(5, 1)
    assert not clusters.join(1, 0)
    assert clusters.later().tolist() == [False, False, False, True, False, True]
    assert clusters.sizes().tolist() == [1, 3, 1, 0, 1, 0]
    assert list(buckets(np.array([7, 0, 9, 7, 0, 7, 9], np.uint64))) == [[0, 3, 5], [2, 6]]


def test_two_kinds_of_signatures_are_not_compared(tmp_path: Path) -> None:
    folders = []
    for kind in ("rensa", "numpy"):
        collector = NearDuplicates(signatures=kind).collector()  # type: ignore[arg-type]
        collector.add([Document("1", "a", sentences(1))])
        collector.save(tmp_path / kind)
        folders.append(tmp_path / kind)
    with pytest.raises(DataError, match="signatures of two kinds cannot be compared"):
        NearDuplicates().decide(folders, tmp_path / "decision")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"min_jaccard": 0.0}, "min_jaccard is 0"), ({"words": 0}, "words must be"), ({"max_cluster": 1}, "max_cluster")],
)
def test_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        NearDuplicates(**options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_same_bytes_on_several_workers(tmp_path: Path) -> None:
    from .corpus import files

    texts, _ = planted()
    write(tmp_path, texts + texts[:20])
    steps = RECIPE.format("exact-duplicates") + '[[step]]\nuse = "near-duplicates"\n[[step]]\nuse = "gopher-quality"\n'
    recipe = write_recipe(tmp_path, steps)
    run(recipe, tmp_path / "one")
    run(recipe, tmp_path / "three", 3)
    assert files(tmp_path / "one") == files(tmp_path / "three")


def test_rejects_name_their_step(tmp_path: Path) -> None:
    write(tmp_path, [sentences(1), sentences(1)])
    run(write_recipe(tmp_path, RECIPE.format("exact-duplicates")), tmp_path / "out")
    (record,) = [r for path in sorted((tmp_path / "out" / "rejects").iterdir()) for r in read_records(path)]
    assert (record["step"], record["reason"]) == ("exact-duplicates", "exact duplicate")
