"""Streamers: objects that ``generate`` hands the prompt's tokens, then each new one, then the end.

The protocol is transformers' (``put(tensor)``, ``end()``), so its streamers work with gemcut's model too.
"""

from __future__ import annotations

from queue import Queue
from typing import Any

from gemcut.errors import ParameterError
from gemcut.hf.common import Refusal, refuse
from gemcut.hf.encoding import id_lists
from gemcut.hf.vocabulary import Vocabulary
from gemcut.text import Detokenizer

_DECODE: dict[str, Refusal] = {"clean_up_tokenization_spaces": ((False,), "Gemma's spaces are exact")}


class TextStreamer:
    """Prints text as soon as it is certain: no half characters. For one sequence at a time.

    Args:
        tokenizer: from ``AutoTokenizer.from_pretrained``.
        skip_prompt: leave the prompt out.
        skip_special_tokens: leave special tokens out, as in ``decode``.
    """

    def __init__(
        self, tokenizer: Vocabulary, skip_prompt: bool = False, *, skip_special_tokens: bool = False, **others: Any
    ) -> None:
        refuse(type(self).__name__, others, _DECODE)
        if not isinstance(tokenizer, Vocabulary):
            raise ParameterError(
                f"{type(self).__name__} was given {type(tokenizer).__name__}; expected gemcut's AutoTokenizer"
            )
        self.tokenizer, self.skip_prompt = tokenizer, skip_prompt
        self.skip_special_tokens = skip_special_tokens
        self._text: Detokenizer | None = None

    def put(self, value: Any) -> None:
        """Take tokens: first the whole prompt [1, T] or [T], then the new ones, [1] each."""
        rows = id_lists(value)
        if rows and isinstance(rows[0], list):
            if len(rows) > 1:
                raise ParameterError(f"{type(self).__name__} shows one sequence; it was given {len(rows)}")
            rows = rows[0]
        if self._text is None:
            hidden = rows if self.skip_prompt else ()
            self._text = Detokenizer(
                self.tokenizer.tokenizer, prompt_ids=hidden, skip_special_tokens=self.skip_special_tokens
            )
            if self.skip_prompt:
                return
        text = "".join(self._text.push(token) for token in rows)
        if text:
            self.on_finalized_text(text)

    def end(self) -> None:
        """Show what is left; the streamer is then ready for another answer."""
        rest = self._text.finish() if self._text is not None else ""
        self._text = None
        self.on_finalized_text(rest, stream_end=True)

    def fail(self, error: BaseException) -> None:
        """Forget the answer that ``generate`` could not finish."""
        self._text = None

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print ``text``; a subclass may do something else with it."""
        print(text, flush=True, end="\n" if stream_end else "")


class TextIteratorStreamer(TextStreamer):
    """Text as an iterator, for ``generate`` in another thread. If ``generate`` fails, the iterator raises its error.

    Args:
        tokenizer, skip_prompt, skip_special_tokens: as for `TextStreamer`.
        timeout: longest wait in seconds for the next piece, then ``queue.Empty``; None waits for ever.
    """

    def __init__(
        self,
        tokenizer: Vocabulary,
        skip_prompt: bool = False,
        timeout: float | None = None,
        *,
        skip_special_tokens: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=skip_special_tokens, **others)
        self.timeout = timeout
        self.text_queue: Queue[str | BaseException | None] = Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand ``text`` to the iterator."""
        self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(None)

    def fail(self, error: BaseException) -> None:
        """Let the iterator raise ``error``; ``generate`` calls this when it cannot go on."""
        super().fail(error)
        self.text_queue.put(error)

    def __iter__(self) -> TextIteratorStreamer:
        return self

    def __next__(self) -> str:
        """The next piece of text."""
        item = self.text_queue.get(timeout=self.timeout)
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item
