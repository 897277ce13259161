"""Characters that nobody sees and a model reads: taken out of people's text, and counted.

Tag characters, variation selectors and zero-width characters can carry a whole hidden message within one word, which
the person who pastes the text never sees. They are removed, not refused: honest text has them too (a byte order mark,
a zero-width space of a web page), and it loses nothing. What people do see stays: emoji with their selectors and
joiners, flags, and the joiners of scripts that are written with them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping

TAGS, SELECTORS, ZERO_WIDTH, BIDI, OTHER = (
    "tag characters",
    "variation selectors",
    "zero-width characters",
    "bidirectional controls",
    "other invisible characters",
)
_KINDS: tuple[tuple[str, str], ...] = (
    (TAGS, "\U000e0000-\U000e007f"),
    (SELECTORS, "\ufe00-\ufe0f\U000e0100-\U000e01ef\u180b-\u180d\u180f"),
    (ZERO_WIDTH, "\u200b-\u200d\u2060\ufeff\u180e"),
    (BIDI, "\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069"),
    (
        OTHER,
        "\u00ad\u034f\u115f\u1160\u2061-\u2065\u206a-\u206f\u3164\uffa0\ufff9-\ufffb\U000e0080-\U000e00ff\U000e01f0-\U000e0fff",
    ),
)
_ANY = re.compile(f"[{''.join(span for _, span in _KINDS)}]")
_OF_KIND = tuple((kind, re.compile(f"[{span}]")) for kind, span in _KINDS)
# The flags of England, Scotland and Wales: all tag sequences that Unicode recommends.
_FLAG = re.compile(
    "\U0001f3f4(?:"
    + "|".join("".join(chr(0xE0000 + ord(c)) for c in name) for name in ("gbeng", "gbsct", "gbwls"))
    + ")\U000e007f"
)
_ZWNJ, _ZWJ, _ZWSP = "\u200c", "\u200d", "\u200b"
# Scripts whose letters take other forms beside a joiner or a non-joiner: Arabic, Syriac, N'Ko, those of India and its
# neighbours, Myanmar, Khmer, Mongolian, and their supplements.
_JOINING = re.compile(
    "[\u0600-\u08ff\u0900-\u0dff\u1000-\u109f\u1780-\u17ff\u1800-\u18af\ua840-\uabff\ufb50-\ufdff\ufe70-\ufefc\U00010a00-\U00011fff\U0001e900-\U0001e95f]"
)
# Scripts without spaces between words, which mark where a line may break: Thai, Lao, Tibetan, Myanmar, Khmer.
_SPACELESS = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff]")
_RIGHT_TO_LEFT = re.compile(
    "[\u0590-\u061b\u061d-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]"
)
_HAN = re.compile("[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_MONGOLIAN = re.compile("[\u1800-\u18af]")
_SKIN = re.compile("[\U0001f3fb-\U0001f3ff]")


def strip_invisible(text: str) -> tuple[str, dict[str, int]]:
    """(the text without what nobody sees, how many characters of each kind were taken out).

    What stays: one variation selector behind a character that has such a form (emoji, symbols, Han, Mongolian);
    joiners between emoji and behind letters of scripts that join; zero-width spaces within scripts that have no others;
    the flags of England, Scotland and Wales; left-to-right and right-to-left marks where there is right-to-left text.
    """
    if _ANY.search(text) is None:
        return text, {}
    kept: list[str] = []
    removed: Counter[str] = Counter()
    flags = {place for found in _FLAG.finditer(text) for place in range(found.start() + 1, found.end())}
    right_to_left = _RIGHT_TO_LEFT.search(text) is not None
    for place, character in enumerate(text):
        if _ANY.match(character) is None or place in flags:
            kept.append(character)
            continue
        before = kept[-1] if kept else ""
        if _is_seen(character, before, text[place + 1 : place + 2], right_to_left):
            kept.append(character)
        else:
            removed[next(kind for kind, span in _OF_KIND if span.match(character))] += 1
    return "".join(kept), dict(removed)


def words(removed: Mapping[str, int]) -> str:
    """What was taken out, in one line: "12 tag characters and 1 zero-width character"."""
    each = [f"{count} {kind if count != 1 else kind.removesuffix('s')}" for kind, count in removed.items()]
    return " and ".join(filter(None, (", ".join(each[:-1]), each[-1] if each else "")))


def _is_seen(character: str, before: str, behind: str, right_to_left: bool) -> bool:
    """Whether an invisible character changes what is seen, between the one kept ``before`` and the one ``behind``."""
    if not before:
        return False
    code = ord(character)
    if character == _ZWJ and (_is_pictograph(before) or before == "\ufe0f" or _SKIN.match(before)):
        return _is_pictograph(behind)
    if character in (_ZWJ, _ZWNJ):
        return _JOINING.match(before) is not None and unicodedata.category(before)[0] in "LM"
    if character == _ZWSP:
        return _SPACELESS.match(before) is not None and bool(behind) and _SPACELESS.match(behind) is not None
    if code in (0xFE0E, 0xFE0F):
        return _is_pictograph(before) or (before in "0123456789#*" and behind == "\u20e3")
    if 0xFE00 <= code <= 0xFE0D:  # forms of mathematical signs and of Han, Myanmar, Phags-pa
        return unicodedata.category(before) == "Sm" or _HAN.match(before) is not None or "\u1000" <= before <= "\u109f"
    if 0xE0100 <= code <= 0xE01EF:
        return _HAN.match(before) is not None
    if 0x180B <= code <= 0x180F and code != 0x180E:
        return _MONGOLIAN.match(before) is not None
    if character in "\u200e\u200f\u061c":
        return right_to_left and _ANY.match(before) is None
    if character in "\u115f\u1160":  # stand for a missing part of an old Korean syllable
        return "\u1100" <= before <= "\u11ff"
    return character == "\u034f" and bool(behind) and unicodedata.category(behind) == "Mn"


def _is_pictograph(character: str) -> bool:
    """Whether a character is a symbol of the kind that emoji are."""
    if not character:
        return False
    return (
        unicodedata.category(character) in ("So", "Sk")
        or character
        in "\u203c\u2049\u2122\u2139\u2194\u25fb\u25fc\u25fd\u25fe\u3030\u303d\u2190\u2192\u2191\u2193\u2934\u2935"
    )
