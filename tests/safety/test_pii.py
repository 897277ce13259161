"""Personal data beside checksums computed by hand and published test numbers; none of it belongs to anybody."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcut.safety.pii import card, find, iban, luhn, public_address, replace, social_security

#: Numbers that card companies print for tests, and accounts of the IBAN register's own examples.
CARDS = ["4111 1111 1111 1111", "5555555555554444", "3782-822463-10005", "6011111111111117", "4012888888881881"]
IBANS = ["GB82 WEST 1234 5698 7654 32", "DE89370400440532013000", "FR14 2004 1010 0505 0001 3M02 606"]


@given(st.integers(0, 10**15 - 1))
@settings(max_examples=50, deadline=None)
def test_luhn(number: int) -> None:
    """Doubling every second digit from the right, by the definition."""
    body = str(number)
    total = sum(sum(map(int, str(int(d) * (2 - i % 2)))) for i, d in enumerate(reversed(body)))
    check = (10 - total % 10) % 10
    assert luhn(body + str(check))
    assert not luhn(body + str((check + 1) % 10))


@pytest.mark.parametrize("number", [n for n in CARDS if n != "4111 1111 1111 1111"])
def test_cards(number: str) -> None:
    assert card(number)
    assert [f.kind for f in find(f"pay with {number}, please")] == ["card"]
    last = str((int(number[-1]) + 1) % 10)
    assert not card(number[:-1] + last)
    assert find(f"order {number[:-1]}{last}") == []


@pytest.mark.parametrize("number", IBANS)
def test_ibans(number: str) -> None:
    assert iban(number)
    assert not iban(number.replace("3", "4", 1))
    assert [f.kind for f in find(f"to {number} today")] == ["iban"]


def test_mod_97_by_hand() -> None:
    """GB82WEST…: letters as 10 to 35, the first four at the end; the remainder is 1."""
    digits = "3214282912345698765432161182"
    rest = 0
    for digit in digits:
        rest = (10 * rest + int(digit)) % 97
    assert rest == 1
    assert iban("GB82WEST12345698765432")


CASES = {
    "write to jane.doe+x@mail.some-host.co.uk now": "write to user1@example.com now",
    "a@b.org, c@d.org and a@b.org": "user1@example.com, user2@example.com and user1@example.com",
    "nobody@example.com and x@example": None,
    "decorator @property and a @ b": None,
    "host 8.8.8.8 and 8.8.4.4": "host 192.0.2.1 and 192.0.2.2",
    "private 10.0.0.1, 192.168.1.1, 127.0.0.1, 192.0.2.7": None,
    "version 1.2.3.4 and 1.2.3.4.5 and 300.1.1.1": None,
    "via 2001:4860:4860::8888 out": "via 192.0.2.1 out",
    "at 12:30:45 and ::1 and a::b": None,
    "call (212) 664-7665 or 212-664-7665": "call 555-0100 or 555-0101",
    "call +44 20 7946 0958 now": "call 555-0100 now",
    "fiction 212-555-0123; date 2024-01-31; 3.14159265358979": None,
    "ssn 536-90-4399.": "ssn 000-00-0000.",
    "not 000-12-3456 666-12-3456 900-12-3456 536-00-4399 536-90-0000 078-05-1120": None,
    "key AKIAQ3EGRLMB7XKDU2WV end": "key SECRET end",
    "AKIAIOSFODNN7EXAMPLE is of the manual": None,
    "token ghp_16C7e42F292c6912E7710c838347Ae178B4a and sk-proj-a8Jd93kLmQ02xZvN55tR": "token SECRET and SECRET-2",
    "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nrest": "SECRET\nrest",
    "sk-learn and sk-aaaaaaaaaaaaaaaaaaaaaaaa": None,
    "": None,
}


@pytest.mark.parametrize("text", CASES)
def test_replacements(text: str) -> None:
    expected = CASES[text]
    found, counts = replace(text)
    assert found == (text if expected is None else expected)
    assert bool(counts) == (expected is not None)


def test_only_what_is_asked_for() -> None:
    text = "a@b.org at 8.8.8.8"
    assert replace(text, ("ip",))[0] == "a@b.org at 192.0.2.1"


def test_nothing_is_found_in_what_was_put_there() -> None:
    text = " ".join(t for t, e in CASES.items() if e) + " ".join(CARDS[1:] + IBANS)
    once, counts = replace(text)
    assert sum(counts.values()) > 15
    assert replace(once) == (once, {})


def test_validators() -> None:
    assert public_address("1.1.1.1")
    assert not public_address("203.0.113.9")
    assert not public_address("fe80::1")
    assert social_security("536-90-4399")


def test_windows_lose_nothing() -> None:
    """What is found around anchors is what the patterns find in whole texts."""
    from gemcut.safety.pii import KINDS

    draw = random.Random(4)
    pieces = [*CARDS, *IBANS, *[t for t in CASES if t], "words " * 40, "x = 1\n", "@", "10.5 ", "(12) 345-678 "]
    for _ in range(150):
        text = "".join(draw.choice(pieces) + draw.choice([" ", "\n", ", "]) for _ in range(draw.randint(1, 25)))
        expected: list[tuple[str, int, int]] = []
        for kind in KINDS:
            for match in kind.pattern.finditer(text):
                free = not any(a < match.end() and match.start() < b for _, a, b in expected)
                if free and kind.valid(match[0]):
                    expected.append((kind.name, match.start(), match.end()))
        assert [(f.kind, f.start, f.end) for f in find(text)] == sorted(expected, key=lambda e: e[1])


def test_hostile_text_takes_no_time() -> None:
    for piece in ("a@", "1-", "1 ", "a.", "1.1.", "eyJ", ":0", "sk-a-", "+1 ", "AB12 "):
        find(piece * (100_000 // len(piece)))
