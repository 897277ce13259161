"""Words that a text is looked up by: folded, without accents' variants, and pairs of characters where no spaces are."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from gemcut.uses import bm25

_WORD = re.compile(r"\w+")
#: Scripts that put no space between words: Thai, Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")


def terms(text: str) -> list[str]:
    """The words of a text, in order. A run of a script without spaces gives its pairs of neighbours."""
    found: list[str] = []
    for word in _WORD.findall(unicodedata.normalize("NFKC", text).casefold()):
        start = 0
        for run in _UNSPACED.finditer(word):
            found += [word[start : run.start()]] if run.start() > start else []
            own = run[0]
            found += [own] if len(own) == 1 else [own[i : i + 2] for i in range(len(own) - 1)]
            start = run.end()
        found += [word[start:]] if start < len(word) else []
    return found


def content_terms(question: str) -> list[str]:
    """The words of a question that say what it is about, each once: without those that every text of its language has.

    The language is the one that has the most of the question's words among its common ones. A question of common words
    alone keeps them.
    """
    every = list(dict.fromkeys(terms(question)))
    common = max(bm25.stop_words(), key=lambda words: sum(word in words for word in every))
    return [word for word in every if word not in common] or every


def scripts(text: str) -> set[str]:
    """The scripts of a text's letters, as Unicode names them: {"Latin", "Greek"}."""
    return {name for character in set(text) if (name := _script(character))}


@cache
def _script(character: str) -> str:
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "").split()
    return {"Cjk": "Han"}.get(first := name[0].capitalize(), first) if name else ""
