"""Streaming equals decoding at once; stop strings cut at the right place however the text is cut into tokens."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemcut.errors import ParameterError
from gemcut.text import Detokenizer, Tokenizer

many = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FFFD = "\ufffd"
# Special tokens, plain tab, newline, spaces, ▁ alone, words; then bytes: ASCII, lead and continuation bytes.
tokens = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 7, 106, 107, 108, 109, 139, 226, 235248, 573, 1175]),
    st.integers(217, 472),
    st.sampled_from([217 + byte for byte in (0x41, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80)]),
    st.integers(0, 255_999),
)


def stream(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Reference, from the whole text: of all stop strings the one complete first, then the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


@many
@given(ids=st.lists(tokens, max_size=40), skip=st.booleans())
def test_pieces_make_up_what_decode_says(gemma2: Tokenizer, ids: list[int], skip: bool) -> None:
    whole = gemma2.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(Detokenizer(gemma2, skip_special_tokens=skip), ids)) == whole


def test_pieces_make_up_what_decode_says_for_gemma3(gemma3: Tokenizer, hard_texts: list[str]) -> None:
    generator = random.Random(3)
    for _ in range(300):
        ids = [
            generator.choice([generator.randrange(262_144), generator.randrange(300, 494), 105, 106, 1])
            for _ in range(20)
        ]
        for skip in (True, False):
            pieces = stream(Detokenizer(gemma3, skip_special_tokens=skip), ids)
            assert "".join(pieces) == gemma3.decode(ids, skip_special_tokens=skip)
    for text in hard_texts:
        ids = gemma3.encode(text, add_bos=False, parse_special=False)
        assert "".join(stream(Detokenizer(gemma3), ids)) == text.replace("▁", " ")


@many
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=["▁", FFFD]), max_size=30))
def test_never_half_a_character(gemma2: Tokenizer, text: str) -> None:
    pieces = stream(Detokenizer(gemma2), gemma2.encode(text, parse_special=False))
    assert "".join(pieces) == text
    assert FFFD not in "".join(pieces)


def test_never_a_special_token(gemma2: Tokenizer) -> None:
    ids = gemma2.encode("a<end_of_turn>\n<start_of_turn>model<eos> b<pad>")
    assert "".join(stream(Detokenizer(gemma2), ids)) == "a\nmodel b"
    shown = "".join(stream(Detokenizer(gemma2, skip_special_tokens=False), ids))
    assert shown == "<bos>a<end_of_turn>\n<start_of_turn>model<eos> b<pad>"


def test_bytes(small: Tokenizer) -> None:
    def ids(data: bytes) -> list[int]:
        return [small.encode("\n", add_bos=False)[0], *(small.token_to_id(f"<0x{byte:02X}>") or 0 for byte in data)]

    euro = ids("€".encode())
    assert stream(Detokenizer(small), euro) == ["\n", "", "", "", "€"]
    assert stream(Detokenizer(small), [*euro, *ids(b"")]) == ["\n", "", "", "", "€\n", ""]
    assert stream(Detokenizer(small), euro[:-1]) == ["\n", "", "", FFFD * 2]
    # One bad byte spoils its whole run, as in decode: which is why a run is held back until it ends.
    spoiled = [*euro, *ids(b"\xff")[1:], *ids(b"")]
    assert stream(Detokenizer(small), spoiled) == ["\n", "", "", "", "", FFFD * 4 + "\n", ""]
    assert small.decode(spoiled) == "\n" + FFFD * 4 + "\n"
    # A special token that is left out does not end a run.
    assert "".join(stream(Detokenizer(small), [*euro[:2], small.eos_id, *euro[2:]])) == "\n€"


def test_a_prompt_that_ends_within_a_character(small: Tokenizer) -> None:
    emoji = [small.token_to_id(f"<0x{byte:02X}>") or 0 for byte in "😀".encode()]
    word = small.encode("the", add_bos=False)
    for split in range(1, 4):
        prompt, rest = [*word, *emoji[:split]], emoji[split:]
        assert "".join(stream(Detokenizer(small, prompt_ids=prompt), [*rest, *word])) == "😀the"
        assert "".join(stream(Detokenizer(small, prompt_ids=prompt), word)) == "the"
        assert "".join(stream(Detokenizer(small, prompt_ids=prompt), emoji)) == "😀"
    assert "".join(stream(Detokenizer(small, prompt_ids=[*word, *emoji]), rest)) == FFFD * len(rest)
    assert "".join(stream(Detokenizer(small, prompt_ids=word), word)) == "the"


@many
@given(data=st.data())
def test_stop_strings_cut_where_the_whole_text_says(small: Tokenizer, data: st.DataObject) -> None:
    # Few letters, so that stops overlap with themselves, each other and token borders all the time.
    letters = st.text("ab \n€", min_size=1, max_size=5)
    stops = data.draw(st.lists(letters, max_size=4))
    text = data.draw(st.text("abthe \n€", max_size=40))
    ids = small.encode(text, add_bos=False)
    detokenizer = Detokenizer(small, stop=stops)
    pieces = stream(detokenizer, ids)
    expected, stop = cut(text, stops)
    assert "".join(pieces) == expected
    assert detokenizer.stopped == stop


@pytest.mark.slow
@many
@given(ids=st.lists(tokens, max_size=40), data=st.data())
def test_stop_strings_in_random_tokens(gemma2: Tokenizer, ids: list[int], data: st.DataObject) -> None:
    whole = gemma2.decode(ids)
    start = data.draw(st.integers(0, len(whole)))
    stops = [whole[start : start + length] for length in (1, 2, 5, 9) if whole[start : start + length]]
    stops = data.draw(st.lists(st.sampled_from(stops), max_size=3)) if stops else []
    detokenizer = Detokenizer(gemma2, stop=stops)
    assert ("".join(stream(detokenizer, ids)), detokenizer.stopped) == cut(whole, stops)


def test_text_is_held_back_only_while_it_may_become_a_stop(gemma2: Tokenizer) -> None:
    ids = gemma2.encode("one two three four", add_bos=False)
    assert stream(Detokenizer(gemma2), ids) == ["one", " two", " three", " four", ""]
    assert stream(Detokenizer(gemma2, stop=["wo thX"]), ids) == ["one", " t", "wo three", " four", ""]
    assert stream(Detokenizer(gemma2, stop=["our and more"]), ids)[-2:] == [" f", "our"]


def test_stop_at_the_first_token_and_nothing_after(gemma2: Tokenizer) -> None:
    ids = gemma2.encode("one two three", add_bos=False)
    detokenizer = Detokenizer(gemma2, stop=["on"])
    assert stream(detokenizer, ids) == ["", "", "", ""]
    assert detokenizer.stopped == "on"
    detokenizer = Detokenizer(gemma2, stop=["e tw"])
    assert stream(detokenizer, ids) == ["on", "", "", ""]
    assert detokenizer.stopped == "e tw"
    assert detokenizer.push(ids[0]) == ""
    assert detokenizer.finish() == ""


def test_of_two_stops_that_end_together_the_longest_counts(small: Tokenizer) -> None:
    for stops in (["c", "bc", "abc"], ["abc", "bc", "c"]):
        detokenizer = Detokenizer(small, stop=stops)
        assert "".join(stream(detokenizer, small.encode("d abc e", add_bos=False))) == "d "
        assert detokenizer.stopped == "abc"


def test_a_stop_made_of_byte_tokens(gemma2: Tokenizer) -> None:
    ids = gemma2.encode("a𒀀𒁀b", add_bos=False)
    detokenizer = Detokenizer(gemma2, stop=["𒁀"])
    assert "".join(stream(detokenizer, ids)) == "a𒀀"
    detokenizer = Detokenizer(gemma2, stop=["𒁀"])
    assert "".join(stream(detokenizer, ids[:-1])) == "a𒀀"  # found as late as in finish
    assert detokenizer.stopped == "𒁀"


def test_a_special_token_as_stop_string(gemma2: Tokenizer) -> None:
    """Its text is never shown, so only its id can be seen to come."""
    ids = gemma2.encode("one two <end_of_turn> three", add_bos=False)
    detokenizer = Detokenizer(gemma2, stop=["<end_of_turn>", "tw!"])
    assert "".join(stream(detokenizer, ids)) == "one two "
    assert detokenizer.stopped == "<end_of_turn>"
    held = gemma2.encode("one tw<end_of_turn> three", add_bos=False)
    detokenizer = Detokenizer(gemma2, stop=["<end_of_turn>", "tw!"])
    assert "".join(stream(detokenizer, held)) == "one tw"
    shown = Detokenizer(gemma2, stop=["<end_of_turn>"], skip_special_tokens=False)
    assert "".join(stream(shown, ids)) == "one two "
    assert shown.stopped == "<end_of_turn>"


def test_one_stop_string_may_be_given_bare(small: Tokenizer) -> None:
    detokenizer = Detokenizer(small, stop="cat")
    assert "".join(stream(detokenizer, small.encode("a cat", add_bos=False))) == "a "


def test_finish_may_be_called_twice(small: Tokenizer) -> None:
    detokenizer = Detokenizer(small, stop=["abc"])
    assert [detokenizer.push(i) for i in small.encode("ab", add_bos=False)] == ["", ""]
    assert detokenizer.finish() == "ab"
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("stop", [[""], ["a", ""], "", [3], [None]])
def test_bad_stop_strings(small: Tokenizer, stop: list[str]) -> None:
    with pytest.raises(ParameterError, match="stop string is"):
        Detokenizer(small, stop=stop)


@pytest.mark.parametrize("token_id", [-1, 2**40])
def test_ids_outside_the_vocabulary(small: Tokenizer, token_id: int) -> None:
    with pytest.raises(ParameterError, match="not in the vocabulary"):
        Detokenizer(small).push(token_id)


def test_work_per_token_does_not_grow(gemma2: Tokenizer) -> None:
    """16 stop strings match again and again almost to their ends; ten times the tokens take ten times as long."""
    ids = gemma2.encode("aaaa b " * 4000, add_bos=False)

    def seconds(count: int) -> float:
        detokenizer = Detokenizer(gemma2, stop=["a" * n + "!" for n in range(1, 17)])
        start = time.thread_time()  # however busy the machine is
        for token_id in itertools.islice(itertools.cycle(ids), count):
            detokenizer.push(token_id)
        return time.thread_time() - start

    short, long = min(seconds(4000) for _ in range(3)), seconds(40_000)
    assert long < 30 * short  # linear is 10; decoding all anew each time would be 100
