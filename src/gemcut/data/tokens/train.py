"""A byte-pair tokenizer from a run's documents, with Gemma's marks at Gemma's ids."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemcut.data.store import AtomicFile, read_documents
from gemcut.errors import DataError, ParameterError

#: Gemma 2's first ids: 0 to 107.
MARKS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<2mass>",
    "[@BOS@]",
    *(f"<unused{i}>" for i in range(99)),
    "<start_of_turn>",
    "<end_of_turn>",
)
BYTES = tuple(f"<0x{i:02X}>" for i in range(256))
LEAST = len(MARKS) + len(BYTES) + 1
_SPACE = "▁"
#: Line breaks; spaces but the last of some; a digit; letters; marks; what is left: a word takes one space along.
PIECES = r"\n+|▁+(?=▁)|▁?\d|▁?[\p{L}\p{M}]+|▁?[^\s\p{L}\p{M}\d▁]+|▁+|\s+"


def check_size(size: int) -> None:
    """Raises ParameterError unless a tokenizer can have ``size`` pieces."""
    if not LEAST <= size <= 1 << 20:
        raise ParameterError(f"the size is {size}; expected {LEAST} to {1 << 20}")


def train(texts: Callable[[], Iterator[str]], size: int) -> Any:
    """A ``tokenizers.Tokenizer`` of ``size`` pieces: marks, one piece a byte, and merges learned from ``texts``.

    ``texts`` is called twice: characters are chosen first, since the library breaks ties between rare ones by chance.
    Spaces become ▁, which begins the word behind it; each digit is a piece; what no piece spells is spelled in bytes.
    Raises ParameterError for a size too small, DataError where the texts hold too little to learn.
    """
    import json

    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

    check_size(size)
    tokenizer: Any = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    # Runs of spaces and line breaks are pieces of their own, as indentation is; a word takes one space along.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*MARKS, *BYTES]
    # Rare characters are spelled in bytes: at most half of what is learned are single characters.
    alphabet = common_characters(texts(), min(2000, (size - len(special) + 1) // 2))
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        show_progress=False,
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    found = tokenizer.get_vocab_size()
    if found < size:
        raise DataError(f"the texts hold {found:,} pieces; ask for at most so many, or give more text")
    # Bytes are pieces of the vocabulary, not marks that could stand in a text.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in MARKS]
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def common_characters(texts: Iterator[str], most: int) -> list[str]:
    """The characters that stand most often in ``texts``, at most so many; of equally many the lower code point first.

    A space counts as ▁, which stands for it in pieces.
    """
    counts = np.zeros(sys.maxunicode + 1, np.int64)
    for text in texts:
        points, found = np.unique(np.frombuffer(text.encode("utf-32-le"), "<u4"), return_counts=True)
        counts[points] += found
    counts[ord(_SPACE)] += counts[ord(" ")]
    counts[ord(" ")] = 0
    order = np.argsort(-counts, kind="stable")[:most]
    return [chr(point) for point in order.tolist() if counts[point]]


def train_from_run(out: Path, size: int, save_to: Path) -> int:
    """Train on the documents of the run in ``out`` and write ``save_to``; gives the characters read.

    Raises DataError where ``out`` has no documents.
    """
    paths = sorted((out / "documents").glob("*.jsonl.zst"))
    if not paths:
        raise DataError(f"there are no documents in {out}; expected the folder of a `gemcut data run`")
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for path in paths:
            for document in read_documents(path):
                read += len(document.text)
                yield document.text

    tokenizer = train(texts, size)
    with AtomicFile(save_to) as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    return read // 2  # they are read twice
