"""The papers' rules written once more, one document and one word at a time: slow, and independent of the package."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

STOP = {"the", "be", "to", "of", "and", "that", "have", "with"}
TERMINAL = (".", "!", "?")
CLOSING = (*TERMINAL, '"', "'", "”", "’", "»")


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def paragraphs_of(text: str) -> list[list[str]]:
    out: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            out[-1].append(line.strip())
        elif out[-1]:
            out.append([])
    return [paragraph for paragraph in out if paragraph]


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def quality(text: str) -> set[str]:
    words, lines = text.split(), lines_of(text)
    mean = share(sum(map(len, words)), len(words))
    symbols = text.count("#") + text.count("…") + text.count("...")
    checks = {
        "too few words": len(words) < 50,
        "too many words": len(words) > 100_000,
        "words too short": mean < 3,
        "words too long": mean > 10,
        "symbols": share(symbols, len(words)) > 0.1,
        "bullet lines": share(sum(line[0] in "•‣▶◀◦■□▪▫–-*" for line in lines), len(lines)) > 0.9,
        "lines ending in an ellipsis": share(sum(line.endswith(("...", "…")) for line in lines), len(lines)) > 0.3,
        "words without letters": share(sum(any(c.isalpha() for c in word) for word in words), len(words)) < 0.8,
        "too few stop words": len(STOP & set(words)) < 2,
    }
    return {f"gopher: {name}" for name, bad in checks.items() if bad}


def repeated(pieces: Sequence[object], sizes: Sequence[int]) -> tuple[float, float]:
    """(share of pieces that stood there before, share of their characters)."""
    seen: set[object] = set()
    count = characters = 0
    for piece, size in zip(pieces, sizes, strict=True):
        if piece in seen:
            count, characters = count + 1, characters + size
        seen.add(piece)
    return share(count, len(pieces)), share(characters, sum(sizes))


def top(words: list[str], n: int) -> float:
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    most = max(counts.values(), default=0)
    if most < 2:
        return 0.0
    longest = max(sum(map(len, gram)) for gram, count in counts.items() if count == most)
    return most * longest / sum(map(len, words))


def covered(words: list[str], n: int) -> float:
    seen: set[tuple[str, ...]] = set()
    inside: set[int] = set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            inside |= set(range(i, i + n))
        seen.add(gram)
    return share(sum(len(words[i]) for i in inside), sum(map(len, words)))


def repetition(text: str) -> set[str]:
    words = text.split()
    lines = [tuple(line.split()) for line in lines_of(text)]
    paragraphs = [tuple(tuple(line.split()) for line in paragraph) for paragraph in paragraphs_of(text)]
    broken = set()
    for what, pieces, sizes in (
        ("lines", lines, [len(line) for line in lines_of(text)]),
        ("paragraphs", paragraphs, [sum(map(len, paragraph)) for paragraph in paragraphs_of(text)]),
    ):
        count, characters = repeated(pieces, sizes)
        broken |= {f"gopher: repeated {what}"} if count > 0.30 else set()
        broken |= {f"gopher: characters in repeated {what}"} if characters > 0.20 else set()
    for n, most in {2: 0.20, 3: 0.18, 4: 0.16}.items():
        broken |= {f"gopher: most frequent {n}-gram"} if top(words, n) > most else set()
    for n, most in {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}.items():
        broken |= {f"gopher: repeated {n}-grams"} if covered(words, n) > most else set()
    return broken


def fineweb(text: str) -> set[str]:
    lines = lines_of(text)
    _, characters = repeated([tuple(line.split()) for line in lines], [len(line) for line in lines])
    checks = {
        "few lines end with punctuation": share(sum(line.endswith(CLOSING) for line in lines), len(lines)) <= 0.12,
        "characters in repeated lines": characters >= 0.1,
        "short lines": share(sum(len(line) < 30 for line in lines), len(lines)) >= 0.67,
    }
    return {f"fineweb: {name}" for name, bad in checks.items() if bad}


def c4(text: str) -> tuple[str, str]:
    """(text that is left, "") or ("", why the page is dropped)."""
    text = re.sub(r"\[(\d*|edit|citation needed)\]", "", text)
    if "{" in text:
        return "", "c4: curly bracket"
    if "lorem ipsum" in text.lower():
        return "", "c4: lorem ipsum"
    policy = re.compile("terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies|javascript")
    paragraphs = []
    sentences = 0
    for paragraph in paragraphs_of(text):
        kept = []
        for line in paragraph:
            if line.endswith(CLOSING) and len(line.split()) >= 3 and not policy.search(line.lower()):
                kept.append(line)
                sentences += sum(re.search(r"[.!?][\"'”’»]?$", word) is not None for word in line.split())
        paragraphs += [kept] if kept else []
    if not paragraphs:
        return "", "c4: no line is kept"
    if sentences < 5:
        return "", "c4: too few sentences"
    return "\n\n".join("\n".join(paragraph) for paragraph in paragraphs), ""
