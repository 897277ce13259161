"""Quality rules for source code.

Length of lines and letters: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 3.1. What is
generated, minified or a copy of another project is learned from elsewhere, or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gemcut.data.document import Document
from gemcut.data.steps import Filter
from gemcut.text.measures import Batch, seen_before, share

GENERATED = re.compile(
    r"@generated|do not (?:edit|modify)[^\n]{0,40}(?:generated|by hand)|generated[^\n]{0,60}do not (?:edit|modify)"
    r"|(?:auto(?:matically)?[ -]?|machine[ -])generated"
    r"|generated (?:by|from|automatically|using) |this file (?:is|was) generated",
    re.IGNORECASE,
)
VENDORED = re.compile(
    r"(?:^|/)(?:_?vendor(?:ed)?|node_modules|third[_-]?party|externals?|bower_components|site-packages|dist-packages)/",
    re.IGNORECASE,
)
MINIFIED = re.compile(r"\.min\.(?:js|css)$|[.-]bundle\.js$", re.IGNORECASE)
LOOK = 1000  # characters in which a file says that it was generated


@dataclass
class CodeQuality(Filter):
    """Drops generated, minified and vendored files, files that repeat themselves, and licences not in ``licences``.

    ``licences`` (all): SPDX identifiers that are kept; "" stands for a file of no known licence.
    """

    NAME: ClassVar[str] = "code-quality"

    max_line: int = 1000
    max_mean_line: float = 100.0
    min_letters: float = 0.25
    min_lines: int = 3
    max_repeated_lines: float = 0.5
    licences: tuple[str, ...] = ()

    def judge(self, documents: Sequence[Document]) -> list[str | None]:
        batch = Batch(documents)
        lines = batch.lines
        longest = np.zeros(batch.size, np.int64)
        np.maximum.at(longest, lines.document, lines.length)
        mean = share(lines.sums(lines.length), lines.count)
        # Short lines (a bracket, "else:") repeat in all code; only longer ones count.
        long = lines.length >= 20
        again = share(lines.sums(seen_before(lines) & long), lines.sums(long))
        terms = share(batch.terms.sums(batch.terms.length), lines.sums(lines.length))
        reasons: list[str | None] = []
        for i, document in enumerate(documents):
            path = document.meta.get("path", document.id)
            if self.licences and document.licence not in self.licences:
                reasons.append(f"code: licence {document.licence or 'not stated'}")
            elif VENDORED.search(path):
                reasons.append("code: vendored copy")
            elif GENERATED.search(document.text[:LOOK]):
                reasons.append("code: generated")
            elif MINIFIED.search(path) or longest[i] > self.max_line:
                reasons.append("code: minified or data")
            elif mean[i] > self.max_mean_line:
                reasons.append("code: long lines")
            elif terms[i] < self.min_letters:
                reasons.append("code: few letters and digits")
            elif lines.count[i] < self.min_lines:
                reasons.append("code: too few lines")
            elif again[i] > self.max_repeated_lines:
                reasons.append("code: repeated lines")
            else:
                reasons.append(None)
        return reasons
