"""A recipe: the sources, the steps and their order, as one TOML file, read strictly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from gemcut.data.catalogue import READERS, STEPS, load
from gemcut.data.own_code import load_function
from gemcut.data.packages import Package
from gemcut.data.readers.base import Reader
from gemcut.data.readers.function import FunctionReader
from gemcut.data.steps import BaseStep, FunctionFilter, FunctionStep
from gemcut.data.tokens.mixture import Mixture
from gemcut.data.tokens.pack import TokenSpec
from gemcut.errors import DataError, ParameterError, RecipeError
from gemcut.files import shown
from gemcut.settings import parse_toml, read_text, suggestion

T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


@dataclass(frozen=True)
class SourceSpec:
    """One source: where its files are and how they are read. ``reason``, for the report, says why so.

    Of a ``package`` the ``paths`` are the ``patterns`` below its folder.
    """

    name: str
    reader: Reader
    reader_name: str
    paths: tuple[str, ...]
    licence: str = ""
    reason: str = ""
    package: Package | None = None
    patterns: tuple[str, ...] = ()

    def check(self, recipe: Path) -> None:
        """Raises DataError where the source is of a package that is not here, or not with all that it names."""
        if self.package is None:
            return
        record = self.package.record()
        if record is None or not set(self.patterns) <= set(record["patterns"]):
            raise DataError(f"source {self.name}: {self.package} is not here; run: gemcut data fetch {recipe}")


@dataclass(frozen=True)
class StepSpec:
    """One step, and the sources whose documents it sees (empty: all). ``reason`` is for the report.

    ``kind`` is the name of a built-in step, "" for a user's own.
    """

    name: str
    step: BaseStep
    sources: frozenset[str] = frozenset()
    reason: str = ""
    kind: str = ""

    def sees(self, source: str) -> bool:
        return not self.sources or source in self.sources


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. ``digest`` is the SHA-256 of everything in it that decides the output."""

    path: Path
    name: str
    sources: tuple[SourceSpec, ...]
    steps: tuple[StepSpec, ...]
    seed: int
    part_mb: float
    keep_rejects: bool
    tokens: TokenSpec | None
    mixture: Mixture
    digest: str
    data: Mapping[str, Any] = field(repr=False)

    def source(self, name: str) -> SourceSpec:
        return next(source for source in self.sources if source.name == name)


def read_recipe(path: Path) -> Recipe:
    """The recipe at ``path``, every key checked and every reader and step made.

    Raises:
        RecipeError: it is missing, no TOML, or asks for what there is not; the message names file and key.
        ParameterError: a step's own file is missing or bad.
    """
    try:
        text = read_text(path)
        if text is None:
            raise RecipeError(f"there is no recipe at {path}; expected a TOML file (docs/data.md has one)")
        data = parse_toml(text, path)
    except ParameterError as error:
        raise RecipeError(str(error)) from None
    return _Builder(path, data).recipe()


class _Builder:
    """Turns the tables of one recipe into objects; every error names the file and the table."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self._path, self._data = path, data
        self._modules: dict[Path, types.ModuleType] = {}
        self._digest = hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode())

    def recipe(self) -> Recipe:
        data = dict(self._data)
        sources = self._tables(data, "source")
        steps = self._tables(data, "step")
        name = self._take(data, "name", str, "", self._path.stem)
        seed = self._take(data, "seed", int, "", 0)
        part_mb = float(self._take(data, "part_mb", float, "", 32.0))
        keep_rejects = self._take(data, "keep_rejects", bool, "", True)
        tokens = self._table(data, "tokens", TokenSpec)
        mixture = self._table(data, "mixture", Mixture) or Mixture()
        known = ("name", "seed", "part_mb", "keep_rejects", "source", "step", "tokens", "mixture")
        self._nothing_left(data, "", known)
        if not _NAME.fullmatch(name):
            raise self._error("", f"name is {shown(name)}; expected letters, digits, dots, dashes and underscores")
        if not 0 < part_mb <= 4096:
            raise self._error("", f"part_mb is {part_mb:g}; expected more than 0 and at most 4096")
        if not sources:
            raise self._error("", "names no source; expected at least one [[source]] with name, reader and paths")
        made = tuple(self._source(table, i) for i, table in enumerate(sources))
        names = [source.name for source in made]
        for twice in names:
            if names.count(twice) > 1:
                raise self._error("", f"has two sources of the name {twice}; give each its own")
        chain = self._number(tuple(self._step(table, i, names) for i, table in enumerate(steps)))
        for spec in chain:
            for file in spec.step.files():
                self._digest.update(self._content(file, f"step {spec.name}"))
        if tokens is not None and tokens.tokenizer:
            self._digest.update(self._content(tokens.tokenizer, "[tokens]"))
        for table in ("weights", "epochs", "budgets"):
            for source in getattr(mixture, table):
                if source not in names:
                    raise self._error("[mixture]", f"{table} names {shown(source)}; {suggestion(source, names)}")
        digest = self._digest.hexdigest()
        return Recipe(self._path, name, made, chain, seed, part_mb, keep_rejects, tokens, mixture, digest, self._data)

    @staticmethod
    def _number(steps: tuple[StepSpec, ...]) -> tuple[StepSpec, ...]:
        """The same step used twice gets another name the second time: everything is counted by name."""
        seen: dict[str, int] = {}
        out = []
        for spec in steps:
            seen[spec.name] = seen.get(spec.name, 0) + 1
            count = seen[spec.name]
            out.append(spec if count == 1 else dataclasses.replace(spec, name=f"{spec.name}-{count}"))
        return tuple(out)

    def _source(self, table: dict[str, Any], index: int) -> SourceSpec:
        where = f"[[source]] {index + 1}"
        name = self._take(table, "name", str, where)
        where = f"source {name}"
        if not _NAME.fullmatch(name):
            raise self._error(where, "the name must be letters, digits, dots, dashes and underscores, 64 at most")
        reader_name = self._take(table, "reader", str, where)
        paths = tuple(self._list(table, "paths", where))
        if not paths or not all(paths):
            raise self._error(where, 'paths is empty; expected a list such as ["texts/*.jsonl.gz"]')
        licence = self._take(table, "licence", str, where, "")
        reason = self._take(table, "reason", str, where, "")
        package = self._package(table, where, paths)
        taken = ("name", "reader", "paths", "licence", "reason", "package")
        if reader_name.endswith(".py") or ".py:" in reader_name:
            self._nothing_left(table, where, taken)
            function, short = self._code("reader", reader_name, where, "(data, name)")
            reader: Reader = FunctionReader(function, short)
        elif reader_name in READERS:
            reader = cast(Reader, self._make(load(READERS[reader_name]), table, where, taken))
        else:
            raise self._error(where, f"unknown reader {shown(reader_name)}; {suggestion(reader_name, READERS)}")
        if package is not None:
            return SourceSpec(
                name, reader, reader_name, tuple(str(package.files / p) for p in paths), licence, reason, package, paths
            )
        resolved = tuple(p if "://" in p else str(self._path.parent / Path(p).expanduser()) for p in paths)
        return SourceSpec(name, reader, reader_name, resolved, licence, reason)

    def _package(self, table: dict[str, Any], where: str, paths: Sequence[str]) -> Package | None:
        text = self._take(table, "package", str, where, "")
        if not text:
            return None
        for path in paths:
            if "://" in path or path.startswith(("/", "~")) or ".." in path.split("/"):
                raise self._error(where, f"paths names {shown(path)}; with a package they are below its folder")
        try:
            return Package.parse(text)
        except ParameterError as error:
            raise self._error(where, str(error)) from None

    def _step(self, table: dict[str, Any], index: int, sources: Sequence[str]) -> StepSpec:
        where = f"[[step]] {index + 1}"
        ways = [key for key in ("use", "filter", "function") if key in table]
        if len(ways) != 1:
            raise self._error(
                where, 'expected exactly one of use = "name", filter = "file.py:name", function = "file.py:name"'
            )
        way = ways[0]
        value = self._take(table, way, str, where)
        only = self._list(table, "sources", where) if "sources" in table else []
        for source in only:
            if source not in sources:
                raise self._error(f"step {value}", f"sources names {shown(source)}; {suggestion(source, sources)}")
        reason = self._take(table, "reason", str, where, "")
        if way != "use":
            self._nothing_left(table, f"step {value}", (way, "sources", "reason"))
            return StepSpec(value.rpartition(":")[2], self._function(way, value, where), frozenset(only), reason)
        if value not in STEPS:
            raise self._error(where, f"unknown step {shown(value)}; {suggestion(value, STEPS)}")
        step = cast(BaseStep, self._make(load(STEPS[value]), table, f"step {value}", ("use", "sources", "reason")))
        return StepSpec(value, step, frozenset(only), reason, value)

    def _function(self, way: str, value: str, where: str) -> BaseStep:
        """The user's step ``file.py:name``."""
        arguments = "(document)" if way == "filter" else "(documents, rank, world_size)"
        function, name = self._code(way, value, where, arguments)
        return FunctionFilter(function, name) if way == "filter" else FunctionStep(function, name)

    def _code(self, way: str, value: str, where: str, arguments: str) -> tuple[Callable[..., Any], str]:
        """The user's function ``file.py:name`` and its name; it can be called with ``arguments``."""
        file, _, name = value.rpartition(":")
        path = self._path.parent / Path(file).expanduser()
        if not file.endswith(".py") or not name.isidentifier():
            raise self._error(where, f'{way} is {shown(value)}; expected "file.py:name"')
        self._digest.update(self._content(str(path), where))
        try:
            return load_function(path, name, arguments, self._modules), name
        except ParameterError as error:
            raise self._error(where, str(error)) from None

    def _make(self, kind: type[Any], table: dict[str, Any], where: str, taken: tuple[str, ...]) -> object:
        """An object of the dataclass ``kind`` from what is left of ``table``."""
        hints = typing.get_type_hints(kind)
        known = [f for f in dataclasses.fields(kind) if f.init]
        values: dict[str, Any] = {}
        for f in known:
            if f.name in table:
                values[f.name] = self._typed(table.pop(f.name), hints[f.name], f.name, where)
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise self._error(where, f"needs the key {f.name}")
            if f.name in values and f.metadata.get("path"):
                values[f.name] = self._located(values[f.name])
        self._nothing_left(table, where, (*taken, *(f.name for f in known)))
        try:
            return kind(**values)
        except ParameterError as error:
            raise self._error(where, str(error)) from None

    def _located(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._located(each) for each in value)
        return value if "://" in value else str(self._path.parent / Path(value).expanduser())

    def _typed(self, value: Any, hint: Any, key: str, where: str) -> Any:
        """``value`` if it is of the type that the field names."""
        origin = typing.get_origin(hint)
        if origin in (typing.Union, types.UnionType):
            hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
            origin = typing.get_origin(hint)
        if origin is typing.Literal:
            choices = typing.get_args(hint)
            if value not in choices:
                raise self._error(where, f"{key} is {shown(value)}; expected one of {', '.join(map(str, choices))}")
            return value
        if origin is tuple or hint is tuple:
            inner = (typing.get_args(hint) or (str,))[0]
            if not isinstance(value, list) or not all(self._is(each, inner) for each in value):
                raise self._error(where, f"{key} is {shown(value)}; expected a list, each of it {_WORDS[inner]}")
            return tuple(value)
        if origin is dict:
            inner = typing.get_args(hint)[1]
            if not isinstance(value, dict) or not all(self._is(each, inner) for each in value.values()):
                raise self._error(where, f"{key} is {shown(value)}; expected a table, each value {_WORDS[inner]}")
            return {name: inner(each) for name, each in value.items()}
        if not self._is(value, hint):
            raise self._error(where, f"{key} is {shown(value)}; expected {_WORDS[hint]}")
        return hint(value)

    @staticmethod
    def _is(value: Any, kind: type[Any]) -> bool:
        if kind is not bool and isinstance(value, bool):
            return False
        if kind is float:
            return isinstance(value, (int, float)) and value == value and abs(value) < float("inf")
        return isinstance(value, kind) and not (kind is str and "\x00" in value)

    def _table(self, data: dict[str, Any], key: str, kind: type[T]) -> T | None:
        """An object of the dataclass ``kind`` from the table [key], None where there is none."""
        if key not in data:
            return None
        table = data.pop(key)
        if not isinstance(table, dict):
            raise self._error("", f"{key} is {shown(table)}; write [{key}] above its keys")
        return cast(T, self._make(kind, dict(table), f"[{key}]", ()))

    def _tables(self, data: dict[str, Any], key: str) -> list[dict[str, Any]]:
        value = data.pop(key, [])
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self._error("", f"{key} is {shown(value)}; write [[{key}]] above its keys")
        return [dict(each) for each in value]

    def _take(self, table: dict[str, Any], key: str, kind: type[Any], where: str, default: Any = None) -> Any:
        if key not in table:
            if default is None:
                raise self._error(where, f"needs the key {key}")
            return default
        return self._typed(table.pop(key), kind, key, where)

    def _list(self, table: dict[str, Any], key: str, where: str) -> list[str]:
        if key not in table:
            raise self._error(where, f"needs the key {key}")
        return list(self._typed(table.pop(key), tuple[str, ...], key, where))

    def _nothing_left(self, table: dict[str, Any], where: str, known: Sequence[str]) -> None:
        for key in table:
            if key not in known or where:
                raise self._error(where, f"unknown key {shown(key)}; {suggestion(key, known)}")

    def _content(self, file: str, where: str) -> bytes:
        """The SHA-256 of a file that the recipe names."""
        try:
            with open(file, "rb") as opened:
                return hashlib.file_digest(opened, "sha256").digest()
        except OSError as error:
            raise self._error(where, f"cannot read {file}: {error.strerror or error}") from None

    def _error(self, where: str, what: str) -> RecipeError:
        return RecipeError(f"{self._path}: {where + ': ' if where else ''}{what}")
