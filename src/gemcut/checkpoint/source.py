"""Where a checkpoint is: from what a person types to files that exist, and what those files say."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemcut.checkpoint import foreign
from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError, CheckpointNotFoundError, ConfigError, ParameterError
from gemcut.files import UnreadableError, read_json
from gemcut.paths import expand

if TYPE_CHECKING:
    import torch

    from gemcut.checkpoint.gguf_reader import GgufFile
    from gemcut.checkpoint.gguf_weight import Dequantize
    from gemcut.checkpoint.safetensors_reader import SafetensorsFolder
    from gemcut.quantization.spec import Quantization
    from gemcut.quantization.weights import Incoming, Weight
    from gemcut.text.special import SpecialTokens
    from gemcut.text.tokenizer import Tokenizer

#: Called with (bytes done, bytes in all) while files are downloaded or read.
Progress = Callable[[int, int], None]

GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
_ALIAS = re.compile(r"(?:gemma-2-)?(2b|9b|27b)(-it)?", re.IGNORECASE)
_LFS_POINTER = b"version https://git-lfs"
#: A GGUF file of a repository: owner/name:file.gguf, or a quantization such as owner/name:Q4_K_M.
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):([\w./-]+)", re.ASCII)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A checkpoint that exists on this machine.

    ``name`` is what was asked for; ``revision`` the hub's commit, if it came from there. Of a GGUF file on the hub the
    header alone may be here: ``header_folder`` then holds ``path`` as long as the Source lives, with a hole where the
    weights would be.
    """

    kind: Literal["folder", "gguf"]
    path: Path
    name: str
    revision: str | None = None
    licence_notice: str | None = None
    header_folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False, compare=False)

    @property
    def has_weights(self) -> bool:
        """Whether the weights are here; a folder of the hub has them if it was asked for with them."""
        return self.header_folder is None

    def config(self) -> GemmaConfig:
        """The network's shape. Raises ConfigError when the checkpoint has none or is of another model."""
        return self._config

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or what a GGUF file's metadata says of it; empty where there is none."""
        if self.kind == "gguf":
            return self._gguf.generation_config()
        path = self.path / "generation_config.json"
        if not path.is_file():
            return {}
        try:
            data = read_json(path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
        except UnreadableError as error:
            raise CheckpointError(f"cannot read {path}: it {error}") from None
        if not isinstance(data, dict):
            raise CheckpointError(f"{path} holds {type(data).__name__}; expected a JSON object")
        return data

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises TokenizerError when it is missing or damaged."""
        from gemcut.text.tokenizer import Tokenizer

        if self.kind == "gguf":
            return Tokenizer.quick_from_gguf_vocab(**self._gguf.vocabulary())
        return Tokenizer.from_folder(self.path)

    def special_tokens(self) -> SpecialTokens | None:
        """What ends a text and how a dialogue is written, without building the tokenizer; None where only that can
        tell, or say what is wrong. Raises TokenizerError for damaged small files."""
        from gemcut.text.special import END_OF_TURN, START_OF_TURN, SpecialTokens

        if self.kind == "gguf":
            return SpecialTokens.make(*self._gguf.special_tokens((START_OF_TURN, END_OF_TURN)))
        return SpecialTokens.from_folder(self.path)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Our tensor names and shapes, from headers alone."""
        return self._reader.shapes

    def weight_files(self) -> list[Path]:
        """The files that hold the weights; all parts of a split GGUF."""
        return self._gguf.paths if self.kind == "gguf" else sorted(self.path.glob("*.safetensors"))

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the files; what ``tensors`` reports progress against."""
        return self._reader.nbytes

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """dtype of a folder's weights; None for a GGUF file, whose tensors are of many kinds."""
        return None if self.kind == "gguf" else self._folder.dtype

    @property
    def quantization(self) -> Quantization | None:
        """What a folder's weights are cut to, as its config.json says; None where they are whole.

        A GGUF file's weights are dequantized while they are read, so they count as whole.
        Raises CheckpointError for a format that gemcut does not read.
        """
        if self.kind == "gguf":
            return None
        from gemcut.checkpoint.bnb import stored_quantization

        return stored_quantization(self.path / "config.json")

    @property
    def expanded(self) -> dict[str, int]:
        """Number of tensors by GGML type of a GGUF file's quantized weights, which are dequantized while they are read;
        empty for every other checkpoint."""
        if self.kind != "gguf":
            return {}
        from gemcut.checkpoint.ggml_types import WHOLE

        return {name: count for name, count in self._gguf.quantization.items() if name not in WHOLE}

    def tensors(
        self,
        progress: Progress | None = None,
        *,
        dtype: torch.dtype | None = None,
        only: Collection[str] | None = None,
    ) -> Iterator[tuple[str, Weight]]:
        """Stream every tensor once, on the CPU: (our name, tensor). See gemcut.checkpoint.names for the names.

        Norms come as ``scale = 1 + w`` in fp32. A folder's weights come as stored; a GGUF file's are dequantized to
        ``dtype`` (None: fp32). ``only`` names the tensors wanted (None: all). A tensor may be backed by the file
        itself: copy it if it is to stay in memory.
        """
        self._require_weights()
        if self.kind == "gguf":
            return self._gguf.tensors(progress, dtype, only)
        return self._folder.tensors(progress, only)

    def incoming(
        self, *, dtype: torch.dtype | None = None, dequantize: Dequantize | None = None
    ) -> Iterator[tuple[str, Incoming]]:
        """As ``tensors``, for a loader: weights of a GGUF file come as StoredWeight, to be read into their places.

        ``dequantize`` does what the gguf library would do, sooner; see gemcut.checkpoint.gguf_weight.
        """
        self._require_weights()
        return self._gguf.weights(None, dtype, None, dequantize) if self.kind == "gguf" else self._folder.tensors()

    def _require_weights(self) -> None:
        if not self.has_weights:
            raise CheckpointError(f"of {self.name} the header alone was fetched; resolve it with its weights")

    @cached_property
    def _config(self) -> GemmaConfig:
        return self._gguf.config if self.kind == "gguf" else GemmaConfig.from_file(self.path / "config.json")

    @property
    def _reader(self) -> GgufFile | SafetensorsFolder:
        return self._gguf if self.kind == "gguf" else self._folder

    @cached_property
    def _folder(self) -> SafetensorsFolder:
        from gemcut.checkpoint.safetensors_reader import SafetensorsFolder

        return SafetensorsFolder(self.path, self._config)

    @cached_property
    def _gguf(self) -> GgufFile:
        from gemcut.checkpoint.gguf_reader import GgufFile

        return GgufFile(self.path)


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
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
