"""Personal data and secrets in text: found by a cheap gate, a pattern and a validator, and replaced by reserved values.

Each kind has a *gate*, a substring or character class without which it cannot be there, so that clean text costs a few
searches. What a pattern finds counts only where its validator agrees: checksums of cards (ISO/IEC 7812) and accounts
(ISO 13616), ranges of addresses and numbers, prefixes and entropy of keys. Replacements come from ranges that are
reserved for examples, the same value getting the same one within a text.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gemcut.errors import ParameterError


@dataclass(frozen=True)
class Found:
    """One piece of personal data: its kind, and where it stands."""

    kind: str
    start: int
    end: int


class Signs:
    """What is cheap to see in a text, looked for once: without it whole kinds cannot be there."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digits: bool = _DIGITS.search(text) is not None
        self.at: bool = "@" in text

    @property
    def secret(self) -> bool:
        return any(mark in self.text for mark in _MARKS)

    @property
    def address(self) -> bool:
        return (self.digits and _V4.search(self.text) is not None) or (
            ":" in self.text and _V6.search(self.text) is not None
        )


@dataclass(frozen=True)
class Kind:
    """One kind: ``gate`` says whether it can be there at all, ``valid(text of the match)`` whether it is one."""

    name: str
    gate: Callable[[Signs], bool]
    pattern: re.Pattern[str]
    valid: Callable[[str], bool]
    #: The replacement of the n-th different value of a text, n from 0.
    replacement: Callable[[int], str]


def luhn(digits: str) -> bool:
    """Whether a number's last digit is its check digit (ISO/IEC 7812-1)."""
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + i % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


#: Lengths of an IBAN by country, of the ISO 13616 register.
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LI": 21, "LT": 20, "LU": 20, "LV": 21,
    "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24, "PL": 28,
    "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TN": 24,
    "TR": 26, "UA": 29, "VG": 24, "XK": 20,
}  # fmt: skip


def iban(text: str) -> bool:
    """Whether it is an account number whose length and check digits are right (ISO 13616, mod 97)."""
    plain = text.replace(" ", "").replace("-", "").upper()
    if IBAN_LENGTHS.get(plain[:2]) != len(plain):
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def card(text: str) -> bool:
    """Whether it is a payment card's number: a known range, its length, and Luhn's digit."""
    digits = re.sub(r"\D", "", text)
    if not (13 <= len(digits) <= 19 and luhn(digits)) or len(set(digits)) < 2:
        return False
    lengths = next((sizes for prefix, sizes in _CARDS if prefix.match(digits)), ())
    return len(digits) in lengths


_CARDS = (
    (re.compile("4"), (13, 16, 19)),
    (re.compile("5[1-5]|2(?:2[2-9]|[3-6]|7[01]|720)"), (16,)),
    (re.compile("3[47]"), (15,)),
    (re.compile("3(?:0[0-5]|[68])"), (14,)),
    (re.compile("6(?:011|5|4[4-9])"), (16, 19)),
    (re.compile("35(?:2[89]|[3-8])"), (16, 19)),
)


def social_security(text: str) -> bool:
    """Whether a US social security number can have been given out: no 000, 666, 9xx, no group 00, no serial 0000."""
    area, group, serial = re.split("[- ]", text)
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000" and text not in _FAMOUS


_FAMOUS = ("078-05-1120", "219-09-9999", "123-45-6789")  # printed on sample cards and in every manual


def public_address(text: str) -> bool:
    """Whether it is an IP address that belongs to somebody: of no private or reserved network."""
    try:
        address = ipaddress.ip_address(text)
        # Of version 6 only 2000::/3 is given out (RFC 4291); C++ and Rust write a::b for other things.
        return address.is_global and (address.version == 4 or int(address) >> 125 == 1)
    except ValueError:
        return False


def entropy(text: str) -> float:
    """Shannon's entropy of the characters, in bits a character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def _secret(text: str) -> bool:
    body = re.sub(r"^(?:[A-Za-z]+[-_])+", "", text)
    return entropy(body) > 3.0 and any(c.isdigit() for c in body) and "EXAMPLE" not in text.upper()


def _phone(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    if text.startswith("+"):
        return 8 <= len(digits) <= 15
    digits = digits.removeprefix("1") if len(digits) == 11 else digits
    # North American plan: area and exchange begin with 2 to 9, are no N11, and 555-01xx is reserved for fiction.
    return (
        len(digits) == 10
        and digits[0] >= "2"
        and digits[3] >= "2"
        and digits[1:3] != "11"
        and digits[4:6] != "11"
        and digits[3:8] != "55501"
    )


def _email(text: str) -> bool:
    domain = text.rpartition("@")[2].lower()
    return not re.search(r"(?:^|\.)(?:example\.(?:com|org|net)|example|invalid|test|localhost)$", domain)


_MARKS = (
    "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "sk-", "xox", "AIza", "glpat-",
    "-----BEGIN", "eyJ",
)  # fmt: skip
_DIGITS = re.compile(r"\d[\d \-.()]{5,}\d")
#: Four numbers with dots between them; the first group of an address of version 6 that is given out.
_V4 = re.compile(r"\d\.\d{1,3}\.\d{1,3}\.\d")
_V6 = re.compile(r"[23][0-9A-Fa-f]{3}:")

KINDS: tuple[Kind, ...] = (
    Kind(
        "secret",
        lambda signs: signs.secret,
        re.compile(
            r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----[\s\S]*?(?:-----END (?:[A-Z]+ )*PRIVATE KEY-----|\Z)"
            r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_[A-Za-z0-9_]{22,}\b"
            r"|\bsk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bAIza[A-Za-z0-9_-]{35}\b"
            r"|\bglpat-[A-Za-z0-9_-]{20,}|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"
        ),
        lambda text: text.startswith("-----") or _secret(text),
        lambda n: "SECRET" if n == 0 else f"SECRET-{n + 1}",
    ),
    Kind(
        "email",
        lambda signs: signs.at,
        re.compile(r"\b[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,8}[A-Za-z]{2,24}\b"),
        _email,
        lambda n: f"user{n + 1}@example.com",
    ),
    Kind(
        "iban",
        lambda signs: signs.digits,
        re.compile(r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?\b"),
        iban,
        lambda n: "XX00 0000 0000 0000",
    ),
    Kind(
        "card",
        lambda signs: signs.digits,
        re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-])"),
        card,
        lambda n: "0000 0000 0000 0000",
    ),
    Kind(
        "social security number",
        lambda signs: signs.digits,
        re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])"),
        social_security,
        lambda n: "000-00-0000",
    ),
    Kind(
        "ip",
        lambda signs: signs.address,
        re.compile(
            r"(?<![\w.:-])(?<!ersion )(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w-]|\.\d)"
            r"|(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{1,4}:){0,6}(?::?[0-9A-Fa-f]{1,4}){1,7}(?![\w:])"
        ),
        public_address,
        lambda n: f"192.0.2.{1 + n % 254}",
    ),
    Kind(
        "phone",
        lambda signs: signs.digits,
        re.compile(
            r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"
            r"|(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])[2-9]\d\d[ .-]\d{4})(?![\w-]|\.\d)"
        ),
        _phone,
        lambda n: f"555-{100 + n % 100:04d}",
    ),
)
#: What each match of a kind holds or touches; characters before and after it that a match may reach, and more.
_ANCHORS = {"email": re.compile("@"), "ip": re.compile(f"{_V4.pattern}|{_V6.pattern}")}
_ANCHORS |= dict.fromkeys(("iban", "card", "social security number", "phone"), _DIGITS)
_BEFORE, _AFTER = 80, 320
NAMES = tuple(kind.name for kind in KINDS)


def _near(kind: Kind, text: str) -> Iterator[re.Match[str]]:
    """Matches of the pattern around the anchor's: elsewhere there can be none, and patterns are slow."""
    anchor = _ANCHORS.get(kind.name)
    if anchor is None:
        yield from kind.pattern.finditer(text)
        return
    first = last = 0
    for mark in anchor.finditer(text):
        if mark.start() - _BEFORE > last:
            yield from kind.pattern.finditer(text, first, last)
            first = mark.start() - _BEFORE
        last = mark.end() + _AFTER
    yield from kind.pattern.finditer(text, first, last)


def find(text: str, kinds: Sequence[str] = NAMES) -> list[Found]:
    """Every piece of personal data of these kinds, in order; where two overlap the first of KINDS counts."""
    out: list[Found] = []
    signs = Signs(text)
    for kind in KINDS:
        if kind.name in kinds and kind.gate(signs):
            for match in _near(kind, text):
                taken = any(f.start < match.end() and match.start() < f.end for f in out)
                if not taken and kind.valid(match[0]):
                    out.append(Found(kind.name, match.start(), match.end()))
    return sorted(out, key=lambda found: found.start)


def replace(text: str, kinds: Sequence[str] = NAMES) -> tuple[str, Counter[str]]:
    """(the text with every piece replaced, how many of each kind). Equal values get equal replacements."""
    found = find(text, kinds)
    if not found:
        return text, Counter()
    seen: dict[str, dict[str, int]] = {}
    replacements = {kind.name: kind.replacement for kind in KINDS}
    pieces, at = [], 0
    for each in found:
        values = seen.setdefault(each.kind, {})
        number = values.setdefault(text[each.start : each.end], len(values))
        pieces += [text[at : each.start], replacements[each.kind](number)]
        at = each.end
    return "".join([*pieces, text[at:]]), Counter(each.kind for each in found)


def check_kinds(kinds: Sequence[str]) -> None:
    """Raises ParameterError for a kind that there is not."""
    for kind in kinds:
        if kind not in NAMES:
            raise ParameterError(f"unknown kind of personal data {kind!r}; expected one of {', '.join(NAMES)}")
