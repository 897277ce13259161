"""From the SentencePiece vocabulary inside a GGUF file to a tokenizer.

The file lists pieces with scores and kinds but no merges. SentencePiece's BPE joins, again and again, the two
neighbours whose joint piece has the best score (the leftmost on a tie); user-defined pieces are matched whole first.
The same result comes from a list of merges: every way to cut a piece into two pieces, best score first. Ollama's files
may bring the merges of the tokenizer.json they were made from, which are taken as they are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from gemcut.errors import TokenizerError
from gemcut.paths import cache_folder

#: Raise when `build` gives another result for the same vocabulary, so that older caches are no longer read.
FORMAT_VERSION = 2

# Kinds of pieces: tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def folder_of(cache_key: str) -> Path:
    """Where the tokenizer of a vocabulary is kept: tokenizers/… in gemcut's cache."""
    digest = hashlib.sha256(f"{FORMAT_VERSION}\0{cache_key}".encode()).hexdigest()
    return cache_folder("tokenizers") / digest[:32]


@dataclass(frozen=True)
class Parts:
    """A vocabulary taken apart: what both backends are made of.

    Attributes:
        pieces: the text of each id, runs of spaces as ▁.
        vocab: the id of each text.
        names: the special tokens' texts by role.
        space_runs: ids of runs of spaces, joined before anything else.
        special, added: ids of special tokens, and of all tokens matched whole.
    """

    pieces: list[str]
    vocab: dict[str, int]
    names: dict[str, str]
    types: Sequence[int]
    space_runs: set[int]
    special: set[int]
    added: set[int]

    def usable(self, token_id: int) -> bool:
        """Whether pieces are joined from and to this one."""
        return self.types[token_id] == NORMAL or token_id in self.space_runs


def parts(
    tokens: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    special: Mapping[str, int],
    merges: Sequence[str] | None = None,
) -> Parts:
    """A vocabulary checked and taken apart; arguments and errors as `build`."""
    _check(tokens, scores, types, special)
    names = {role: tokens[token_id] for role, token_id in special.items()}
    types = with_user_defined(tokens, scores, types, merges)
    # llama.cpp stores runs of spaces as real spaces; the text has ▁ by the time they are looked up.
    space_runs: set[int] = set()
    if merges is None:
        space_runs = {i for i, kind in enumerate(types) if kind in (NORMAL, USER_DEFINED) and _is_space_run(tokens[i])}
    pieces = list(tokens)
    for i in space_runs:
        pieces[i] = "▁" * len(tokens[i])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        twice = next(piece for i, piece in enumerate(pieces) if vocab[piece] != i)
        raise TokenizerError(f"the GGUF vocabulary holds the token {twice[:40]!r} twice")
    is_special = {i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)} | set(special.values())
    added = is_special | {i for i, kind in enumerate(types) if kind == USER_DEFINED and i not in space_runs}
    if "" in vocab:
        raise TokenizerError(f"the GGUF vocabulary holds an empty token (id {vocab['']})")
    return Parts(pieces, vocab, names, types, space_runs, is_special, added)


def build(
    tokens: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    special: Mapping[str, int],
    merges: Sequence[str] | None = None,
) -> tuple[Tokenizer, dict[str, str]]:
    """The backend of a vocabulary, and the special tokens' texts.

    Args:
        tokens, scores, types: one entry a token, in order of id.
        special: ids of "bos_token", "eos_token", "pad_token", "unk_token".
        merges: "left right", best first; None derives them from the scores.

    Raises:
        TokenizerError: lengths differ, a token stands twice, a kind or special id is unknown.
    """
    each = parts(tokens, scores, types, special, merges)
    names, vocab = each.names, each.vocab
    backend = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_merges(each.pieces, scores, each.types, each.space_runs, vocab)
            if merges is None
            else _given(merges, vocab),
            unk_token=names["unk_token"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = names["bos_token"]
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, special["bos_token"])]
    )
    backend.add_tokens(
        [AddedToken(each.pieces[i], special=i in each.special, normalized=False) for i in sorted(each.added)]
    )
    return backend, names


def _merges(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], space_runs: set[int], vocab: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Every cut of every piece into two pieces, in the order SentencePiece would join them.

    Runs of spaces come first whatever their score: they are user-defined pieces, matched before anything is joined.
    All other user-defined pieces become added tokens and need no merges.
    """
    usable = {piece: i for piece, i in vocab.items() if types[i] == NORMAL or i in space_runs}
    long = [i for i in usable.values() if len(pieces[i]) > 1]
    long.sort(key=lambda i: (False, 0.0, i) if i in space_runs else (True, -scores[i], i))
    merges: list[tuple[str, str]] = []
    for i in long:
        piece = pieces[i]
        cuts = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        known = [cut for cut in cuts if cut[0] in usable and cut[1] in usable]
        known.sort(key=lambda cut: (usable[cut[0]], usable[cut[1]]))  # the order of Gemma 2's own tokenizer.json
        merges.extend(known)
    return merges


def _given(merges: Sequence[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Merges as a file lists them, checked: the tokenizers library aborts on a piece it does not know."""
    found = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or left not in vocab or right not in vocab or left + right not in vocab:
            raise TokenizerError(f"the GGUF vocabulary lists the merge {merge[:40]!r}, whose pieces are no tokens")
        found.append((left, right))
    return found


def with_user_defined(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], merges: Sequence[str] | None = None
) -> list[int]:
    """``types`` with the user-defined pieces marked as such.

    Ollama's converter calls them normal. They stand before the byte pieces or after the learned ones (whose scores fall
    from 0), or cannot be joined from two others. A vocabulary without byte pieces is no SentencePiece one: it stays.
    """
    found = list(types)
    first_byte = next((i for i, kind in enumerate(types) if kind == BYTE), None)
    if first_byte is None or (NORMAL not in types[:first_byte] and USER_DEFINED in types[:first_byte]):
        return found  # a vocabulary whose types are right, such as llama.cpp's
    last_learned = len(tokens) - 1
    usable = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    results = None if merges is None else {merge.replace(" ", "", 1) for merge in merges}
    if merges is None:
        learned = (i for i in reversed(range(len(tokens))) if types[i] == NORMAL and scores[i] < 0)
        last_learned = next(learned, last_learned)

    def joined(token: str) -> bool:
        if results is not None:
            return token in results
        return any(token[:k] in usable and token[k:] in usable for k in range(1, len(token)))

    for i, token in enumerate(tokens):
        outside = not first_byte <= i <= last_learned
        if types[i] == NORMAL and (outside or (len(token) > 1 and not joined(token) and not _is_space_run(token))):
            found[i] = USER_DEFINED
    return found


def _is_space_run(token: str) -> bool:
    return len(token) > 1 and not token.strip(" ▁")


def _check(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], special: Mapping[str, int]) -> None:
    if not len(tokens) == len(scores) == len(types):
        raise TokenizerError(
            f"the GGUF vocabulary has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types; "
            "expected as many of each"
        )
    if not all(map(math.isfinite, scores)):
        raise TokenizerError("the GGUF vocabulary has a score that is not a number")
    unknown = set(types) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}
    if unknown:
        raise TokenizerError(f"the GGUF vocabulary has tokens of type {min(unknown)}; gemcut knows types 1 to 6")
    for role, token_id in special.items():
        if not 0 <= token_id < len(tokens):
            raise TokenizerError(f"{role} has id {token_id}, outside the GGUF vocabulary of {len(tokens)} tokens")
