"""Tokenizers derived from a GGUF vocabulary: against transformers' conversion and Google's own merges; the cache."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import support
from gemcut.errors import TokenizerError
from gemcut.text import Tokenizer, gguf_vocab

Vocabulary = tuple[list[str], list[float], list[int]]
SPECIAL = re.compile("<(bos|eos|pad|unk|mask|start_of_turn|end_of_turn|unused)")


@pytest.mark.slow
def test_gemma3_ids_equal_transformers_on_hard_texts(gemma3: Tokenizer, hf_gemma3: Any, hard_texts: list[str]) -> None:
    for text in hard_texts:
        assert gemma3.encode(text) == hf_gemma3(text).input_ids, repr(text)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_gemma3_ids_equal_transformers_on_generated_texts(gemma3: Tokenizer, hf_gemma3: Any, text: str) -> None:
    assert gemma3.encode(text) == hf_gemma3(text).input_ids


@pytest.mark.slow
def test_gemma3_ids_equal_transformers_on_pieces_in_disorder(gemma3: Tokenizer, hf_gemma3: Any) -> None:
    """Pieces of the vocabulary glued together at random reach merges that ordinary text never does."""
    for text in _disorder(gemma3, 3000):
        assert gemma3.encode(text) == hf_gemma3(text).input_ids, repr(text)


@pytest.mark.slow
def test_merges_derived_for_gemma2_equal_googles_own(gemma2: Tokenizer, hard_texts: list[str]) -> None:
    """Gemma 2's tokenizer.json lists its merges, a reference neither we nor transformers' GGUF reader derived.

    Its vocabulary, spelled as llama.cpp's converter writes it, must lead to the same ids. This includes runs of more
    than 31 spaces (the longest such token): there tokenizer.json, and with it transformers and gemcut, halves the run,
    where SentencePiece itself takes 31 first. Compared with sentencepiece 0.2.3 on a model made from the Gemma 3
    file's vocabulary and 20,000 texts like `_disorder`'s, no other difference showed. Not compared: more than 31 tabs
    (user-defined pieces in a GGUF file, taken as SentencePiece does; merges in tokenizer.json) and a typed ▁▁ (which
    tokenizer.json alone makes a token of its own).
    """
    derived = Tokenizer.from_gguf_vocab(*_as_gguf(support.tokenizer_dir() / "tokenizer.json"))
    runs = [start + c * n for start in ("", "the ") for c in " -=.*_~ahe0。─" for n in range(1, 130)]
    for text in [*hard_texts, *runs, *_disorder(gemma2, 3000)]:
        if "▁" not in text and "\t" * 32 not in text:
            assert derived.encode(text) == gemma2.encode(text), repr(text)
    assert derived.special_ids >= gemma2.special_ids
    ids = gemma2.encode("the \N{EURO SIGN} 𒀀 \t x")
    assert derived.decode(ids) == gemma2.decode(ids)


def test_scores_not_positions_order_the_merges(small_vocab: Vocabulary) -> None:
    tokens, scores, types = (list(column) for column in small_vocab)
    tokens += ["ab", "bc"]
    types += [1, 1]
    assert _names(Tokenizer.from_gguf_vocab(tokens, [*scores, -50.0, -60.0], types), "abc") == ["ab", "c"]
    assert _names(Tokenizer.from_gguf_vocab(tokens, [*scores, -60.0, -50.0], types), "abc") == ["a", "bc"]


def test_small_vocabulary(small: Tokenizer) -> None:
    assert _names(small, "the  <b>the\n\n\u20ac") == [
        *("t", "he", "▁▁", "<b>", "t", "he", "\n\n", "<0xE2>", "<0x82>", "<0xAC>")
    ]
    assert _names(small, " the") == ["▁the"]  # no space is put in front
    assert small.special_ids == {0, 1, 2, 3, 4, 5}
    assert small.backend.encode("the").ids == small.encode("the")  # the <bos> template for transformers


def test_turn_markers_marked_user_defined_are_special(small_vocab: Vocabulary) -> None:
    tokens, scores, types = small_vocab
    tokenizer = Tokenizer.from_gguf_vocab(
        tokens, scores, [4 if "_of_turn" in t else k for t, k in zip(tokens, types, strict=True)]
    )
    assert tokenizer.special_ids == {0, 1, 2, 3, 4, 5}


def test_the_cache_is_used_and_rebuilt(small_vocab: Vocabulary, user_cache: Path) -> None:
    assert Tokenizer.from_gguf_cache("key") is None
    first = Tokenizer.from_gguf_vocab(*small_vocab, chat_template="{{ t }}", cache_key="key")
    cached = Tokenizer.from_gguf_cache("key")
    assert cached is not None
    assert cached.backend.to_str() == first.backend.to_str()
    assert cached.chat_template == "{{ t }}"
    assert (cached.bos_id, cached.special_ids) == (first.bos_id, first.special_ids)
    file = gguf_vocab.folder_of("key") / "tokenizer.json"
    assert user_cache in file.parents
    whole = file.read_bytes()
    for damage in (whole[:100], b"", b"{}", b"\xff"):
        file.write_bytes(damage)
        assert Tokenizer.from_gguf_cache("key") is None
        again = Tokenizer.from_gguf_vocab(*small_vocab, chat_template="{{ t }}", cache_key="key")
        assert again.encode("the <b>") == first.encode("the <b>")
        assert file.read_bytes() == whole
    assert sorted(path.name for path in file.parent.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert Tokenizer.from_gguf_cache("another key") is None


def test_the_cache_of_a_smaller_vocabulary_is_not_taken(small_vocab: Vocabulary, user_cache: Path) -> None:
    tokens, scores, types = small_vocab
    Tokenizer.from_gguf_vocab(tokens[:-1], scores[:-1], types[:-1], cache_key="key")
    assert Tokenizer.from_gguf_vocab(*small_vocab, cache_key="key").vocab_size == len(tokens)


def test_an_older_format_is_not_read(
    small_vocab: Vocabulary, user_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tokenizer.from_gguf_vocab(*small_vocab, cache_key="key")
    monkeypatch.setattr(gguf_vocab, "FORMAT_VERSION", gguf_vocab.FORMAT_VERSION + 1)
    assert Tokenizer.from_gguf_cache("key") is None


def test_without_a_place_for_the_cache_it_still_works(
    small_vocab: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not cached: cannot write"):
        assert Tokenizer.from_gguf_vocab(*small_vocab, cache_key="key").vocab_size == len(small_vocab[0])


def test_the_cache_is_in_the_home_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path / ".cache" / "gemcut" in gguf_vocab.folder_of("key").parents


@pytest.mark.slow
def test_the_real_vocabulary_is_built_once(
    gemma3_vocab: Vocabulary, user_cache: Path, monkeypatch: pytest.MonkeyPatch, hard_texts: list[str]
) -> None:
    built = Tokenizer.from_gguf_vocab(*gemma3_vocab, cache_key="real")

    def again(*_: object) -> None:
        raise AssertionError("built a second time")

    monkeypatch.setattr(gguf_vocab, "build", again)
    kept = Tokenizer.from_gguf_vocab(*gemma3_vocab, cache_key="real")
    assert [kept.encode(text) for text in hard_texts] == [built.encode(text) for text in hard_texts]


def test_inconsistent_vocabularies(small_vocab: Vocabulary) -> None:
    tokens, scores, types = small_vocab
    no_bytes = [t.replace("<0x", "<1x") for t in tokens]
    cases: list[tuple[Vocabulary, dict[str, Any], str]] = [
        ((tokens, scores[:-1], types), {}, "expected as many of each"),
        (([*tokens[:-1], tokens[-2]], scores, types), {}, "twice"),
        ((tokens, scores, [*types[:-1], 9]), {}, "type 9"),
        ((tokens, scores, types), {"bos_id": 10**6}, "bos_token has id 1000000"),
        ((tokens, scores, types), {"unk_id": -1}, "unk_token has id -1"),
        ((tokens, scores, types), {"add_space_prefix": True}, "space prefix"),
        ((no_bytes, scores, types), {}, "byte tokens are missing"),
        (([], [], []), {}, "outside the GGUF vocabulary of 0 tokens"),
    ]
    for vocabulary, options, message in cases:
        with pytest.raises(TokenizerError, match=message) as caught:
            Tokenizer.from_gguf_vocab(*vocabulary, **options)
        assert "\n" not in str(caught.value)


def _names(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.id_to_token(i) for i in tokenizer.encode(text, add_bos=False)]


def _disorder(tokenizer: Tokenizer, count: int) -> list[str]:
    generator = random.Random(1)

    def part() -> str:
        kind = generator.random()
        if kind < 0.4:
            return tokenizer.token_text(generator.randrange(tokenizer.vocab_size))
        if kind < 0.6:
            return "".join(generator.choices("abehirst ", k=generator.randint(1, 9)))
        if kind < 0.7:
            return generator.choice(" \n-=.abлк中😀") * generator.randint(1, 40)
        if kind < 0.9:
            return tokenizer.token_text(generator.randrange(500, 30_000)) * generator.randint(2, 8)
        return chr(generator.choice([generator.randrange(0x20, 0xD7FF), generator.randrange(0x10000, 0x10FFFF)]))

    made = ("".join(part() for _ in range(generator.randint(1, 12))) for _ in range(count))
    return [text for text in made if not SPECIAL.search(text)]


def _as_gguf(file: Path) -> Vocabulary:
    """A tokenizer.json's vocabulary as llama.cpp's converter would write it; its merges are not looked at."""
    data = json.loads(file.read_text(encoding="utf-8"))
    added = {token["id"]: token for token in data["added_tokens"]}
    vocab = {token_id: token for token, token_id in data["model"]["vocab"].items()}
    vocab[226] = "<0x09>"
    tokens, scores, types = [], [], []
    for i in range(len(vocab)):
        token, kind, score = vocab[i], 1, -float(i)
        if i in added or not token.strip("\t\n"):  # runs of tabs are user-defined pieces, though tokenizer.json merges
            looks_special = added.get(i, {}).get("special") or token.startswith(("<unused", "<mask", "<2mass", "[@"))
            kind, score = (3 if looks_special else 4), -1000.0
            token = token.replace("▁", " ")
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            kind, score = 6, 0.0
        tokens.append(token)
        scores.append(score)
        types.append(kind)
    return tokens, scores, types
