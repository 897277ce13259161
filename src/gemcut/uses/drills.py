"""Drills: sentences with a gap or a mistake, asked again after a day, three days, a week…, kept in a file."""

from __future__ import annotations

import contextlib
import json
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from gemcut import files
from gemcut.errors import ParameterError
from gemcut.gemma import Gemma
from gemcut.paths import user_folder
from gemcut.uses.templates import read_template
from gemcut.uses.tutor import NOTED, Correction, answer_json, learner, list_of

FORMAT, VERSION = "gemcut-drills", 1
MAX_BYTES = 64 << 20
GAP = "___"
#: Days after which a drill is asked again; a right answer goes to the next box, a wrong one to the first.
BOXES = (0, 1, 3, 7, 14, 30, 60, 120)


@dataclass(frozen=True)
class Drill:
    """A question with one answer: ``prompt`` has a gap, or ``[words]`` that are wrong. ``due`` is a time in UTC."""

    prompt: str
    answer: str
    rule: str = ""
    level: str = ""
    box: int = 0
    due: str = "1970-01-01T00:00:00+00:00"
    right: int = 0
    wrong: int = 0


class Deck:
    """The drills in a file. What `add` and `answer` do is in the file when they return."""

    def __init__(self, path: Path) -> None:
        """Read a file, or begin one. Raises ParameterError where it is something else, or of another version."""
        self.path = path
        self.drills: list[Drill] = []
        try:
            data = files.read_json(path, MAX_BYTES)
        except FileNotFoundError:
            return
        except files.UnreadableError as error:
            raise ParameterError(f"{path} is no file of drills: it {error}") from None
        except OSError as error:
            raise ParameterError(f"cannot read {path}: {error.strerror or error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise ParameterError(
                f"{path} is no file of drills (format {FORMAT!r}, version {VERSION}); name another one"
            )
        try:
            self.drills = [_drill(each) for each in data["drills"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ParameterError(
                f"{path} has a drill that is none ({files.shown(str(error))}); mend or remove it"
            ) from None

    def due(self, now: datetime) -> list[Drill]:
        """Drills to be asked now, those that have waited longest first."""
        return sorted((each for each in self.drills if _time(each.due) <= now), key=lambda each: _time(each.due))

    def next_due(self) -> datetime | None:
        """When the next one is; None where there are no drills."""
        return min((_time(each.due) for each in self.drills), default=None)

    def add(self, drills: Iterable[Drill]) -> int:
        """Take new drills, due at once; how many. One that is there already stays as it is."""
        known = {(each.prompt, each.answer) for each in self.drills}
        new = [each for each in dict.fromkeys(drills) if (each.prompt, each.answer) not in known]
        if new:
            self.drills += new
            self._save()
        return len(new)

    def answer(self, drill: Drill, given: str, now: datetime) -> bool:
        """Take an answer; whether it was right."""
        right = _plain(given) == _plain(drill.answer)
        box = min(drill.box + 1, len(BOXES) - 1) if right else 0
        due = (now + timedelta(days=BOXES[box])).isoformat()
        later = replace(drill, box=box, due=due, right=drill.right + right, wrong=drill.wrong + (not right))
        self.drills[self.drills.index(drill)] = later
        self._save()
        return right

    def _save(self) -> None:
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(part, "w", encoding="utf-8") as file:
                data = {"format": FORMAT, "version": VERSION, "drills": [asdict(each) for each in self.drills]}
                json.dump(data, file, ensure_ascii=False, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except OSError as error:
            raise ParameterError(f"cannot write {self.path}: {error.strerror or error}") from None
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def deck_file() -> Path:
    """Where drills are kept unless a file is named: gemcut's folder of the user's data."""
    return user_folder("XDG_DATA_HOME", ".local/share") / "drills.json"


def drills_of(correction: Correction) -> list[Drill]:
    """A drill of each edit that has a rule: the corrected sentence with the wrong words in brackets."""
    found = []
    for edit in correction.edits:
        if not edit.rule or not edit.before.strip() or not edit.after.strip():
            continue
        text, end = correction.text, edit.start + len(edit.before)
        first = max(text.rfind(mark, 0, edit.start) for mark in ".!?\n") + 1
        last = min((at for mark in ".!?\n" if (at := text.find(mark, end)) >= 0), default=len(text) - 1) + 1
        prompt = f"{text[first : edit.start]}[{edit.before}]{text[end:last]}".strip()
        found.append(Drill(prompt, edit.after, edit.rule, edit.level))
    return found


def make_drills(
    gemma: Gemma,
    about: str,
    count: int,
    *,
    language: str | None = None,
    level: str | None = None,
    prompt: Path | None = None,
    **sampling: Any,
) -> list[Drill]:
    """Drills that a model writes: at most ``count``, each with one gap and something to fill it with.

    Raises ParameterError, ContextLengthError or RequestError.
    """
    if not about.strip():
        raise ParameterError("about is empty; say what the drills are about")
    if not 1 <= count <= 40:
        raise ParameterError(f"count is {count}; expected 1 to 40")
    template = read_template("tutor-drills", ("about", "count", "language", "learner"), prompt)
    asked = template.fill({**learner(language, level), "about": about.strip(), "count": str(count)})
    sentence = {"type": "string", "pattern": f"^[^_\\n]+{GAP}[^_\\n]*$"}
    grammar = list_of("drills", {"sentence": sentence, "answer": {"type": "string", "minLength": 1}, **NOTED}, count)
    data = answer_json(gemma, asked, grammar, sampling, 64 * count)
    found = (Drill(d["sentence"].strip(), d["answer"].strip(), d["rule"].strip(), d["level"]) for d in data["drills"])
    return [each for each in found if each.prompt.count(GAP) == 1 and each.answer]


def _drill(data: dict[str, Any]) -> Drill:
    drill = Drill(**data)
    _time(drill.due)
    texts = all(isinstance(getattr(drill, name), str) for name in ("prompt", "answer", "rule", "level", "due"))
    numbers = all(type(getattr(drill, name)) is int for name in ("box", "right", "wrong"))
    if not texts or not numbers or not 0 <= drill.box < len(BOXES):
        raise ValueError(f"{drill.prompt}")
    return drill


def _time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _plain(text: str) -> str:
    """An answer without what is no mistake: white space, a final stop, capital letters, forms of Unicode."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).rstrip(".").strip()
