"""GGUF files in hub repositories: which there are, and the one that ``repo:file.gguf`` or ``repo:Q4_K_M`` means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from gemcut.checkpoint.gguf_parts import PART_NAME
from gemcut.errors import CheckpointNotFoundError

_SHOWN = 12
# Files that lie beside models: image encoders, importance matrices, draft heads.
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_QUANTIZATION = re.compile(r"(?:^|[-._])((?:i?q\d\w*|tq\d\w*|bf16|f16|f32|mxfp4\w*))$", re.IGNORECASE)


def models(files: Sequence[str]) -> dict[str, list[str]]:
    """The models among a repository's files: the file to name (a split one's first part) and all its parts."""
    found: dict[str, list[str]] = {}
    for file in sorted(files):
        path = PurePosixPath(file)
        if path.suffix != ".gguf" or _NO_MODEL.search(path.name):
            continue
        part = PART_NAME.fullmatch(path.name)
        first = str(path.with_name(f"{part[1]}-00001-of-{part[3]}.gguf")) if part else file
        found.setdefault(first, []).append(file)
    return found


def choose(repo: str, files: Sequence[str], wanted: str) -> list[str]:
    """The files ``wanted`` names: a file (any part of a split one), or a quantization such as Q4_K_M.

    Raises CheckpointNotFoundError, with what there is, where nothing or more than one thing is meant.
    """
    there = models(files)
    for parts in there.values():
        if wanted in parts:
            return parts
    if wanted in files:  # an mmproj: opened, it says what it is
        return [wanted]
    same = [first for first in there if quantization(first).lower() == wanted.lower()]
    if len(same) == 1:
        return there[same[0]]
    if same:
        raise CheckpointNotFoundError(f"{repo} holds {len(same)} files in {wanted}; choose one: {_list(repo, same)}")
    if not there:
        raise CheckpointNotFoundError(f"{repo} on the hub holds no GGUF file; give the repository without :{wanted}")
    raise CheckpointNotFoundError(f"{repo} holds no {wanted}; choose one: {_list(repo, list(there))}")


def offer(repo: str, files: Sequence[str]) -> str | None:
    """What a person can choose in a repository of GGUF files; None where it has none."""
    there = list(models(files))
    if not there:
        return None
    what = "one GGUF file" if len(there) == 1 else f"{len(there)} GGUF files"
    return f"{repo} holds {what} and no safetensors checkpoint; choose one: {_list(repo, there)}"


def quantization(file: str) -> str:
    """Q4_K_M of …-Q4_K_M.gguf and of a split …-Q4_K_M-00001-of-00003.gguf; "" where the name does not say it."""
    name = PurePosixPath(file).name
    part = PART_NAME.fullmatch(name)
    match = _QUANTIZATION.search(part[1] if part else name.removesuffix(".gguf"))
    return match[1] if match else ""


def _list(repo: str, files: list[str]) -> str:
    """Names to type: by quantization where that is one file's own, by file otherwise."""
    tags = [quantization(file).lower() for file in files]
    names = [
        f"{repo}:{quantization(file) if tag and tags.count(tag) == 1 else file}"
        for file, tag in zip(files, tags, strict=True)
    ]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
