"""Where a checkpoint is: from what a person types to files that exist."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from gemcut.checkpoint import foreign
from gemcut.checkpoint.licence import GEMMA_NOTICE
from gemcut.checkpoint.source import Source
from gemcut.errors import CheckpointError, CheckpointNotFoundError, ConfigError, ParameterError
from gemcut.paths import expand
from gemcut.progress import Report

_ALIAS = re.compile(r"(?:gemma-2-)?(2b|9b|27b)(-it)?", re.IGNORECASE)
_LFS_POINTER = b"version https://git-lfs"
#: A GGUF file of a repository: owner/name:file.gguf, or a quantization such as owner/name:Q4_K_M.
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):([\w./-]+)", re.ASCII)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: Report | None = None,
    weights: bool = True,
) -> Source:
    """Find a checkpoint: a folder, a ``.gguf`` file, a bundled or short name, or a hub id, in this order.

    ``owner/name:file.gguf`` and ``owner/name:Q4_K_M`` are one GGUF file of a hub repository.

    ``revision`` (branch, tag or commit), ``token``, ``cache_dir`` and ``local_files_only`` are for the hub; the
    environment variables of huggingface_hub (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, …) work as everywhere.
    ``weights=False`` fetches configuration and tokenizer only; of a GGUF file on the hub its header, by range requests.
    Raises CheckpointNotFoundError, GatedRepositoryError, or CheckpointError when a download fails.
    """
    text = str(checked_name(name))
    path = expand(text)
    if text.strip() and _exists(path):  # "" would be the current folder
        if revision is not None:
            raise CheckpointError(f"{path} is on this machine; revision={revision!r} can be chosen only on the hub")
        return _local(path, text)
    from gemcut.checkpoint import bundled

    if text in bundled.NAMES:
        if revision is not None:
            raise CheckpointError(
                f"{text} comes with a Python package; revision={revision!r} can be chosen only on the hub"
            )
        file = bundled.gguf_file(cache_dir)
        return Source("gguf", file, text, licence_notice=bundled.licence_notice())
    if (file_of := _HUB_FILE.fullmatch(text)) and not text.startswith("."):
        from gemcut.checkpoint import hub

        header_folder = None if weights else tempfile.TemporaryDirectory(prefix="gemcut-header-")
        found, commit = hub.download_gguf(
            file_of[1],
            file_of[2],
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            progress=progress,
            headers_to=None if header_folder is None else Path(header_folder.name),
        )
        notice = GEMMA_NOTICE if "gemma" in text.lower() else None
        if header_folder is not None and not found.is_relative_to(header_folder.name):  # the cache has it whole
            header_folder.cleanup()
            header_folder = None
        return Source("gguf", found, text, revision=commit, licence_notice=notice, header_folder=header_folder)
    alias = _ALIAS.fullmatch(text)
    if alias:
        repo = f"google/gemma-2-{alias.group(1).lower()}{'-it' if alias.group(2) else ''}"
    elif _HUB_ID.fullmatch(text) and not text.endswith(".gguf") and not text.startswith("."):
        repo = text
    else:
        raise CheckpointNotFoundError(_not_found(text))
    from gemcut.checkpoint import hub

    folder, commit = hub.download(
        repo,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        progress=progress,
        weights=weights,
    )
    notice = GEMMA_NOTICE if repo.lower().startswith("google/gemma") else None
    return Source("folder", folder, repo, revision=commit, licence_notice=notice)


def checked_name(name: str | Path) -> str | Path:
    """The name of a checkpoint. Raises ParameterError where it is neither a text nor a path."""
    if not isinstance(name, (str, os.PathLike)):
        raise ParameterError(f"the name of a checkpoint is of type {type(name).__name__}; expected a text or a path")
    return name


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long or with a NUL is no file
        return False


def _local(path: Path, name: str) -> Source:
    _refuse_pointers(path)
    if path.is_file():
        if (what := foreign.file_hint(path)) is not None:
            raise CheckpointError(what)
        return Source("gguf", path, name)
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a folder nor a regular file; give a checkpoint folder or .gguf file")
    if foreign.is_adapter(entry.name for entry in _entries(path)):
        raise CheckpointError(f"{path} is no model but a {foreign.adapter(path)}")
    if not (path / "config.json").is_file():
        if any(entry.name == "config.json" for entry in _entries(path)):
            raise ConfigError(f"{path / 'config.json'} is no regular file; expected a checkpoint's config.json")
        raise ConfigError(f"{path} has no config.json: not a checkpoint folder{foreign.hint(path)}")
    return Source("folder", path, name)


def _refuse_pointers(path: Path) -> None:
    """A repository cloned without git-lfs holds small text files in place of the large ones: say so by name."""
    for file in sorted(_entries(path)) if path.is_dir() else [path]:
        if not file.is_file() or file.suffix not in (".safetensors", ".json", ".gguf"):
            continue
        try:
            with file.open("rb") as opened:
                start = opened.read(len(_LFS_POINTER))
        except OSError:
            continue  # whoever needs the file says why it cannot be read
        if start == _LFS_POINTER:
            raise CheckpointError(
                f"{file} is a git-lfs pointer, not the file itself: the repository was cloned without git-lfs; "
                "run `git lfs install` and `git lfs pull` there, or give the hub id instead of the folder"
            )


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror or error}") from None


def _not_found(text: str) -> str:
    text = text if len(text) <= 300 else f"{text[:300]}…"
    if text.startswith((".", "/", "~")) or text.endswith(".gguf"):
        return f"{text} does not exist: expected a checkpoint folder or a .gguf file"
    return (
        f"no checkpoint called {text!r}: not a folder or .gguf file here, not gemma-3-270m, not a short name such as "
        "2b-it, 9b-it or 27b-it, and not a hub id such as google/gemma-2-27b-it (a GGUF file there: owner/name:Q4_K_M)"
    )
