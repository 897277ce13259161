"""Detokenizer: token ids one at a time to pieces of text that never have to be taken back."""

from __future__ import annotations

from collections.abc import Sequence

from gemcut.errors import ParameterError
from gemcut.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns the tokens of one generation into text as they come.

    The pieces of `push` and `finish`, joined, are ``tokenizer.decode`` of all pushed ids, up to the first stop string.
    A run of byte tokens is held back until a token that is no byte follows, since one bad byte spoils the decoding of
    its whole run; the end of the text is held back while it may grow into a stop string. Work per token is constant.

    Attributes:
        stopped: the stop string that was found, or None. After it nothing is emitted.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        """Start a new text.

        Args:
            tokenizer: the tokenizer the ids belong to.
            prompt_ids: the prompt, which is not emitted. It matters where it ends within a character: the first bytes
                of the answer then complete that character.
            stop: strings that end the text; of several the one complete first counts, and then the longest.
                The text of a special token (``<end_of_turn>``) works too, though that token is never shown.
            skip_special_tokens: leave special tokens out of the text.

        Raises:
            ParameterError: a stop string is empty or not a str.
        """
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._run = bytearray()
        self._prompt_bytes = _open_bytes(tokenizer, prompt_ids)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        self._stops = _StopStrings(stops)
        self._stop_tokens = {token_id: s for s in stops if (token_id := tokenizer.token_to_id(s)) in self._skipped}

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is now certain ("" while a character or stop string is open).

        Raises:
            ParameterError: the id is negative or beyond 32 bits. One that the vocabulary lacks adds "".
        """
        if self.stopped is not None:
            return ""
        if token_id in self._skipped:
            if token_id not in self._stop_tokens:
                return ""
            text = self.finish()
            self.stopped = self.stopped or self._stop_tokens[token_id]
            return text
        byte = self._tokenizer.byte_value(token_id)
        if byte is not None:
            self._run.append(byte)
            return ""
        text = self._tokenizer.token_text(token_id)
        if self._run or self._prompt_bytes:
            text = self._close_run() + text
        return self._emit(text)

    def finish(self) -> str:
        """The rest of the text: bytes that never became a character as U+FFFD, and what could have been a stop."""
        if self.stopped is not None:
            return ""
        text = self._emit(self._close_run())
        return text if self.stopped is not None else text + self._stops.release()

    def _emit(self, text: str) -> str:
        text, self.stopped = self._stops.feed(text)
        return text

    def _close_run(self) -> str:
        """Text of the finished run of byte tokens: all of it valid UTF-8, or one U+FFFD a byte as in decode."""
        run, before = bytes(self._run), self._prompt_bytes
        self._run.clear()
        self._prompt_bytes = b""
        if not run:
            return ""
        for whole in (before + run, run):
            try:
                return whole.decode()
            except UnicodeDecodeError:
                continue
        return "\N{REPLACEMENT CHARACTER}" * len(run)


class _StopStrings:
    """Finds the first of several strings in a text that comes in pieces, holding back what may still become one.

    Every string is followed by its own Knuth-Morris-Pratt automaton, so the result does not depend on how the text
    was cut, and a character costs a constant amount of work for each string.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        for string in strings:
            if not isinstance(string, str) or not string:
                raise ParameterError(f"stop string is {string!r}; expected a text of one character or more")
        # The longest first: of two that end at the same character the longest is reported.
        self._strings = sorted(set(strings), key=lambda string: (-len(string), string))
        self._fallbacks = [_borders(string) for string in self._strings]
        self._matched = [0] * len(self._strings)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text that is certain, the stop string found or None)."""
        if not self._strings:
            return text, None
        buffer = self._held + text
        for position, character in enumerate(text, len(self._held) + 1):
            for n, string in enumerate(self._strings):
                matched = self._matched[n]
                while matched and string[matched] != character:
                    matched = self._fallbacks[n][matched - 1]
                matched += string[matched] == character
                if matched == len(string):
                    self._held = ""
                    return buffer[: position - matched], string
                self._matched[n] = matched
        certain = len(buffer) - max(self._matched)
        self._held = buffer[certain:]
        return buffer[:certain], None

    def release(self) -> str:
        """What is held back, once it is known that no more text comes."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._strings)
        return held


def _borders(string: str) -> list[int]:
    """For each prefix the length of its longest proper prefix that is also its suffix."""
    lengths = [0] * len(string)
    matched = 0
    for i in range(1, len(string)):
        while matched and string[i] != string[matched]:
            matched = lengths[matched - 1]
        matched += string[i] == string[matched]
        lengths[i] = matched
    return lengths


def _open_bytes(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bytes:
    """The bytes at the prompt's end that begin a character without finishing it; a character has four at most."""
    tail = bytearray()
    for token_id in reversed(prompt_ids[-3:]):
        byte = tokenizer.byte_value(token_id)
        if byte is None:
            break
        tail.insert(0, byte)
    for start in range(len(tail)):
        try:
            bytes(tail[start:]).decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return bytes(tail[start:])
    return b""
