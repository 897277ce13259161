"""gemcut write: a file's prompt, variants as Gemma.chat gives them, code taken out of answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.conftest import Cli, cli  # noqa: F401
from gemcut import Gemma
from gemcut.cli.options import LoadOptions
from gemcut.errors import ParameterError
from gemcut.uses.write import KINDS, extract_code, write_messages
from server.host import NAME, new_gemma


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    return new_gemma()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_what_was_asked_for(kind: str) -> None:
    (message,) = write_messages(kind, "a {tone} river", tone="warm")
    assert "a {tone} river" in message["content"]  # braces of the user stay
    assert "The tone is warm." in message["content"]
    (plain,) = write_messages(kind, "a river")
    assert "tone" not in plain["content"]
    assert "{" not in plain["content"]


def test_what_cannot_be_written() -> None:
    for given, said in [(("novel", "x"), "expected one of poem"), (("poem", " "), "about is empty")]:
        with pytest.raises(ParameterError, match=said):
            write_messages(*given)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Here:\n```python\nprint(1)\n```\nDone.", "print(1)\n"),
        ("~~~\na\n```\nb\n~~~", "a\n```\nb\n"),
        ("````\n```\n````\n", "```\n"),
        ("```sh\nended by its length", "ended by its length"),
        ("```\none\n```\n```\ntwo\n```", "one\n"),
        ("no code, `x` alone", None),
    ],
)
def test_code_in_an_answer(text: str, code: str | None) -> None:
    assert extract_code(text) == code


def test_the_command(cli: Cli, gemma: Gemma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(LoadOptions, "load", lambda self, name, **_: gemma)
    more = ("-m", NAME, "-n", "6", "--seed", "3", "--about", "rain")
    messages = write_messages("poem", "rain", tone="sad")
    right = gemma.chat(messages, max_new_tokens=6, seed=3, n=2)
    assert right[0] != right[1]
    assert cli("write", "poem", *more, "--tone", "sad").out == f"{right[0]}\n"
    found = json.loads(cli("write", "poem", *more, "--tone", "sad", "--variants", "2", "--json").out)
    assert found == {"kind": "poem", "about": "rain", "tone": "sad", "texts": right}
    both = cli("write", "poem", *more, "--tone", "sad", "--variants", "2").out
    assert both == "".join(f"--- {place} of 2 ---\n{text.strip()}\n" for place, text in enumerate(right, 1))
    assert "no block of code" in cli("write", "code", *more, "-x").error
    assert "drop --variants" in cli("write", "code", *more, "-x", "--variants", "2").error
    assert "expected 1 to 16" in cli("write", "code", *more, "--variants", "0").error
    assert "expected one of poem" in cli("write", "novel", *more).error
    monkeypatch.setattr(Gemma, "chat", lambda self, messages, **given: ["So:\n```\nprint(1)\n```\n"])
    assert cli("write", "code", *more, "-x").out == "print(1)\n"
