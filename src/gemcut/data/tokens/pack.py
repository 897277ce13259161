"""A run's documents into shards of tokens, with an index of counts and hashes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemcut.data.dedup.arrays import load, save
from gemcut.data.executor import Executor, Progress
from gemcut.data.store import AtomicFile, read_documents, read_json, write_json
from gemcut.data.tokens.mixture import Mixture, order
from gemcut.data.tokens.reader import INDEX
from gemcut.data.tokens.tokenize import DocumentTokenizer
from gemcut.data.tokens.train import check_size, train_from_run
from gemcut.errors import ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = 1
#: Where a tokenizer that the recipe has trained is written, in the folder of the run.
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class TokenSpec:
    """The table [tokens] of a recipe: the ``tokenizer``.json, or the pieces of one to ``train``, and tokens a shard."""

    tokenizer: str = field(default="", metadata={"path": True})
    train: int = 0
    shard_tokens: int = 1 << 26

    def __post_init__(self) -> None:
        if bool(self.tokenizer) == bool(self.train):
            raise ParameterError("expected either tokenizer, a tokenizer.json, or train, the pieces of a new one")
        if self.train:
            check_size(self.train)
        if not 1 <= self.shard_tokens <= 1 << 32:
            raise ParameterError(f"shard_tokens is {self.shard_tokens}; expected 1 to {1 << 32}")


@dataclass(frozen=True)
class EncodeJob:
    """One part to be tokenized."""

    documents: Path
    tokenizer: Path
    out: Path

    def __str__(self) -> str:
        return f"the tokens of {self.documents.name}"


@dataclass(frozen=True)
class ShardJob:
    """One shard to be written: the documents by (part, number in the part), in order, and their sources."""

    folder: Path
    number: int
    parts: tuple[Path, ...]
    places: NDArray[np.int64]
    sources: NDArray[np.uint16]
    bos: int

    def __str__(self) -> str:
        return f"shard {self.number}"


def write_shards(
    out: Path,
    parts: list[tuple[str, int]],
    spec: TokenSpec,
    mixture: Mixture,
    seed: int,
    digest: str,
    executor: Executor,
) -> dict[str, Any]:
    """Tokenize ``out/documents``, mix, and write ``out/tokens``; what is there already is kept. The index.

    Args:
        parts: (source, number) of each part, in order.
        digest: SHA-256 of the recipe, for the index.
    """
    folder = out / "tokens"
    if (folder / INDEX).exists():
        index: dict[str, Any] = read_json(folder / INDEX)
        return index
    path = Path(spec.tokenizer) if spec.tokenizer else out / TOKENIZER
    if spec.train and not path.exists():
        train_from_run(out, spec.train, path)
    tokenizer = DocumentTokenizer(path)
    work = out / "work" / "tokens"
    encoded = [work / f"{number:05d}" for _, number in parts]
    jobs = [
        EncodeJob(out / "documents" / f"{number:05d}.jsonl.zst", path, made)
        for (_, number), made in zip(parts, encoded, strict=True)
        if not made.exists()
    ]
    executor(encode_part, jobs, _nothing, _silent)
    names = list(dict.fromkeys(source for source, _ in parts))
    by_part = [(source, _lengths(path)) for (source, _), path in zip(parts, encoded, strict=True)]
    lengths = {name: np.concatenate([sizes for source, sizes in by_part if source == name]) for name in names}
    shares = mixture.shares({name: int(sizes.sum()) for name, sizes in lengths.items()})
    number, owner = order(lengths, shares, seed)
    places = _places(parts, encoded, names)
    where = np.empty((len(number), 2), np.int64)
    sizes = np.empty(len(number), np.int64)
    for i, name in enumerate(names):
        own = owner == i
        where[own], sizes[own] = places[name][number[own]], lengths[name][number[own]]
    shard = np.concatenate([[0], np.cumsum(sizes)[:-1]]) // spec.shard_tokens if len(sizes) else np.zeros(0, np.int64)
    shard_jobs = []
    for i, value in enumerate(np.unique(shard).tolist()):
        own = shard == value
        shard_jobs.append(ShardJob(folder, i, tuple(encoded), where[own], owner[own].astype(np.uint16), tokenizer.bos))
    executor(write_shard, shard_jobs, _nothing, _silent)
    index = {
        "version": VERSION,
        "dtype": tokenizer.dtype.str,
        "bos": tokenizer.bos,
        "eos": tokenizer.eos,
        "vocabulary": tokenizer.vocabulary,
        "tokenizer_sha256": tokenizer.sha256,
        "recipe_sha256": digest,
        "seed": seed,
        "sources": names,
        "tokens_by_source": {
            name: {
                "there": int(lengths[name].sum()),
                "written": int(sizes[owner == i].sum()),
                "documents": int((owner == i).sum()),
            }
            for i, name in enumerate(names)
        },
        "tokens": int(sizes.sum()),
        "documents": len(sizes),
        "shards": [read_json(folder / f"{job.number:05d}.json") for job in shard_jobs],
    }
    write_json(folder / INDEX, index)
    return index


def encode_part(job: EncodeJob, progress: Progress) -> None:
    """Tokenize one part's documents."""
    ids, begin = DocumentTokenizer(job.tokenizer).encode(read_documents(job.documents))
    save(job.out, ids=ids, begin=begin)


def write_shard(job: ShardJob, progress: Progress) -> None:
    """Write one shard: tokens, where documents begin, their sources, and what the index says of it.

    Raises DataError where a document does not begin with its only <bos>.
    """
    from gemcut.data.tokens.tokenize import check_bos

    name = f"{job.number:05d}"
    opened: dict[int, tuple[NDArray[Any], NDArray[np.int64]]] = {}
    begin = np.zeros(len(job.places) + 1, np.int64)
    digest = hashlib.sha256()
    with AtomicFile(job.folder / f"{name}.tokens") as file:
        for i, (part, at) in enumerate(job.places.tolist()):
            if part not in opened:
                opened[part] = (load(job.parts[part], "ids"), load(job.parts[part], "begin"))
            ids, begins = opened[part]
            document = ids[int(begins[at]) : int(begins[at + 1])]
            check_bos([document], job.bos)
            data = document.tobytes()
            digest.update(data)
            file.write(data)
            begin[i + 1] = begin[i] + len(document)
    for kind, array in (("begin", begin), ("source", job.sources)):
        with AtomicFile(job.folder / f"{name}.{kind}.npy") as file:
            np.save(file, array, allow_pickle=False)
    write_json(
        job.folder / f"{name}.json",
        {
            "tokens_file": f"{name}.tokens",
            "begin_file": f"{name}.begin.npy",
            "source_file": f"{name}.source.npy",
            "tokens": int(begin[-1]),
            "documents": len(job.places),
            "sha256": digest.hexdigest(),
        },
    )


def _lengths(path: Path) -> NDArray[np.int64]:
    return np.diff(load(path, "begin"))


def _places(parts: list[tuple[str, int]], encoded: list[Path], names: list[str]) -> dict[str, NDArray[np.int64]]:
    """For each source (part, number in the part) of its documents, in order."""
    out: dict[str, list[NDArray[np.int64]]] = {name: [] for name in names}
    for i, ((source, _), path) in enumerate(zip(parts, encoded, strict=True)):
        count = len(load(path, "begin")) - 1
        out[source].append(np.stack([np.full(count, i), np.arange(count)], 1))
    return {name: np.concatenate(some) for name, some in out.items()}


def _nothing(number: int, result: Any) -> None:
    pass


def _silent(number: int, read: int, documents: int, dropped: int) -> None:
    pass
