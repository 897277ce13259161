"""Markdown while it streams: nothing lost, nothing twice, bounded work on the screen."""

from __future__ import annotations

import io
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gemcut.cli.chat_view import BlockSplitter, MarkdownView, PlainView

SAMPLE = """# Title

A paragraph with `code`, **bold** and <b>html</b>,
on two lines.

1. one
2. two

   still two
3. three

```python
def f():

    return "# not a title"
```
Right after the fence.

- a
  ```
  inside a list

  more
  ```
- b

| x | y |
|---|---|
| 1 | 2 |

The end"""


def pieces_of(text: str, seed: int) -> list[str]:
    generator = random.Random(seed)
    pieces = []
    while text:
        size = generator.randint(1, 9)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def test_blocks_are_cut_where_they_are_finished() -> None:
    splitter = BlockSplitter()
    blocks = [block for piece in pieces_of(SAMPLE, 0) for block in splitter.feed(piece)]
    firsts = [block.splitlines()[0] for block in [*blocks, splitter.tail]]
    assert firsts == [
        "# Title",
        "A paragraph with `code`, **bold** and <b>html</b>,",
        "1. one",
        "```python",
        "Right after the fence.",
        "- a",
        "| x | y |",
        "The end",
    ]
    assert blocks[2] == "1. one\n2. two\n\n   still two\n3. three\n\n"
    assert blocks[3].endswith('    return "# not a title"\n```\n')
    assert "more" in blocks[5]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="a `~-1.#|\n\t", max_size=80), st.integers(0, 1000))
def test_no_character_but_blank_lines_between_blocks_is_lost(text: str, seed: int) -> None:
    splitter = BlockSplitter()
    blocks = [block for piece in pieces_of(text, seed) for block in splitter.feed(piece)]
    joined = "".join([*blocks, splitter.tail])
    assert [line for line in joined.split("\n") if line.strip()] == [line for line in text.split("\n") if line.strip()]
    whole = BlockSplitter()
    assert [*whole.feed(text)] == blocks  # however the text comes


def show(pieces: list[str], *, terminal: bool, height: int = 24) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=60, height=height, color_system=None, highlight=False)
    with MarkdownView(console) as view:
        for piece in pieces:
            view.write(piece)
    return file.getvalue()


class Screen:
    """As much of a terminal as the view uses: text, line feeds, cursor up, erase line."""

    def __init__(self) -> None:
        self.lines: list[str] = [""]
        self.row = self.column = 0

    def feed(self, data: str) -> None:
        index = 0
        while index < len(data):
            character = data[index]
            index += 1
            if character == "\x1b":
                end = index + 1
                while not data[end].isalpha():
                    end += 1
                self._control(data[index + 1 : end], data[end])
                index = end + 1
            elif character == "\n":
                self.row, self.column = self.row + 1, 0
                if self.row == len(self.lines):
                    self.lines.append("")
            elif character == "\r":
                self.column = 0
            else:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
                self.column += 1

    def _control(self, numbers: str, kind: str) -> None:
        if kind == "A":
            self.row -= int(numbers or 1)
            assert self.row >= 0
        elif kind == "K":
            self.lines[self.row] = ""
        else:
            assert kind in "hl", f"unexpected control sequence {kind!r}"


@pytest.mark.parametrize("seed", range(5))
def test_what_stays_on_the_screen_is_what_is_printed_without_one(seed: int) -> None:
    screen = Screen()
    screen.feed(show(pieces_of(SAMPLE, seed), terminal=True))
    shown = "\n".join(line.rstrip() for line in screen.lines).rstrip("\n")
    plain = "\n".join(line.rstrip() for line in show([SAMPLE], terminal=False).split("\n")).rstrip("\n")
    assert shown == plain
    for text in ("<b>html</b>", "on two lines.", "still two", '"# not a title"', "inside a list", "The end"):
        assert shown.count(text) == 1


def test_a_long_block_draws_no_more_than_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemcut.cli.chat_view._SECONDS_BETWEEN_DRAWINGS", 0.0)  # draw every piece
    lines = [f"line {i}\n" for i in range(200)]
    data = show(["```\n", *lines, "```\n"], terminal=True, height=10)
    ups = data.split("line 199")[0].count("\x1b[1A")
    assert ups <= 203 * 10
    screen = Screen()
    screen.feed(data)
    assert [line.strip() for line in screen.lines if line.strip()] == [line.strip() for line in lines]


def test_control_characters_of_the_model_do_not_reach_the_terminal() -> None:
    for view in (MarkdownView, PlainView):
        file = io.StringIO()
        with view(Console(file=file, force_terminal=False, width=60)) as shown:
            shown.write("a\x1b]0;title\x07b\x1b[2J\x9b31m")
        assert not set(file.getvalue()) & {"\x1b", "\x07", "\x9b"}
        assert "a]0;titleb[2J31m" in file.getvalue()


def test_links_show_where_they_lead() -> None:
    text = show(["[bank](https://evil.example)"], terminal=True)
    assert "https://evil.example" in text
    assert "\x1b]8" not in text
