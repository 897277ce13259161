"""Answers that follow a grammar: compiled grammars, and the masks of tokens that may come next.

    Grammars.edit -> GrammarEdit, which the engine asks before each choice -> a job -> [thread: matcher -> mask]

llguidance matches. A mask is computed by a thread of its own while the network works: the engine tells the edit each
token as soon as it is chosen (``begin``), and the edit's call waits only where the mask is not ready by then. Setting
up llguidance's view of a vocabulary takes seconds and is done once, by a worker, when a grammar is first asked for.
That worker holds Python's lock for a second or two of it, so a server does it before it is ready (``prepare``).
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemcut.engine.grammar import Grammar
from gemcut.engine.masks import GrammarEdit, Masks
from gemcut.errors import ParameterError, UnsupportedError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from gemcut.engine.closing import Closer

#: Seconds of a processor that compiling a grammar may take, and of waiting for it (on a busy machine, behind others).
TIME_LIMIT = 1.0
WAIT_LIMIT = 20.0
#: Compiled grammars that are kept, and bytes that they may take together, as far as their size is known.
MOST_KEPT = 128
MOST_BYTES = 256 << 20
#: White space between JSON's tokens is at most so long: a model that falls into spaces gets no further with them.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,8}"
#: What llguidance may spend. Its own numbers, beside the states of lexers: they are memory, 1 to 2 KB each.
_LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
_OPTIONS = {"whitespace_pattern": WHITESPACE, "lenient": False}
_GUIDANCE = {"x-guidance": _OPTIONS}
_TEXT_OR_JSON = r"""start: text | json
text: /([^{\[](.|\n)*)?/
json: %json """
# Compiled, a schema takes some 50 times its text, and its lexer's first states.
_EXPANSION, _FLOOR = 50, 100_000
#: Members of a schema that say nothing of the answer.
_NOTES = ("title", "description", "examples", "default", "$schema", "$id", "$comment")


@dataclass(frozen=True)
class Vocabulary:
    """What grammars must know of a model's tokens.

    Attributes:
        tokens: the bytes of each of the V tokens; b"" for an id that stands for nothing.
        special: ids of special tokens, which no grammar's text may hold.
        bos_id, end_id: ``<bos>``, and a token that ends answers.
        encode: token ids of a text, no special tokens read in it.
    """

    tokens: list[bytes]
    special: frozenset[int]
    bos_id: int
    end_id: int
    encode: Callable[[str], list[int]]


@dataclass(frozen=True, eq=False)
class Compiled:
    """A grammar over one vocabulary.

    Attributes:
        matcher: at the answer's beginning; it is only ever copied.
        json: whether the answer is JSON; ``or_words``: or words.
        shortest: tokens of the shortest answer that was found; None where none was.
        growth: about how many tokens longer one token can make the way to the end.
    """

    matcher: LLMatcher
    json: bool
    or_words: bool
    shortest: int | None
    growth: int
    nbytes: int

    @property
    def reserve(self) -> int:
        """With so many tokens left the way to the end is looked at."""
        return (self.shortest or 0) + 2 * self.growth + 8


@dataclass(frozen=True)
class _Setup:
    tokenizer: LLTokenizer
    tokens: list[bytes]
    closer: Closer
    end_id: int


class Grammars:
    """Compiles grammars for one vocabulary and keeps them. Any thread may call its methods."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        """``vocabulary`` is called once, by a worker."""
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._setup: Future[_Setup] | None = None
        self._kept: OrderedDict[Grammar, Compiled] = OrderedDict()
        self._under_way: dict[Grammar, Future[Compiled]] = {}
        #: Of what is being compiled: its thread's clock of processor time, and what that showed at the beginning.
        self._clocks: dict[Grammar, tuple[int, float]] = {}
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="gemcut-grammar")
        self._masks: Masks | None = None

    def prepare(self) -> None:
        """Set everything up that does not depend on a grammar, which takes seconds, and wait for it.

        Raises:
            UnsupportedError: llguidance is not installed.
        """
        self._begin_setup().result()

    def compile(self, grammar: Grammar) -> Compiled:
        """The grammar, compiled; a kept one at once.

        Raises:
            UnsupportedError: llguidance is not installed.
            ParameterError: the grammar is invalid, asks for what llguidance lacks, or takes too long.
        """
        kept = self._find(grammar)
        if kept is not None:
            return kept
        setup = self._begin_setup().result()
        with self._lock:
            future = self._under_way.get(grammar)
            if future is None:
                future = self._under_way[grammar] = self._workers.submit(self._make, setup, grammar)
        return self._wait(grammar, future)

    def _wait(self, grammar: Grammar, future: Future[Compiled]) -> Compiled:
        """The result, within the limits. On a busy machine a valid grammar may need long, but little of a processor."""
        latest = time.monotonic() + WAIT_LIMIT
        while time.monotonic() < latest:
            done, _ = wait([future], timeout=min(0.05, TIME_LIMIT))
            if done:
                return future.result()
            with self._lock:
                clock = self._clocks.get(grammar)
                if clock is not None and time.clock_gettime(clock[0]) - clock[1] >= TIME_LIMIT:
                    break
        raise ParameterError(
            f"the {grammar.kind} grammar takes longer than {TIME_LIMIT:g} s to compile; give a simpler one"
        )

    async def acompile(self, grammar: Grammar) -> Compiled:
        """`compile` for asyncio: other tasks run meanwhile."""
        kept = self._find(grammar)
        return kept if kept is not None else await asyncio.to_thread(self.compile, grammar)

    def edit(self, grammar: Grammar, stop_ids: frozenset[int], max_new_tokens: int) -> GrammarEdit:
        """What the engine asks for the masks of one request. Compiles the grammar if need be, and raises as `compile`.

        Args:
            grammar: what the answer must match.
            stop_ids: tokens that end the answer; they alone may come at the grammar's end.
            max_new_tokens: most tokens of the answer, by which it is closed.
        """
        compiled = self.compile(grammar)
        setup = self._begin_setup().result()
        ends = [i for i in sorted(stop_ids) if 0 <= i < setup.tokenizer.vocab_size]
        if not ends:
            raise ParameterError("a grammar needs a stop token with which the answer can end; this request has none")
        with self._lock:
            if self._masks is None:
                self._masks = Masks(setup.tokens, setup.end_id, setup.closer)
        return GrammarEdit(self._masks, compiled, ends, max_new_tokens, lambda: self._forget(grammar, compiled))

    def _begin_setup(self) -> Future[_Setup]:
        if importlib.util.find_spec("llguidance") is None:
            raise UnsupportedError("a grammar needs the library llguidance: pip install 'gemcut[grammar]'")
        with self._lock:
            setup = self._setup
            if setup is None or (setup.done() and setup.exception() is not None):
                setup = self._setup = self._workers.submit(_set_up, self._vocabulary)
            return setup

    def _find(self, grammar: Grammar) -> Compiled | None:
        with self._lock:
            found = self._kept.get(grammar)
            if found is not None:
                self._kept.move_to_end(grammar)
            return found

    def _make(self, setup: _Setup, grammar: Grammar) -> Compiled:
        """Compile and keep. All of it is the worker's: a callback of its Future runs wherever that was made, if it is
        done by then, and there the lock is held."""
        if hasattr(time, "pthread_getcpuclockid"):  # else the limit is one of waiting alone
            clock = time.pthread_getcpuclockid(threading.get_ident())
            with self._lock:
                self._clocks[grammar] = clock, time.clock_gettime(clock)
        try:
            made = _compile(setup, grammar)
        except BaseException:
            with self._lock:
                del self._under_way[grammar]
                self._clocks.pop(grammar, None)
            raise
        with self._lock:
            del self._under_way[grammar]
            self._clocks.pop(grammar, None)
            self._kept[grammar] = made
            while len(self._kept) > MOST_KEPT or (
                len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > MOST_BYTES
            ):
                self._kept.popitem(last=False)
        return made

    def _forget(self, grammar: Grammar, compiled: Compiled) -> None:
        """Copies of a matcher share its lexer's states; one that has too many is of no more use."""
        with self._lock:
            if self._kept.get(grammar) is compiled:
                del self._kept[grammar]


class _Words:
    """A vocabulary in the form in which llguidance asks for it."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.eos_token_id, self.bos_token_id = vocabulary.end_id, vocabulary.bos_id
        self.special_token_ids = sorted(vocabulary.special)
        self._encode = vocabulary.encode
        self._bytes = {text[0]: i for i, text in enumerate(vocabulary.tokens) if len(text) == 1}

    def __call__(self, text: str) -> list[int]:
        ids = self._encode(text)
        if all(i < len(self.tokens) for i in ids):
            return ids
        # The tokenizer knows tokens that the model lacks.
        return [self._bytes[byte] for byte in text.encode() if byte in self._bytes]


def _set_up(vocabulary: Callable[[], Vocabulary]) -> _Setup:
    from llguidance import LLTokenizer

    from gemcut.engine.closing import Closer

    found = vocabulary()
    words: Any = _Words(found)
    tokenizer = LLTokenizer(words, slices=LLTokenizer.json_slices())
    return _Setup(tokenizer, found.tokens, Closer(found.tokens, found.special), found.end_id)


def _compile(setup: _Setup, grammar: Grammar) -> Compiled:
    from llguidance import LLMatcher, LLParserLimits

    try:
        if grammar.kind == "regex":
            text = LLMatcher.grammar_from_regex(grammar.source)
        elif grammar.kind == "lark":
            text = LLMatcher.grammar_from_lark(grammar.source)
        elif grammar.kind == "json_or_text":
            text = LLMatcher.grammar_from_lark(_TEXT_OR_JSON + json.dumps(json.loads(grammar.source) | _GUIDANCE))
        else:
            options: Any = _OPTIONS
            text = LLMatcher.grammar_from_json_schema(grammar.source or '{"type":"object"}', overrides=options)
    except ValueError as error:
        raise _refusal(grammar, str(error)) from None
    limits: dict[str, Any] = _LIMITS
    matcher = LLMatcher(setup.tokenizer, text, log_level=0, limits=LLParserLimits(**limits))
    if not matcher.is_error():
        mask = matcher.compute_bitmask()  # the first states of the lexer, for all copies
        if not matcher.is_error() and not any(mask):
            raise _refusal(grammar, "it allows no answer")
    if matcher.is_error():
        raise _refusal(grammar, matcher.get_error())
    way = setup.closer.way(matcher)
    return Compiled(
        matcher=matcher,
        json=grammar.kind.startswith("json"),
        or_words=grammar.kind == "json_or_text",
        shortest=None if way is None else len(way),
        growth=_growth(grammar),
        nbytes=_FLOOR + _EXPANSION * len(grammar.source),
    )


def _refusal(grammar: Grammar, words: str) -> ParameterError:
    what = "the JSON schema" if grammar.kind in ("json_schema", "json_or_text") else f"the {grammar.kind} grammar"
    lines = words.split("<backtrace>")[0].split("<state>")[0].split()
    shown = " ".join(lines)
    return ParameterError(f"{what} cannot be used: {shown if len(shown) <= 300 else shown[:300] + '…'}")


def _growth(grammar: Grammar) -> int:
    """About how many tokens one token can add to the way to the end: opening a member demands what that requires.

    Counted are the names and values of the whole schema that must be written at most, two bytes a token.
    """
    if grammar.kind not in ("json_schema", "json_or_text"):
        return 8
    return max(8, min(_least_bytes(json.loads(grammar.source)) // 2, 256))


def _least_bytes(schema: Any) -> int:
    if isinstance(schema, list):
        return max((_least_bytes(each) for each in schema), default=0)
    if not isinstance(schema, dict):
        return 0
    total = 2
    for key, value in schema.items():
        if key == "properties" and isinstance(value, dict):
            total += sum(len(name.encode()) + 4 + _least_bytes(each) for name, each in value.items())
        elif key == "prefixItems" and isinstance(value, list):
            total += sum(1 + _least_bytes(each) for each in value)
        elif key in ("const", "enum"):
            choices = value if key == "enum" and isinstance(value, list) else [value]
            total += max((len(json.dumps(each)) for each in choices), default=0)
        elif key in ("minLength", "minItems", "minProperties") and isinstance(value, int):
            total += min(max(value, 0), 512)
        elif key in ("pattern", "format"):
            total += len(str(value))
        elif key in ("$defs", "definitions") and isinstance(value, dict):
            total += max(map(_least_bytes, value.values()), default=0)
        elif isinstance(value, (dict, list)) and key not in _NOTES:
            total += _least_bytes(value)
    return total


def make_vocabulary(
    texts: Sequence[bytes], size: int, special: frozenset[int], bos_id: int, ends: frozenset[int], encode: Any
) -> Vocabulary:
    """The first ``size`` tokens of a tokenizer, which may know more or fewer than the model.

    Raises ParameterError where none of ``ends`` is among them.
    """
    tokens = [*texts[:size], *([b""] * (size - len(texts)))]
    known = sorted(i for i in ends if 0 <= i < size)
    if not known:
        raise ParameterError("a grammar needs a stop token with which the answer can end; this model has none")
    inside = frozenset(i for i in special if i < size)
    bos = bos_id if 0 <= bos_id < size else known[0]
    return Vocabulary(tokens, inside | frozenset(known), bos, known[-1], encode)
