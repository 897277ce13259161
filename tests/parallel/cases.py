"""A tiny checkpoint that can be split in every way, and ranks that are threads of this process."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from gemcut.checkpoint.resolve import resolve
from gemcut.loading import load_network
from gemcut.model import Model
from gemcut.parallel.communicator import GroupCommunicator, connect
from gemcut.parallel.shape import Share
from gemcut.parallel.split import Split
from gemcut.quantization.spec import Quantization
from support import hf_model, save_checkpoint, tiny_config

T = TypeVar("T")

#: 8 heads of 64, so that an eighth of o's inputs is a block of 64; 317 tokens are a multiple of nothing.
SHAPE: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_size": 64,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "vocab_size": 317,
}
FORMATS: dict[str, Quantization | None] = {
    "fp32": None,
    "int8": Quantization("int8", head="int8"),
    "nf4": Quantization("nf4", double_quant=False),
    "nf4-double": Quantization("nf4", double_quant=True),
}


def checkpoint(folder: Path, model_type: str = "gemma2", **changes: Any) -> Path:
    """A random fp32 checkpoint of ``SHAPE``."""
    return save_checkpoint(folder, hf_model(tiny_config(model_type, **{**SHAPE, **changes})))


def ranks(size: int, work: Callable[[GroupCommunicator], T]) -> list[T]:
    """What ``work`` gives on each of ``size`` ranks, which are threads with gloo between them."""
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:

        def run(rank: int) -> None:
            try:
                results[rank] = work(connect("gloo", Path(folder), rank, size, torch.device("cpu")))
            except BaseException as error:
                results[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[rank] for rank in range(size)]


def network(
    folder: Path, quantization: Quantization | None = None, communicator: GroupCommunicator | None = None
) -> Model:
    """The network of a checkpoint in fp32, whole or one rank's."""
    source = resolve(str(folder))
    split = None
    if communicator is not None:
        split = Split(source.config(), Share(communicator.rank, communicator.size), communicator)
    return load_network(source, dtype=torch.float32, device=torch.device("cpu"), quantization=quantization, split=split)
