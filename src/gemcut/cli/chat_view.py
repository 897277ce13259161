"""How an answer appears while it streams: as plain text, or as Markdown whose finished blocks stay as they are."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import ControlType, Segment
from rich.text import Text

from gemcut.cli.output import safe

_FENCE = re.compile(r"\s*(`{3,}|~{3,})")
_SECONDS_BETWEEN_DRAWINGS = 1 / 12
# Control codes, which rich writes as they are and counts as no width. It names no kind for these; any kind will do.
_WRAP_OFF, _WRAP_ON = (Segment(code, None, [(ControlType.BELL,)]) for code in ("\x1b[?7l", "\x1b[?7h"))


class View(Protocol):
    """Something an answer is written to."""

    def __enter__(self) -> View: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def write(self, piece: str) -> None:
        """Show the next piece of the answer."""


class PlainView:
    """The text as it comes."""

    def __init__(self, console: Console) -> None:
        self._file = console.file

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.write("\n")
        self._file.flush()

    def write(self, piece: str) -> None:
        """Show the next piece of the answer."""
        self._file.write(safe(piece))
        self._file.flush()


class MarkdownView:
    """Markdown while it streams.

    Only the block that is being written is drawn again and again, and of it no more than fits the screen; a block
    that is finished is printed for good. So a long answer neither flickers nor costs more with its length.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._blocks = BlockSplitter()
        self._live = Live(Text("…", style="dim"), console=console, auto_refresh=False, transient=True)
        self._drawn = 0.0
        self._printed = False

    def __enter__(self) -> MarkdownView:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.update(Text(""))
        self._live.stop()
        self._print(self._blocks.tail)

    def write(self, piece: str) -> None:
        """Show the next piece of the answer."""
        for block in self._blocks.feed(safe(piece)):
            with self._console:  # one write to the terminal, so that nothing is seen to blink
                self._live.update(Text(""), refresh=True)
                self._print(block)
        now = time.monotonic()
        if now - self._drawn >= _SECONDS_BETWEEN_DRAWINGS:
            self._live.update(_Block(self._blocks.tail, gap=self._printed, tail=True), refresh=True)
            self._drawn = now

    def _print(self, block: str) -> None:
        if block.strip():
            self._console.print(_Block(block, gap=self._printed))
            self._printed = True


class ModelMarkdown(Markdown):
    """Markdown of a model: HTML is shown as it is written (rich drops it), links show where they lead."""

    def __init__(self, markup: str) -> None:
        super().__init__(markup, code_theme="ansi_dark", hyperlinks=False)
        self.parsed = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(markup)


class BlockSplitter:
    """Cuts growing Markdown at places where what stands before can no longer change.

    That is a blank line outside a code fence, unless an indented line follows (it belongs to the list above), and
    both ends of a code fence. ``tail`` is the block that is not finished.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._partial = ""
        self._fence = ""
        self._blank = False

    @property
    def tail(self) -> str:
        """Text of the block that is being written."""
        return "".join(self._lines) + self._partial

    def feed(self, text: str) -> Iterator[str]:
        """Take more text; give the blocks that are finished with it."""
        *whole, self._partial = (self._partial + text).split("\n")
        for line in whole:
            yield from self._line(line + "\n")
        if self._blank and not self._fence and self._partial and not self._partial[0].isspace():
            self._blank = False  # the first character of the next line is enough to know
            yield self._cut()

    def _line(self, line: str) -> Iterator[str]:
        mark = _FENCE.match(line)
        if self._fence:
            self._lines.append(line)
            if mark and mark.group(1).startswith(self._fence) and not line.strip().strip(self._fence[0]):
                self._fence = ""
                if not line[0].isspace():
                    yield self._cut()
            return
        if not line.strip():
            self._blank = bool(self._lines)
            self._lines += [line] if self._lines else []
            return
        if self._lines and not line[0].isspace() and (self._blank or mark):
            yield self._cut()
        self._blank = False
        if mark:
            self._fence = mark.group(1)
        self._lines.append(line)

    def _cut(self) -> str:
        block = "".join(self._lines)
        self._lines.clear()
        return block


class _Block:
    """One block, an empty line before it if ``gap``; of a block that is being written (``tail``) the last lines."""

    def __init__(self, markup: str, *, gap: bool, tail: bool = False) -> None:
        self._markup, self._gap, self._tail = markup, gap, tail

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        markup, room = self._markup, max(1, console.size.height - 3)
        lines = markup.split("\n")
        if self._tail and len(lines) > room and _FENCE.match(lines[0]):  # what is off the screen is not even parsed
            markup = "\n".join([lines[0], *lines[-room:]])
        rendered = console.render_lines(ModelMarkdown(markup), options, pad=False)
        while rendered and _is_blank(rendered[-1]):  # rich puts empty lines around some blocks
            del rendered[-1]
        while rendered and _is_blank(rendered[0]):
            del rendered[0]
        if (
            self._tail
        ):  # drawn over later, so every line must take one row, whatever width the terminal gives its letters
            yield _WRAP_OFF
        if self._gap:
            yield Segment.line()
        for line in rendered[-room:] if self._tail else rendered:
            yield from line
            yield Segment.line()
        if self._tail:
            yield _WRAP_ON


def _is_blank(line: list[Segment]) -> bool:
    return not any(segment.text.strip() for segment in line)
