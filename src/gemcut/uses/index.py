"""An index of a folder's documents: passages with their lines and words in one SQLite file, ranked by BM25.

SQLite's transactions make it whole after a power cut; files that are read are kept a few at a time, so that a run that
was ended goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from gemcut import files
from gemcut.errors import ParameterError, UnsupportedError
from gemcut.uses.bm25 import Ranking
from gemcut.uses.chunks import split_text
from gemcut.uses.reading import MAX_BYTES, document_text
from gemcut.uses.words import content_terms, terms

#: Of what stands in the file, words and passages included; another one is made anew.
VERSION = 1
#: Characters of a passage: some 200 tokens, so that many fit a context of 8,192.
PASSAGE = 800
_TOGETHER = 32
_TABLES = """
CREATE TABLE files (id INTEGER PRIMARY KEY, path TEXT UNIQUE, stamp TEXT, hash TEXT, problem TEXT);
CREATE TABLE passages (id INTEGER PRIMARY KEY, file INTEGER REFERENCES files, line INTEGER, text TEXT, words TEXT);
CREATE INDEX of_file ON passages (file);
CREATE TABLE ranking (id INTEGER PRIMARY KEY CHECK (id = 1), passages BLOB, tables BLOB);
"""


@dataclass(frozen=True)
class Passage:
    """A part of a file: its path in the folder, the number of its first line, its text."""

    path: str
    line: int
    text: str
    score: float = 0.0


@dataclass
class Changes:
    """What an update found: how many files are indexed, were read for it and are gone; those passed over, and why."""

    files: int = 0
    read: int = 0
    removed: int = 0
    passed: dict[str, str] = field(default_factory=dict)
    remade: str = ""


class DocumentIndex:
    """The index of one folder. Context manager; `update` it, then `search`."""

    def __init__(self, folder: Path, where: Path) -> None:
        """
        Args:
            folder: of the documents.
            where: the index's file; its folder is made.

        Raises:
            ParameterError: ``folder`` is none, or the index cannot be opened or written.
        """
        try:
            if not folder.is_dir():
                raise ParameterError(f"{folder} is no folder; expected one with documents")
        except (OSError, ValueError) as error:
            if isinstance(error, ParameterError):
                raise
            raise ParameterError(f"cannot read {folder}: {getattr(error, 'strerror', None) or error}") from None
        self.folder, self.where, self._remade = folder, where, ""
        self._ranking: tuple[list[int], Ranking | None] | None = None
        try:
            where.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open()
        except (OSError, sqlite3.OperationalError) as error:
            raise self._unusable(error) from None

    def __enter__(self) -> DocumentIndex:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._base.close()

    def update(self, heard: Callable[[int, int], None] | None = None) -> Changes:
        """Read what is new or changed, and drop what is gone. ``heard`` is called with (files done, files in all).

        A file counts as unchanged where its size and times are; else where its SHA-256 is. Binary files, files without
        text and those that cannot be read are passed over. Links to folders are not followed.

        Raises ParameterError where the index cannot be written.
        """
        try:
            return self._update(heard)
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def search(self, question: str, most: int = 8) -> list[Passage]:
        """The passages that fit a question best; those that have none of its words that matter are left out.

        Raises ParameterError where the question has no word at all, or the index cannot be read.
        """
        if not terms(question):
            raise ParameterError("the question has no word in it; ask with at least one")
        try:
            ids, ranking = self._ranked()
            if ranking is None:
                return []
            scores = ranking.scores(content_terms(question))
            best = sorted((place for place in range(len(ids)) if scores[place] > 0), key=lambda at: (-scores[at], at))
            return [self._passage(ids[place], float(scores[place])) for place in best[:most]]
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def some_text(self, most: int = 200) -> str:
        """The beginning of some passages, to see what they are written in."""
        rows = self._base.execute("SELECT substr(text, 1, 100) FROM passages LIMIT ?", (most,))
        return "\n".join(text for (text,) in rows)

    # ---- the file ------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Open the file; where it is another version's, another folder's or damaged, begin a new one."""
        base = sqlite3.connect(self.where, timeout=60, isolation_level=None)
        try:
            (version,) = base.execute("PRAGMA user_version").fetchone()
            (tables,) = base.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if tables and version != VERSION:
                self._remade = f"the index is of version {version}, this gemcut's of {VERSION}; it is made anew"
            elif tables:
                (state,) = base.execute("PRAGMA quick_check(1)").fetchone()
                if state != "ok":
                    raise sqlite3.DatabaseError(state)
        except sqlite3.OperationalError:
            base.close()
            raise
        except sqlite3.DatabaseError:
            self._remade = "the index was damaged; it is made anew"
        if self._remade:
            base.close()
            for ending in ("", "-journal", "-wal", "-shm"):
                self.where.with_name(self.where.name + ending).unlink(missing_ok=True)
            base = sqlite3.connect(self.where, timeout=60, isolation_level=None)
        self._base = base
        base.execute("BEGIN IMMEDIATE")  # another process may have made them since
        if not base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in filter(str.strip, _TABLES.split(";")):
                base.execute(statement)
            base.execute(f"PRAGMA user_version = {VERSION}")
        base.execute("COMMIT")

    def _unusable(self, error: Exception) -> ParameterError:
        said = getattr(error, "strerror", None) or error
        return ParameterError(f"cannot use the index {self.where}: {said}; see who else writes there, or remove it")

    def _update(self, heard: Callable[[int, int], None] | None) -> Changes:
        changes, base = Changes(remade=self._remade), self._base
        known = {path: (place, stamp, digest) for place, path, stamp, digest in base.execute(
            "SELECT id, path, stamp, hash FROM files")}  # fmt: skip
        found = dict(_walk(self.folder))
        gone = [known[path][0] for path in known if path not in found]
        with self._transaction():
            self._drop(gone)
        changes.removed = len(gone)
        todo = [path for path, stamp in found.items() if path not in known or known[path][1] != stamp]
        for start in range(0, len(todo), _TOGETHER):
            with self._transaction():
                for path in todo[start : start + _TOGETHER]:
                    changes.read += self._read(path, found[path], known.get(path))
            if heard is not None:
                heard(min(start + _TOGETHER, len(todo)), len(todo))
        changes.passed = dict(base.execute("SELECT path, problem FROM files WHERE problem != '' ORDER BY path"))
        changes.files = len(found) - len(changes.passed)
        return changes

    def _read(self, path: str, stamp: str, known: tuple[int, str, str] | None) -> bool:
        """Index one file; False where its content is the known one."""
        try:
            digest, text, problem = _content(self.folder / path, None if known is None else known[2])
        except UnsupportedError as error:  # its reader may be installed tomorrow: look again then
            stamp, digest, text, problem = "", "", "", str(error)
        if known is not None:
            if digest == known[2]:
                self._base.execute("UPDATE files SET stamp = ? WHERE id = ?", (stamp, known[0]))
                return False
            self._drop([known[0]])
        row = (path, stamp, digest, problem)
        place = self._base.execute("INSERT INTO files (path, stamp, hash, problem) VALUES (?, ?, ?, ?)", row).lastrowid
        self._base.executemany(
            "INSERT INTO passages (file, line, text, words) VALUES (?, ?, ?, ?)",
            ((place, line, part, " ".join(terms(f"{path} {part}"))) for line, part in passages(text)),
        )
        self._base.execute("DELETE FROM ranking")
        return True

    def _drop(self, gone: list[int]) -> None:
        if gone:
            self._base.executemany("DELETE FROM passages WHERE file = ?", ((place,) for place in gone))
            self._base.executemany("DELETE FROM files WHERE id = ?", ((place,) for place in gone))
            self._base.execute("DELETE FROM ranking")
        self._ranking = None

    def _transaction(self) -> sqlite3.Connection:
        self._ranking = None
        self._base.execute("BEGIN IMMEDIATE")
        return self._base

    def _ranked(self) -> tuple[list[int], Ranking | None]:
        """The passages' ids and their ranking, from the file where it is still true."""
        if self._ranking is not None:
            return self._ranking
        row = self._base.execute("SELECT passages, tables FROM ranking").fetchone()
        if row is not None:
            try:
                self._ranking = json.loads(row[0]), Ranking.from_bytes(row[1])
                return self._ranking
            except (ValueError, KeyError, OSError, zipfile.BadZipFile):
                pass  # made again below
        with self._transaction():
            rows = self._base.execute("SELECT id, words FROM passages WHERE words != '' ORDER BY id").fetchall()
            ids = [place for place, _ in rows]
            ranking = Ranking.build([words.split() for _, words in rows]) if rows else None
            if ranking is not None:
                kept = (json.dumps(ids), ranking.to_bytes())
                self._base.execute("INSERT OR REPLACE INTO ranking VALUES (1, ?, ?)", kept)
        self._ranking = ids, ranking
        return self._ranking

    def _passage(self, place: int, score: float) -> Passage:
        query = "SELECT path, line, text FROM passages JOIN files ON files.id = file WHERE passages.id = ?"
        path, line, text = self._base.execute(query, (place,)).fetchone()
        return Passage(path, line, text, score)


def index_file(folder: Path, kept: Path) -> Path:
    """Where the index of a folder is, in the folder of all indexes."""
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
    return kept / f"{name}.sqlite"


def passages(text: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of each passage: as many sentences as PASSAGE characters hold."""
    line = 1
    for part in split_text(text, lambda own: len(own) <= PASSAGE):
        if part.strip():
            ahead = len(part) - len(part.lstrip())
            yield line + part.count("\n", 0, ahead), part.strip()
        line += part.count("\n")


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    """(path in the folder, size and times) of each regular file, hidden ones left out. A file is met once."""
    seen: set[tuple[int, int]] = set()
    for top, folders, names in os.walk(folder):  # does not follow links to folders: they could be loops
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith("."):
                continue
            path = Path(top, name)
            try:
                name.encode()
                files.check_regular(path)
                stat = path.stat()
            except (OSError, ValueError):  # a broken link, a device, a name that is no text
                continue
            if (stat.st_dev, stat.st_ino) not in seen:
                seen.add((stat.st_dev, stat.st_ino))
                stamp = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
                yield path.relative_to(folder).as_posix(), stamp


def _content(path: Path, known: str | None) -> tuple[str, str, str]:
    """(hash, text, problem) of a file; the text is not made where the hash is the known one.

    Raises UnsupportedError where the library that reads it is not installed.
    """
    try:
        data = _bytes(path)
        digest = hashlib.sha256(data).hexdigest()
        if digest == known:
            return digest, "", ""
        return digest, document_text(data, path.name, path.suffix.lower()), ""
    except ParameterError as error:
        return "", "", str(error)


def _bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:  # what is binary says so early
            head = file.read(8192)
            if b"\0" in head and head[:5] != b"%PDF-":
                raise ParameterError(f"{path.name} is a binary file")
        return files.read_bounded(path, MAX_BYTES)
    except files.UnreadableError as error:
        raise ParameterError(f"{path.name} {error}") from None
    except OSError as error:
        raise ParameterError(f"{path.name}: {error.strerror or error}") from None
