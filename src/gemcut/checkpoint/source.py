"""A checkpoint that exists on this machine, and what its files say."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError
from gemcut.files import UnreadableError, read_json
from gemcut.progress import Report

if TYPE_CHECKING:
    import torch

    from gemcut.checkpoint.gguf_reader import GgufFile
    from gemcut.checkpoint.gguf_weight import Dequantize
    from gemcut.checkpoint.safetensors_reader import SafetensorsFolder
    from gemcut.quantization.spec import Quantization
    from gemcut.quantization.weights import CheckpointWeight, Incoming
    from gemcut.text.special import SpecialTokens
    from gemcut.text.tokenizer import Tokenizer


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
        progress: Report | None = None,
        *,
        dtype: torch.dtype | None = None,
        only: Collection[str] | None = None,
    ) -> Iterator[tuple[str, CheckpointWeight]]:
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
