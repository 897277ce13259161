"""Guard: asks the judges about a text, compares with the policies' thresholds, and decides. Any thread may use it.

A text is judged as it is, and again as it reads once hidden characters, look-alike letters and base64 are undone: the
higher score counts.
"""

from __future__ import annotations

import base64
import binascii
import re
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Literal

from gemcut.errors import GemcutError, ParameterError
from gemcut.safety.guard_file import MODES, GuardFile, Mode
from gemcut.safety.judge import Judge, JudgeError, score_all
from gemcut.safety.lexicon import Lexicon
from gemcut.safety.linear import LinearJudge
from gemcut.text.invisible import strip_invisible

Side = Literal["input", "output"]
#: Judges that answer within a millisecond, and are asked in the caller's own thread.
_QUICK = (Lexicon, LinearJudge)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{16,}={0,2}")
_MOST_DECODED = 1 << 16


@dataclass(frozen=True)
class Decision:
    """What a guard says of one text.

    Attributes:
        scores: of each policy that was asked for and could be judged.
        flagged: policies whose score reached its threshold.
        failed: why judges could not judge, one line each; () where all did.
        blocked: whether the text may not pass.
        seconds: what it took.
    """

    scores: dict[str, float] = field(default_factory=dict)
    flagged: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    blocked: bool = False
    seconds: float = 0.0

    @property
    def category(self) -> str:
        """What it was blocked or flagged for, in a word or some."""
        return ",".join(self.flagged) or ("judge-failed" if self.failed else "")

    def report(self, known: Sequence[str]) -> dict[str, object]:
        """As /v1/moderations gives it."""
        return {
            "flagged": bool(self.flagged),
            "categories": {name: name in self.flagged for name in known},
            "category_scores": {name: self.scores.get(name) for name in known},
            "failed": list(self.failed),
        }


class Guard:
    """The judges of one guard file."""

    def __init__(self, file: GuardFile, judges: Sequence[tuple[Judge, Sequence[str]]]) -> None:
        """``judges``: each with the policies it is asked about. Raises ParameterError for a policy without a judge."""
        self.file, self._judges = file, list(judges)
        judged = {name for _, names in judges for name in names}
        for name in (*file.input, *file.output):
            if name not in judged:
                raise ParameterError(f"no judge scores the policy {name}; name one in [[judge]], or drop the policy")
        self._slow = ThreadPoolExecutor(16, thread_name_prefix="judge")
        self._lock = threading.Lock()
        self._seconds: deque[float] = deque(maxlen=4096)
        self.checks = self.blocks = self.failures = 0

    @property
    def quick(self) -> bool:
        """Whether a check takes about a millisecond, so that an event loop may do it itself."""
        return all(isinstance(judge, _QUICK) for judge, _ in self._judges)

    def policies(self, side: Side) -> tuple[str, ...]:
        """The policies of prompts or of answers."""
        return self.file.input if side == "input" else self.file.output

    def mode(self, asked: str | None = None) -> Mode:
        """The mode of a request that asks for one. Raises ParameterError where that is unknown or below the file's."""
        if asked is None:
            return self.file.mode
        if asked not in MODES:
            raise ParameterError(f"moderation mode is {asked!r}; expected one of {', '.join(MODES)}")
        if MODES.index(asked) < MODES.index(self.file.mode):
            raise ParameterError(
                f"moderation mode is {asked!r}, below this server's {self.file.mode!r}: a request can raise it alone"
            )
        return asked

    def check(self, side: Side, text: str, *, prompt: str | None = None, mode: Mode | None = None) -> Decision:
        """Judge a text: a whole prompt, or an answer as far as it is known with the ``prompt`` it answers.

        Never raises for a judge that fails: ``failed`` says it, and in mode "block" the file's ``on_failure`` decides.
        """
        mode = mode or self.file.mode
        wanted = self.policies(side)
        if mode == "off" or not wanted or not text.strip():
            return Decision()
        started = time.perf_counter()
        scores, failed = self._ask(plainer(text), wanted, prompt)
        flagged = tuple(name for name in wanted if scores.get(name, -1.0) >= self.file.policies[name].threshold)
        missing = bool(failed) and self.file.on_failure == "block"
        blocked = mode == "block" and (bool(flagged) or missing)
        seconds = time.perf_counter() - started
        with self._lock:
            self.checks += 1
            self.blocks += blocked
            self.failures += bool(failed)
            self._seconds.append(seconds)
        return Decision(scores, flagged, tuple(failed), blocked, seconds)

    def scores(self, text: str, policies: Sequence[str], *, prompt: str | None = None) -> dict[str, float]:
        """The score of each policy, whatever the mode. Raises JudgeError where one could not be judged."""
        scores, failed = self._ask(plainer(text), policies, prompt)
        if failed:
            raise JudgeError(failed[0])
        return scores

    def latency(self, share: float = 0.95) -> float | None:
        """Seconds within which this share of the last 4,096 checks were done; None before the first."""
        with self._lock:
            found = sorted(self._seconds)
        return found[min(len(found) - 1, int(share * len(found)))] if found else None

    def _ask(
        self, views: Sequence[str], wanted: Sequence[str], prompt: str | None
    ) -> tuple[dict[str, float], list[str]]:
        """(the highest score of each policy, what failed)."""
        until = time.monotonic() + self.file.timeout
        scores: dict[str, float] = {}
        failed: list[str] = []
        waiting: list[tuple[Judge, Future[dict[str, float]]]] = []

        def take(found: dict[str, float]) -> None:
            for name, value in found.items():
                scores[name] = max(scores.get(name, 0.0), value)

        for judge, names in self._judges:
            own = [name for name in names if name in wanted]
            for view in views if own else ():
                if isinstance(judge, _QUICK):
                    take(score_all(judge, view, own, prompt))
                else:
                    waiting.append((judge, self._slow.submit(score_all, judge, view, own, prompt)))
        for judge, future in waiting:
            kind = type(judge).__name__
            try:
                take(future.result(max(0.0, until - time.monotonic())))
            except FutureTimeoutError:
                future.cancel()
                failed.append(f"{kind} did not answer within {self.file.timeout:g} seconds")
            except JudgeError as error:
                failed.append(f"{kind}: {error}")
            except GemcutError as error:
                failed.append(f"{kind} failed: {error}")
            except Exception as error:  # an operator's own judge: whatever it is, it must not let a text through unseen
                failed.append(f"{kind} failed: {type(error).__name__}")
        return scores, list(dict.fromkeys(failed))


def plainer(text: str) -> list[str]:
    """The text; where they differ, what it says without hidden characters and look-alikes, and its base64 decoded."""
    views = [text]
    bare = unicodedata.normalize("NFKC", strip_invisible(text)[0])
    if bare != text:
        views.append(bare)
    decoded = " ".join(found for word in _BASE64.findall(bare[:_MOST_DECODED]) if (found := _decoded(word)))
    if decoded:
        views.append(decoded)
    return views


def _decoded(word: str) -> str:
    """A base64 word as text; "" where it holds none."""
    plain = word.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        data = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
        text = data.decode("utf-8")
    except (binascii.Error, ValueError):
        return ""
    printable = sum(character.isprintable() or character.isspace() for character in text)
    return text if printable >= 0.95 * len(text) and any(character.isalpha() for character in text) else ""
