"""Checkpoints on the Hugging Face hub, through huggingface_hub: its cache, its token, its downloads."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gemcut.checkpoint import foreign
from gemcut.errors import CheckpointError, CheckpointNotFoundError, GatedRepositoryError

if TYPE_CHECKING:
    from gemcut.progress import Report

_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "model.safetensors.index.json",
    "adapter_config.json",
]


def download(
    repo: str,
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    progress: Report | None,
    weights: bool,
) -> tuple[Path, str]:
    """Bring the needed files of a repository into the shared cache; return (snapshot folder, commit).

    The revision is resolved to a commit once, with the small files; the weights are fetched from that commit, so a
    push in between cannot mix two versions. Files already cached are not fetched again, and huggingface_hub resumes a
    file whose connection breaks. Raises CheckpointNotFoundError, GatedRepositoryError or CheckpointError.
    """
    from gemcut.checkpoint.safetensors_header import INDEX, weight_files

    hub = _Repository(repo, revision, token, cache_dir, local_files_only, progress)
    folder = hub.fetch(_SMALL_FILES, revision, folders=True)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()  # nothing matched: no folder
    if foreign.is_adapter(there) and ("config.json" not in there or (weights and not _whole_weights(folder, hub))):
        raise CheckpointError(f"{repo} on the hub is no model but a {foreign.adapter(folder)}")
    if not (folder / "config.json").is_file():
        raise CheckpointNotFoundError(hub.absent("config.json"))
    commit = folder.name
    if weights:
        index = folder / INDEX
        wanted = list(weight_files(index)) if index.is_file() else ["*.safetensors"]
        folder = hub.fetch(wanted, commit)
        if not all((folder / file).is_file() for file in wanted) if index.is_file() else not _any_weights(folder):
            raise CheckpointNotFoundError(hub.absent("all of its safetensors files"))
    return folder, commit


def download_gguf(
    repo: str,
    wanted: str,
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    progress: Report | None,
    headers_to: Path | None = None,
) -> tuple[Path, str]:
    """Bring one GGUF file of a repository, all parts of a split one, into the shared cache.

    ``wanted``: a file's name or a quantization such as Q4_K_M. With ``headers_to``, a folder, only the headers of files
    that the cache lacks are fetched, and put there. Returns (the file or first part, commit); raises as ``download``.
    """
    from gemcut.checkpoint.hub_gguf import choose

    hub = _Repository(repo, revision, token, cache_dir, local_files_only, progress)
    if headers_to is not None and not hub.offline:
        commit, there = hub.listing()
        files = choose(repo, there, wanted)
        if not hub.has(files, commit):
            hub.fetch_headers(files, commit, headers_to)
            return headers_to / files[0], commit
    files = choose(repo, hub.files(), wanted)
    folder = hub.fetch(files, revision, folders=True)
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise CheckpointNotFoundError(hub.absent(absent[0]))
    return folder / files[0], folder.name


class _Repository:
    """One repository and how to reach it."""

    def __init__(
        self,
        repo: str,
        revision: str | None,
        token: str | bool | None,
        cache_dir: str | Path | None,
        local_files_only: bool,
        progress: Report | None,
    ) -> None:
        # huggingface_hub reads the variable on import. We ask the hub for files, and tell it nothing else.
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from huggingface_hub import constants

        self.repo, self.revision, self.token, self.cache_dir, self.progress = repo, revision, token, cache_dir, progress
        self.local_files_only = local_files_only
        self.offline = local_files_only or constants.HF_HUB_OFFLINE

    def fetch(self, patterns: list[str], at: str | None, *, folders: bool = False) -> Path:
        """The snapshot folder once the files are in it; ``folders``: patterns may mean files in folders."""
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(
                    self.repo,
                    revision=at,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.offline,
                    allow_patterns=patterns,
                    ignore_patterns=None if folders else ["*/*"],  # a pattern's * also matches folders
                    tqdm_class=_bar(self.progress),
                    library_name="gemcut",
                )
            )
        except Exception as error:
            _explain(error, self.repo, self.revision, self.local_files_only, self.cache_dir)

    def files(self) -> list[str]:
        """The names of the repository's files; offline, of those in the cache."""
        if self.offline:
            folder = self.fetch([], self.revision)
            return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return self.listing()[1]

    def listing(self) -> tuple[str, list[str]]:
        """(the commit that the revision is, the names of its files), as the hub says."""
        from huggingface_hub import HfApi

        try:
            api = HfApi(token=self.token, library_name="gemcut")
            found = api.model_info(self.repo, revision=self.revision)
            return str(found.sha), [file.rfilename for file in found.siblings or ()]
        except Exception as error:
            _explain(error, self.repo, self.revision, self.local_files_only, self.cache_dir)

    def has(self, files: list[str], commit: str) -> bool:
        """Whether the cache holds all of these files."""
        from huggingface_hub import try_to_load_from_cache

        found = [try_to_load_from_cache(self.repo, file, self.cache_dir, revision=commit) for file in files]
        return all(isinstance(path, str) for path in found)

    def fetch_headers(self, files: list[str], commit: str, to: Path) -> None:
        """The headers of GGUF files into the folder ``to``; see `gemcut.checkpoint.hub_header`."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        from gemcut.checkpoint.hub_header import fetch_headers

        headers = build_hf_headers(token=self.token, library_name="gemcut")
        try:
            fetch_headers(lambda file: hf_hub_url(self.repo, file, revision=commit), headers, files, to)
        except CheckpointError:
            raise
        except Exception as error:
            _explain(error, self.repo, self.revision, self.local_files_only, self.cache_dir)

    def absent(self, what: str) -> str:
        """Why the repository cannot be read: ``what`` is not there; or what else it holds."""
        from gemcut.checkpoint.hub_gguf import offer

        with contextlib.suppress(CheckpointError):
            if found := offer(self.repo, self.files()):
                return found
        return _absent(self.repo, what, self.local_files_only)


def _whole_weights(folder: Path, hub: _Repository) -> bool:
    """Whether a repository with an adapter's config holds whole weights beside it."""
    return (folder / "model.safetensors.index.json").is_file() or _any_weights(
        hub.fetch(["model.safetensors"], folder.name)
    )


def _any_weights(folder: Path) -> bool:
    return any(not path.name.startswith("adapter") for path in folder.glob("*.safetensors"))


def _absent(repo: str, what: str, local_files_only: bool) -> str:
    from huggingface_hub import constants

    if local_files_only or constants.HF_HUB_OFFLINE:
        return f"{repo}: the cache does not hold {what}; go online once to download (unset HF_HUB_OFFLINE)"
    return f"{repo} on the hub does not hold {what}: not a checkpoint gemcut can read"


def _explain(
    error: Exception, repo: str, revision: str | None, local_files_only: bool, cache_dir: str | Path | None
) -> NoReturn:
    """Raise what a person can act on in place of huggingface_hub's error."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.RevisionNotFoundError):
        raise CheckpointNotFoundError(f"{repo} has no revision {revision!r}; see {page}/tree/main for its branches")
    if isinstance(cause, errors.GatedRepoError) or (
        status in (401, 403) and not isinstance(cause, errors.RepositoryNotFoundError)
    ):
        if status == 403:
            raise GatedRepositoryError(
                f"{repo} is gated and this token's account has no access: accept the licence on {page} with that "
                "account, then try again"
            )
        raise GatedRepositoryError(
            f"{repo} is gated: accept the licence on {page}, then run `hf auth login` or set HF_TOKEN"
        )
    if isinstance(cause, errors.RepositoryNotFoundError):
        raise CheckpointNotFoundError(
            f"the hub has no repository {repo} (if it is private: run `hf auth login` or set HF_TOKEN)"
        )
    if isinstance(error, errors.HFValidationError):
        raise CheckpointNotFoundError(f"{repo!r} is not a hub id; expected owner/name, such as google/gemma-2-2b-it")
    if isinstance(error, errors.LocalEntryNotFoundError) or isinstance(cause, ConnectionError):
        at = f" at revision {revision!r}" if revision else ""
        if local_files_only or constants.HF_HUB_OFFLINE:
            raise CheckpointNotFoundError(
                f"{repo}{at} is not complete in the cache and going online is switched off; unset HF_HUB_OFFLINE (or "
                "local_files_only) to download it"
            )
        raise CheckpointError(f"cannot reach {constants.ENDPOINT} and {repo}{at} is not in the cache: {_line(cause)}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = cache_dir or constants.HF_HUB_CACHE
        raise CheckpointError(
            f"no space left in {where} for {repo}; free some or set HF_HOME to another disk (finished files are kept)"
        )
    raise CheckpointError(f"downloading {repo} failed: {_line(error)}; try again: finished files are kept")


def _line(error: object) -> str:
    """The first line of a message, or the class where there is no message."""
    text = " ".join(str(error).split())
    return text[:200] if text else type(error).__name__


def _bar(progress: Report | None) -> Any:
    """A silent stand-in for tqdm that passes bytes on to ``progress``."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Silent(tqdm):  # type: ignore[misc]
        most = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            # The hub counts received and written bytes in two bars, the totals growing as files start.
            if progress and self.counts_bytes and self.total and self.n > Silent.most:
                Silent.most = self.n
                progress(int(min(self.n, self.total)), int(self.total))
            return None

    return Silent
