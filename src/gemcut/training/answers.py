"""A teacher from a checkpoint folder, asked about one source of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp

from gemcut.errors import ParameterError
from gemcut.training.importing import HuggingFaceFolder
from gemcut.training.mixture import TOKENIZER, Mixture
from gemcut.training.network import Network
from gemcut.training.parameters import from_hf
from gemcut.training.runfile import RunFile
from gemcut.training.teacher import write_answers


def answer_source(
    file: RunFile,
    source: str,
    folder: Path,
    teacher: Path,
    *,
    top: int,
    batch: int,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the teacher's answers for the windows of ``source``; gives how many there are.

    Raises ParameterError for a source that the run has not, a ``top`` beyond the vocabulary, or a tokenizer that the
    run is to learn: a teacher knows its own words alone.
    """
    found = next((each for each in file.sources if each.name == source), None)
    if found is None:
        raise ParameterError(
            f"the run has no source {source!r}; expected one of {', '.join(each.name for each in file.sources)}"
        )
    if file.model.train_tokenizer:
        raise ParameterError("the run learns a tokenizer of its own; a teacher needs the run to name the teacher's")
    weights = HuggingFaceFolder(teacher)
    if not 1 <= top <= weights.config.vocab_size:
        raise ParameterError(f"--top is {top}; expected 1 to {weights.config.vocab_size:,}, the teacher's vocabulary")
    with tempfile.TemporaryDirectory() as temporary:
        mixture = Mixture(file, Path(temporary) / TOKENIZER)
    windows = mixture.windows(file.path(found.path), weights.config.vocab_size)
    dtype = jnp.dtype(file.model.compute_dtype)
    network = Network(weights.config, dtype, attention=file.model.attention)
    write_answers(
        folder,
        windows,
        network,
        from_hf(weights.config, weights.read, dtype),
        top=top,
        batch=batch,
        watch=lambda done: watch(done, len(windows)),
    )
    return len(windows)
