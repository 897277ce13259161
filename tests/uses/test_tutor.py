"""gemcut tutor: edits that give the corrected text whatever a model says, and drills that come back in time."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import support
from cli.conftest import Cli, cli  # noqa: F401
from gemcut import Gemma
from gemcut.cli.options import LoadOptions
from gemcut.errors import ContextLengthError, ParameterError
from gemcut.uses.drills import BOXES, GAP, Deck, Drill, drills_of, make_drills
from gemcut.uses.tutor import LEVELS, Correction, Corrector, Edit, apply, difference, settle
from gemcut.uses.tutor_view import marked
from server.host import NAME, new_gemma

TEXT = "He go to school. I has two cat."
RIGHT = "He goes to school. I have two cats."
GO = Edit(0, "go", "goes", "Third person takes -s.", "A1")
HAS = Edit(0, "has", "have", "I have.", "A1")
CAT = Edit(0, "cat", "cats", "Two: plural.", "A1")
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
words = st.text(alphabet="ab .\n漢é🦜", max_size=40)


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    return new_gemma(max_context=512)


@given(words, words)
@settings(max_examples=300, deadline=None)
def test_the_difference_gives_the_other_text(one: str, other: str) -> None:
    assert apply(one, difference(one, other)) == other


@given(words, words, st.lists(st.tuples(words, words), max_size=4))
@settings(max_examples=300, deadline=None)
def test_edits_give_the_corrected_text_whatever_a_model_says(
    text: str, corrected: str, said: list[tuple[str, str]]
) -> None:
    found = settle(text, corrected, [Edit(0, *each) for each in said])
    assert apply(text, found.edits) == corrected == found.corrected
    assert all(edit.before != edit.after for edit in found.edits)


def test_a_models_own_edits_and_others() -> None:
    own = settle(TEXT, RIGHT, [GO, HAS, CAT])
    assert own.explained
    assert [(edit.start, edit.rule) for edit in own.edits] == [(3, GO.rule), (19, HAS.rule), (27, CAT.rule)]
    for said in ([CAT, HAS, GO], [GO, HAS], [GO, HAS, CAT, CAT]):  # out of order, too few, too many
        found = settle(TEXT, RIGHT, said)
        assert not found.explained
        assert [edit.after for edit in found.edits] == ["goes", "have", "cats"]
        assert found.edits[0].rule == GO.rule  # the rule of the same words
    assert settle(TEXT, RIGHT, [GO, HAS]).edits[2].rule == ""
    assert settle(TEXT, TEXT, []) == Correction(TEXT, TEXT, [], True)


def test_marks() -> None:
    found = settle(TEXT, RIGHT, [GO, HAS, CAT])
    shown = marked(found, lambda text, style: text, plain=True)
    assert shown == "He [-go-]{+goes+} to school. I [-has-]{+have+} two [-cat-]{+cats+}."
    coloured = marked(found, lambda text, style: f"<{style}>{text}" if style else text, plain=False)
    assert coloured.startswith("He <gone>go<new>goes to school.")


def test_any_answer_is_whole_json_and_reproduces(gemma: Gemma) -> None:
    for seed in range(4):
        found = Corrector(gemma, level="A2", language="German", temperature=1.0, seed=seed, max_new_tokens=160)(TEXT)
        assert apply(TEXT, found.edits) == found.corrected
        assert all(edit.level in ("", *LEVELS) for edit in found.edits)


def test_what_cannot_be_corrected(gemma: Gemma) -> None:
    with pytest.raises(ParameterError, match="expected one of A1"):
        Corrector(gemma, level="Z9")
    with pytest.raises(ParameterError, match="language is empty"):
        Corrector(gemma, language=" ")
    with pytest.raises(ParameterError, match="the text is empty"):
        Corrector(gemma)("\n")
    with pytest.raises(ContextLengthError, match="the context holds 512; give it in parts"):
        Corrector(gemma)("word " * 200)


def test_a_right_answer_comes_back_later(tmp_path: Path) -> None:
    deck = Deck(tmp_path / "new" / "deck.json")
    drill = Drill(f"He {GAP} home.", "Goes", "Third person.", "A1")
    assert deck.add([drill, drill]) == 1
    assert deck.add([drill]) == 0
    now = NOW
    for days in [*BOXES[1:], BOXES[-1]]:
        (due,) = Deck(deck.path).due(now)  # read again: it is in the file
        deck = Deck(deck.path)
        assert deck.answer(due, "  goes. ", now)
        assert deck.due(now + timedelta(days=days) - timedelta(seconds=1)) == []
        now += timedelta(days=days)
        assert deck.next_due() == now
    (due,) = deck.due(now)
    assert not deck.answer(due, "went", now)
    (again,) = deck.due(now)
    assert (again.box, again.right, again.wrong) == (0, len(BOXES), 1)
    assert [path.name for path in deck.path.parent.iterdir()] == ["deck.json"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "no file of drills"),
        (b'{"format": "gemcut-drills", "version": 9, "drills": []}', "version 1"),
        (b'{"format": "gemcut-drills", "version": 1}', "a drill that is none"),
        (b'{"format": "gemcut-drills", "version": 1, "drills": [{"prompt": "x"}]}', "a drill that is none"),
        (
            b'{"format": "gemcut-drills", "version": 1, "drills": [{"prompt": "x", "answer": 3}]}',
            "a drill that is none",
        ),
        (
            b'{"format": "gemcut-drills", "version": 1, "drills": [{"prompt": "x", "answer": "y", "due": "soon"}]}',
            "a drill that is none",
        ),
    ],
)
def test_a_file_that_holds_no_drills_is_left_alone(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "deck.json"
    path.write_bytes(data)
    with pytest.raises(ParameterError, match=said):
        Deck(path)
    assert path.read_bytes() == data


def test_drills_of_mistakes() -> None:
    found = drills_of(settle(TEXT, RIGHT, [GO, HAS, CAT]))
    assert [each.prompt for each in found] == ["He [go] to school.", "I [has] two cat.", "I has two [cat]."]
    assert found[0] == Drill("He [go] to school.", "goes", GO.rule, "A1")
    assert drills_of(settle(TEXT, RIGHT, [])) == []  # nobody said why


def test_drills_that_a_model_writes_have_one_gap(gemma: Gemma) -> None:
    for seed in range(3):
        found = make_drills(gemma, "fruit", 2, temperature=1.0, seed=seed, max_new_tokens=200)
        assert len(found) <= 2
        assert all(each.prompt.count(GAP) == 1 and each.answer for each in found)
    with pytest.raises(ParameterError, match="expected 1 to 40"):
        make_drills(gemma, "fruit", 0)


def test_the_commands(cli: Cli, gemma: Gemma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(LoadOptions, "load", lambda self, name, **_: gemma)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    more = ("-m", NAME, "-n", "160", "-t", "1", "--seed", "3")
    found = json.loads(cli("tutor", "correct", TEXT, *more, "--json").out)
    edits = [Edit(**each) for each in found["edits"]]
    assert apply(TEXT, edits) == found["corrected"]
    shown = cli("tutor", "correct", *more, stdin=TEXT.encode()).out
    assert shown.startswith(marked(Correction(TEXT, found["corrected"], edits), lambda text, style: text, plain=True))
    assert "expected one of A1" in cli("tutor", "correct", TEXT, *more, "--level", "Z").error
    assert "add --keep" in cli("tutor", "correct", TEXT, *more, "--deck", tmp_path / "x").error
    # What a model that can correct says.
    said = {"corrected": RIGHT, "edits": [_said(edit) for edit in (GO, HAS, CAT)]}
    monkeypatch.setattr("gemcut.uses.tutor.answer_json", lambda *given: said)
    done = cli("tutor", "correct", TEXT, *more, "--keep")
    assert "2. 'has' → 'have': I have. (A1)" in done.out
    assert "3 new drills are in" in done.error
    monkeypatch.undo()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    due = json.loads(cli("tutor", "practice", "--json").out)["due"]
    assert [each["answer"] for each in due] == ["goes", "have", "cats"]
    done = cli("tutor", "practice", stdin=b"goes\nhad\n")  # the input ends: two of three
    assert done.code == 0
    assert "1 of 3: He [go] to school." in done.out
    assert "no: have. I have." in done.out
    assert done.error == "1 of 2 right"
    assert [each["answer"] for each in json.loads(cli("tutor", "practice", "--json").out)["due"]] == ["cats", "have"]
    done = cli("tutor", "practice", "--deck", tmp_path / "none.json")
    assert "nothing is due; tutor correct --keep" in done.error
    assert "go together" in cli("tutor", "practice", "--make", "3").error
    assert "at least 1" in cli("tutor", "practice", "--count", "0").error


def _said(edit: Edit) -> dict[str, str]:
    return {name: getattr(edit, name) for name in ("before", "after", "rule", "level")}


@pytest.mark.slow
def test_the_real_model_gives_edits_that_reproduce() -> None:
    gemma = Gemma.load(support.gguf_path(), progress=False)
    found = Corrector(gemma, max_new_tokens=200)(TEXT)
    assert apply(TEXT, found.edits) == found.corrected
