"""The shared split beside Python's own words and expressions."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemcut.text.split import Many, split_text

ALONE = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323ff\u3040-\u30ff\u0e00-\u0e7f]")
TEXTS = st.text(
    st.one_of(st.sampled_from("ab Z.\n\t_9é中\u3000ß😀İ"), st.characters(exclude_categories=["Cs"])), max_size=40
)


def terms_by_hand(text: str) -> list[str]:
    """Runs of letters, digits and underscores, cut before and behind each character that stands alone."""
    out, run = [], ""
    for character in text:
        inside = character.isalnum() or character == "_"
        if inside and not ALONE.match(character):
            run += character
            continue
        out += [run] * bool(run) + [character] * inside
        run = ""
    return out + [run] * bool(run)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
@example(["", "\n", "a\n\nb", "中a中"])
@example(["", ""])
def test_pieces(texts: list[str]) -> None:
    many = Many(texts)
    for i, text in enumerate(texts):
        split = many.one(i)
        assert split.words.texts(text) == text.split()
        assert split.terms.texts(text) == terms_by_hand(text)
        lines = [line.strip() for line in text.split("\n")]
        assert split.lines.texts(text) == [line for line in lines if line]
        follows = [i == 0 or not lines[i - 1] for i, line in enumerate(lines) if line]
        assert split.breaks.tolist() == [True, *follows[1:]][: len(follows)]
        assert "".join(map(chr, split.codes.tolist())) == text


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("abcB中", min_size=1, max_size=4), min_size=1, max_size=20), st.text(max_size=9))
def test_equal_pieces_have_equal_hashes_wherever_they_stand(words: list[str], before: str) -> None:
    before = before.encode("utf-8", "replace").decode()
    split = Many([before, " ".join(words)]).one(1)
    hashes: dict[str, int] = {}
    for word, value in zip(words, split.words.hash.tolist(), strict=True):
        assert hashes.setdefault(word, value) == value
    assert len(set(hashes.values())) == len(hashes)
    assert split.words.hash.tolist() == [split_text(word).words.hash.tolist()[0] for word in words]


@pytest.mark.parametrize(("one", "other"), [("Hello WORLD", "hello, world!"), ("STRASSE", "strasse"), ("ÉTÉ", "été")])
def test_terms_know_no_case_and_no_marks(one: str, other: str) -> None:
    assert split_text(one).terms.hash.tolist() == split_text(other).terms.hash.tolist()
    assert split_text(one).words.hash.tolist() != split_text(other).words.hash.tolist()


def test_hashes_are_those_that_were_stored() -> None:
    """By the definition, with Python's whole numbers: an index that was written must be read by later versions."""
    mask = (1 << 64) - 1

    def mix(value: int) -> int:
        value ^= value >> 30
        value = value * 0xBF58476D1CE4E5B9 & mask
        value ^= value >> 27
        value = value * 0x94D049BB133111EB & mask
        return value ^ value >> 31

    def hash_of(piece: str) -> int:
        data = piece.encode()
        state = len(data) * 0x9E3779B97F4A7C15 & mask
        for i in range(0, len(data), 8):
            state = (state ^ int.from_bytes(data[i : i + 8], "little")) * 0xD1342543DE82EF95 & mask
            state ^= state >> 32
        return mix(state)

    for text in ("anagram margana eightyes, eightyes longer-than-sixteen-bytes", "\U0001f600 été 中 \U000e0041x"):
        assert split_text(text).words.hash.tolist() == [hash_of(word) for word in text.split()]
        lines = [sum(mix(hash_of(w) + i * 0x9E3779B97F4A7C15 & mask) for i, w in enumerate(text.split())) & mask]
        assert split_text(text).lines.hash.tolist() == [mix(line) for line in lines]
    assert split_text("ÉTÉ Abc").terms.hash.tolist() == [hash_of("été"), hash_of("abc")]
