"""Quality rules for mathematical text: formulas are welcome, so no rule counts symbols; broken extraction is not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gemcut.data.document import Document
from gemcut.data.steps import Filter
from gemcut.text.measures import Batch, seen_before, share

#: What PDF and HTML converters leave where they could not read a formula.
REMAINS = re.compile(
    r"\(cid:\d+\)|\ufffd|\[(?:IMAGE|FORMULA|MISSING[^\]]*)\]|<img\b|Math(?:Jax|ML) (?:error|processing)"
)
_BEGIN = re.compile(r"\\begin\{(\w+\*?)\}")
_END = re.compile(r"\\end\{(\w+\*?)\}")


@dataclass
class MathematicsQuality(Filter):
    """Drops texts whose formulas were broken on the way: remains of converters, shredded lines, open environments."""

    NAME: ClassVar[str] = "mathematics-quality"

    min_words: int = 20
    max_remains: float = 0.01
    max_shreds: float = 0.3
    max_open: int = 2
    max_repeated_lines: float = 0.3

    def judge(self, documents: Sequence[Document]) -> list[str | None]:
        batch = Batch(documents)
        words, lines = batch.words, batch.lines
        shreds = share(lines.sums(lines.length <= 2), lines.count)
        again = share(lines.sums(seen_before(lines) * lines.length), lines.sums(lines.length))
        reasons: list[str | None] = []
        for i, document in enumerate(documents):
            text = document.text
            if words.count[i] < self.min_words:
                reasons.append("mathematics: too few words")
            elif len(REMAINS.findall(text)) > self.max_remains * words.count[i]:
                reasons.append("mathematics: formulas lost in conversion")
            elif shreds[i] > self.max_shreds:
                reasons.append("mathematics: formulas in shreds")
            elif left_open(text) > self.max_open:
                reasons.append("mathematics: environments left open")
            elif again[i] > self.max_repeated_lines:
                reasons.append("mathematics: repeated lines")
            else:
                reasons.append(None)
        return reasons


def left_open(text: str) -> int:
    """How many TeX environments begin without an end, or end without a beginning; and 1 for an odd number of $$."""
    if "\\" not in text and "$$" not in text:
        return 0
    begun = sorted(_BEGIN.findall(text))
    ended = sorted(_END.findall(text))
    kinds = {*begun, *ended}
    return sum(abs(begun.count(kind) - ended.count(kind)) for kind in kinds) + text.count("$$") % 2
