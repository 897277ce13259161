"""The log of a run: one file of JSON lines with every prompt, answer and log-probability, and what they came from.

    {"run": …}                 once: model, quantization, device, seed, limit
    {"row": …, "recipe": …}    once a row: recipe hash, shots, counts, hashes of data files
    {"prefix": …, "text": …}   what several prompts begin with, before the first of them
    {"row": …, "id": …, "request": …, "target": …, "answer": …}
    {"row": …, "done": …}      seconds and tokens

Lines are only ever added; a last line without its end (a full disk, a killed process) counts as not written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from gemcut.errors import DataError
from gemcut.evaluation.requests import Answer, Choices, Generate, Letters, Message, Pair, Request, Rolling
from gemcut.evaluation.row import Item

FORMAT = 1
NAME = "log.jsonl"
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Choices, Letters, Generate, Pair, Rolling)}


@dataclass
class RowLog:
    """What a log says of one row. ``header`` is its first line; ``done`` is None while the row is not finished."""

    header: dict[str, Any]
    items: list[Item] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    done: dict[str, Any] | None = None
    figures: dict[str, Any] | None = None  # of a row of which no item may be kept


@dataclass
class RunLog:
    """A whole log."""

    folder: Path
    run: dict[str, Any]
    rows: dict[str, RowLog] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What tables call it: the model with its quantization."""
        model = self.run["model"]
        return " ".join(part for part in (str(model["name"]), str(model.get("quantization") or model["dtype"])) if part)


def read_log(folder: Path) -> RunLog:
    """The log in the folder of a run. Raises DataError where there is none or it is damaged."""
    path = folder / NAME if folder.is_dir() else folder
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{folder} holds no run of gemcut eval ({path.name}: {error.strerror})") from None
    whole = data[: data.rfind(b"\n") + 1]
    log: RunLog | None = None
    prefixes: dict[str, str] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            if log is None:
                if entry["run"]["format"] != FORMAT:
                    raise DataError(f"{path} is of format {entry['run']['format']}; this gemcut reads {FORMAT}")
                log = RunLog(path.parent, entry["run"])
            elif "prefix" in entry:
                prefixes[entry["prefix"]] = entry["text"]
            elif "recipe" in entry:
                log.rows.setdefault(entry["row"], RowLog(entry))
            elif "done" in entry:
                log.rows[entry["row"]].done = entry["done"]
            elif "figures" in entry:
                log.rows[entry["row"]].figures = entry["figures"]
            else:
                row = log.rows[entry["row"]]
                row.items.append(_item(entry, prefixes))
                row.answers.append(_answer(entry["answer"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}, line {number}, is damaged ({type(error).__name__}: {error})") from None
    if log is None:
        raise DataError(f"{path} is empty; expected the log of a run")
    return log


class LogWriter:
    """Adds lines to a log; a context manager. What a line could not be written of is cut off again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._prefixes: set[str] = set()
        self._file: io.FileIO | None = None

    def __enter__(self) -> LogWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer: what could not be written must not be tried again at the end.
        self._file = open(self.path, "ab", buffering=0)
        end = os.fstat(self._file.fileno()).st_size
        if end:
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < end:
                self._file.truncate(whole)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, entry: Mapping[str, Any]) -> None:
        """One line. Raises OSError with the file's name where it cannot be written (a full disk)."""
        assert self._file is not None
        line = json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"
        before, left = os.fstat(self._file.fileno()).st_size, memoryview(line)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            os.truncate(self.path, before)
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def add_answer(self, row: str, item: Item, answer: Answer) -> None:
        """An item with its answer."""
        request = _fields(item.request)
        if prefix := request.pop("prefix", ""):
            key = hashlib.sha256(prefix.encode("utf-8", "surrogatepass")).hexdigest()[:12]
            if key not in self._prefixes:
                self.add({"prefix": key, "text": prefix})
                self._prefixes.add(key)
            request["prefix"] = key
        entry = {"row": row, "id": item.id, "group": item.group, "target": item.target, "meta": dict(item.meta)}
        entry["request"] = {"kind": type(item.request).__name__, **request}
        self.add({**entry, "answer": _fields(answer)})


def _fields(value: Any) -> dict[str, Any]:
    """A dataclass's fields that are not empty or as they are by default."""
    found = {}
    for each in dataclasses.fields(value):
        own = getattr(value, each.name)
        if own != each.default and own not in ((), {}, ""):
            found[each.name] = own
    return found


def _item(entry: Mapping[str, Any], prefixes: Mapping[str, str]) -> Item:
    values = dict(entry["request"])
    kind = _KINDS[values.pop("kind")]
    if "prefix" in values:
        values["prefix"] = prefixes[values["prefix"]]
    if "dialogue" in values:
        values["dialogue"] = tuple(Message(*turn) for turn in values["dialogue"])
    request: Request = kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    return Item(
        id=entry["id"], request=request, target=entry["target"], group=entry["group"], meta=entry.get("meta", {})
    )


def _answer(values: Mapping[str, Any]) -> Answer:
    return Answer(**{name: tuple(value) for name, value in values.items()})
