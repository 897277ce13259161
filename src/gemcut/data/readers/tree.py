"""Source trees: each file of code a document, with its programming language and its own licence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from gemcut.data.document import Document
from gemcut.data.readers.base import File, Item, WholeFileReader, bad, checked

LANGUAGES: Mapping[str, str] = {
    ".py": "python", ".pyi": "python", ".c": "c", ".h": "c", ".cc": "c++", ".cpp": "c++", ".cxx": "c++",
    ".hpp": "c++", ".hh": "c++", ".rs": "rust", ".go": "go", ".java": "java", ".js": "javascript",
    ".mjs": "javascript", ".ts": "typescript", ".tsx": "typescript", ".rb": "ruby", ".pl": "perl", ".pm": "perl",
    ".sh": "shell", ".bash": "shell", ".lisp": "lisp", ".scm": "scheme", ".hs": "haskell", ".ml": "ocaml",
    ".lua": "lua", ".php": "php", ".swift": "swift", ".kt": "kotlin", ".scala": "scala", ".r": "r", ".jl": "julia",
    ".f": "fortran", ".f90": "fortran", ".sql": "sql", ".css": "css", ".pyx": "cython", ".pxd": "cython",
    ".cu": "cuda", ".m": "objective-c", ".cs": "c#", ".tcl": "tcl", ".vim": "vim", ".el": "lisp", ".zig": "zig",
}  # fmt: skip
_SHEBANG = {"python": "python", "bash": "shell", "sh": "shell", "perl": "perl", "ruby": "ruby", "node": "javascript"}
#: What only C++ has, in a header that may be C.
_CPP = re.compile(r"^\s*(?:class|namespace|template\s*<|using\s+\w+\s*=|public:|private:)", re.MULTILINE)
#: Licence texts by words of theirs; where two begin at the same place the first in this list counts.
TEXTS: tuple[tuple[str, str], ...] = (
    ("AGPL-3.0", r"GNU AFFERO GENERAL PUBLIC LICENSE"),
    ("LGPL", r"GNU (?:LESSER|LIBRARY) GENERAL PUBLIC LICENSE"),
    ("GPL", r"GNU GENERAL PUBLIC LICENSE"),
    ("MPL-2.0", r"Mozilla Public License"),
    ("EPL", r"Eclipse Public License"),
    ("Apache-2.0", r"Apache License,?\s+Version 2\.0"),
    ("PSF-2.0", r"PYTHON SOFTWARE FOUNDATION LICENSE|Licensed to (?:the )?PSF"),
    ("BSD-3-Clause", r"Redistribution and use in source and binary forms.*(?:Neither the name|endorse or promote)"),
    ("BSD-2-Clause", r"Redistribution and use in source and binary forms"),
    ("MIT", r"Permission is hereby granted, free of charge, to any person obtaining a copy"),
    ("ISC", r"Permission to use, copy, modify, and/or distribute this software for any purpose"),
    ("Unlicense", r"This is free and unencumbered software released into the public domain"),
    ("blessing", r"The author disclaims copyright to this source code"),
)
_PATTERNS = tuple((name, re.compile(text, re.DOTALL | re.IGNORECASE)) for name, text in TEXTS)
_SPDX = re.compile(r"SPDX-License-Identifier:\s*([A-Za-z0-9.+\-() ]+)")
_FILES = re.compile(r"(?i)^(?:licen[cs]e|copying|copyright)(?:[.\-_].*)?$")
HEADER = 4000  # characters of a file in which its own licence stands


@dataclass(frozen=True)
class TreeReader(WholeFileReader):
    """Files of code below a folder. ``languages`` (all): which of them; a file's own licence goes before its folder's,
    that of its folder before the source's. ``meta`` of a document holds ``path`` and ``code``, its language.
    """

    ENDINGS: ClassVar[tuple[str, ...]] = tuple(LANGUAGES)
    LIMIT: ClassVar[int] = 4 << 20

    languages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from gemcut.errors import ParameterError
        from gemcut.settings import suggestion

        known = sorted(set(LANGUAGES.values()))
        for name in self.languages:
            if name not in known:
                raise ParameterError(f"languages names {name!r}; {suggestion(name, known)}")

    def wants(self, name: str) -> bool:
        ending = os.path.splitext(name)[1].lower()
        if not ending:
            return not _FILES.match(name)  # a script, if its first line says so
        return ending in LANGUAGES and (not self.languages or self._fits(LANGUAGES[ending]))

    def _fits(self, language: str) -> bool:
        # A header is called C before it is read; what it is shows later.
        return language in self.languages or (language == "c" and "c++" in self.languages)

    def items(self, data: bytes, file: File, source: str, licence: str) -> Iterator[Item]:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            yield bad(source, file.name, "not UTF-8")
            return
        code = code_language(file.name, text)
        if code is None:
            yield bad(source, file.name, "no known programming language")
        elif self.languages and code not in self.languages:
            yield bad(source, file.name, "another programming language")
        else:
            own = licence_of(text[:HEADER]) or (licence_of_folder(file) if "://" not in file.path else "") or licence
            yield checked(Document(file.name, source, text, licence=own, meta={"path": file.name, "code": code}))


def code_language(name: str, text: str) -> str | None:
    """The programming language, by ending, first line and content; None where there is none."""
    ending = os.path.splitext(name)[1].lower()
    if not ending:
        shebang = re.match(r"#!\s*\S*?(?:env\s+)?([a-z]+)[\d.]*\s*(?:\n|\s)", text[:200])
        return _SHEBANG.get(shebang[1].rpartition("/")[2]) if shebang else None
    if ending == ".h" and _CPP.search(text):
        return "c++"
    return LANGUAGES.get(ending)


def licence_of(text: str) -> str:
    """The SPDX identifier of the licence that a text states or is; "" where none is known.

    Of several the one that stands first counts: what a package bundles is listed behind its own.
    """
    spdx = _SPDX.search(text)
    if spdx is not None:
        return spdx[1].strip()
    found = [(match.start(), i, name) for i, (name, p) in enumerate(_PATTERNS) if (match := p.search(text))]
    return min(found)[2] if found else ""


def licence_of_folder(file: File) -> str:
    """The licence of the nearest folder above a file, within its source, that has a licence file."""
    depth = file.name.count("/") + 1
    folder = Path(file.path).parent
    for _ in range(depth):
        if found := _licence_file(str(folder)):
            return found
        folder = folder.parent
    return ""


@cache
def _licence_file(folder: str) -> str:
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if _FILES.match(name) and os.path.isfile(path):
            with open(path, "rb") as opened:
                if found := licence_of(opened.read(64 << 10).decode("utf-8", "replace")):
                    return found
    return ""
