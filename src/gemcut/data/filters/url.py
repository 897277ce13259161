"""Block lists of domains and addresses, as sorted arrays of hashes: 8 bytes an entry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

import numpy as np

from gemcut.data.dedup.arrays import load, save
from gemcut.data.document import Document
from gemcut.data.readers.base import DamagedFileError, open_plain, read_lines
from gemcut.data.steps import Filter
from gemcut.data.store import needs
from gemcut.errors import ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass
class UrlBlock(Filter):
    """Drops documents whose address is in one of ``lists``: files with a domain or an address a line, .gz and .zst too.

    A domain blocks its subdomains; an address blocks what begins with it, up to a ``/``. Documents without an address
    are kept.
    """

    NAME: ClassVar[str] = "url-block"
    READS_TEXTS: ClassVar[bool] = False

    lists: tuple[str, ...] = field(metadata={"path": True})

    def __post_init__(self) -> None:
        self._hashes: NDArray[np.uint64] | None = None

    def files(self) -> Sequence[str]:
        return self.lists

    def prepare(self, folder: Path) -> None:
        save(folder, hashes=read_lists(self.lists))

    def use(self, folder: Path) -> None:
        self._hashes = load(folder, "hashes")

    def refuses(self, url: str) -> bool:
        return bool(url) and bool(contains(self._table(), hash_keys(keys_of(url))).any())

    def _table(self) -> NDArray[np.uint64]:
        if self._hashes is None:
            self._hashes = read_lists(self.lists)
        return self._hashes

    def judge(self, documents: Sequence[Document]) -> list[str | None]:
        reasons: list[str | None] = [None] * len(documents)
        keys = [(i, key) for i, document in enumerate(documents) if document.url for key in keys_of(document.url)]
        found = contains(self._table(), hash_keys(key for _, key in keys))
        for (i, key), blocked in zip(keys, found.tolist(), strict=True):
            if blocked and reasons[i] is None:
                reasons[i] = "url: address is blocked" if "/" in key else "url: domain is blocked"
        return reasons


def keys_of(url: str) -> list[str]:
    """What of an address a list may hold: its host, each domain above it, and each path down to the address itself."""
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        host = (parts.hostname or "").rstrip(".")
    except ValueError:
        return []
    labels = host.split(".")
    keys = [".".join(labels[i:]) for i in range(len(labels))]
    pieces = [piece for piece in parts.path.split("/") if piece]
    for bare in {host, host.removeprefix("www.")}:
        keys += [f"{bare}/{'/'.join(pieces[: i + 1])}" for i in range(len(pieces))]
    return keys


def normal(entry: str) -> str:
    """An entry of a list as ``keys_of`` writes it: no scheme, no ``www.``, lower-case host; "" for none."""
    entry = entry.strip()
    if not entry or entry.startswith("#"):
        return ""
    try:
        parts = urlsplit(entry if "//" in entry else f"//{entry}")
        host = (parts.hostname or "").removeprefix("www.").rstrip(".")
    except ValueError:
        return ""
    path = "/".join(piece for piece in parts.path.split("/") if piece)
    return f"{host}/{path}" if path and host else host


def hash_keys(keys: Iterable[str]) -> NDArray[np.uint64]:
    """xxh3-64 of each key."""
    try:
        from xxhash import xxh3_64_intdigest
    except ImportError:
        raise needs("xxhash") from None
    return np.fromiter((xxh3_64_intdigest(key.encode("utf-8", "replace")) for key in keys), np.uint64)


def read_lists(paths: Sequence[str]) -> NDArray[np.uint64]:
    """The entries of some files as sorted hashes. Raises ParameterError where one cannot be read."""
    parts = []
    for path in paths:
        try:
            parts.append(hash_keys(key for key in map(normal, _entries(path)) if key))
        except OSError as error:
            raise ParameterError(f"cannot read the block list {path}: {error.strerror or error}") from None
        except DamagedFileError as error:
            raise ParameterError(f"the block list {path} is damaged: {error}") from None
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)


def _entries(path: str) -> Iterator[str]:
    with open_plain(path) as file:
        for _, line in read_lines(file, 1 << 16):
            if line is not None:
                yield line.decode("utf-8", "replace")


def contains(table: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which values are in a sorted table."""
    if not len(table):
        return np.zeros(len(values), np.bool_)
    places = np.minimum(np.searchsorted(table, values), len(table) - 1)
    found: NDArray[np.bool_] = table[places] == values
    return found
