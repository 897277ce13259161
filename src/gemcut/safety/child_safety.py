"""The interface of child safety: lists and classifiers that an operator brings. gemcut ships none, and no example.

An operator's list holds keyed hashes: HMAC-SHA-256, in hex, of normalised terms, phrases and addresses, a line each,
as ``term:HASH``, ``phrase-N:HASH`` (of N terms) or ``url:HASH``. The key is in a file of its own. What matches is known
afterwards by keyed hashes only: nothing here keeps, prints or logs a text, an address or an id.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable
from pathlib import Path

from gemcut.errors import ParameterError

_LINE = re.compile(r"(?:(term)|phrase-([2-8])|(url)):([0-9a-f]{64})")
LEAST_KEY = 16  # bytes

#: A classifier: from a text to a probability.
Classifier = Callable[[str], float]


def normalize(text: str) -> list[str]:
    """The terms that are compared: runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.casefold())


def normalize_url(url: str) -> str:
    """An address as it is compared: no scheme, no ``www.``, no query, no last slash, in lower case."""
    bare = re.sub(r"^[a-z][a-z0-9+.-]*://", "", url.strip().casefold())
    return re.split(r"[?#]", bare.removeprefix("www."), maxsplit=1)[0].rstrip("/")


class ChildSafety:
    """Matches addresses, texts and classifiers; every match is a reason without any content."""

    def __init__(
        self,
        key: bytes,
        terms: dict[int, frozenset[bytes]],
        urls: frozenset[bytes],
        classifier: Classifier | None = None,
        threshold: float = 0.5,
    ) -> None:
        self._key, self._terms, self._urls = key, terms, urls
        self._classifier, self._threshold = classifier, threshold

    @classmethod
    def read(
        cls, lists: tuple[str, ...], key_file: str, classifier: Classifier | None = None, threshold: float = 0.5
    ) -> ChildSafety:
        """From list files and the file with the key. Raises ParameterError where one is missing or damaged.

        The message names file and line, never what stands there.
        """
        key = _bytes(key_file, "the key file").strip()
        if len(key) < LEAST_KEY:
            raise ParameterError(f"the key in {key_file} has {len(key)} bytes; expected at least {LEAST_KEY}")
        terms: dict[int, set[bytes]] = {}
        urls: set[bytes] = set()
        for path in lists:
            for number, line in enumerate(_bytes(path, "the list").splitlines(), 1):
                if not line.strip():
                    continue
                found = _LINE.fullmatch(line.strip().decode("ascii", "replace"))
                if found is None:
                    raise ParameterError(f"{path}, line {number}: expected term:, phrase-N: or url: and 64 hex digits")
                digest = bytes.fromhex(found[4])
                if found[3]:
                    urls.add(digest)
                else:
                    terms.setdefault(int(found[2] or 1), set()).add(digest)
        if not terms and not urls and classifier is None:
            raise ParameterError("child safety has no entries and no classifier; it would find nothing")
        return cls(key, {n: frozenset(some) for n, some in terms.items()}, frozenset(urls), classifier, threshold)

    def keyed(self, text: str) -> bytes:
        """The keyed hash of a text, 32 bytes: the only form in which anything may be written down."""
        return hmac.digest(self._key, text.encode("utf-8", "replace"), hashlib.sha256)

    def match_url(self, url: str) -> bool:
        """Whether an address, or one it lies under, is listed. To be asked before anything is fetched or read."""
        if not self._urls or not url:
            return False
        parts = normalize_url(url).split("/")
        host = parts[0].split(":")[0]
        hosts = [".".join(host.split(".")[i:]) for i in range(host.count(".") + 1)]
        places = [*hosts, *("/".join([host, *parts[1:i]]) for i in range(2, len(parts) + 1))]
        return any(self.keyed(place) in self._urls for place in places)

    def match_text(self, text: str) -> bool:
        """Whether a text holds a listed term or phrase, or the classifier says so. Before and after changes of texts,
        and at serving."""
        words = normalize(text)
        for size, known in self._terms.items():
            grams = {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}
            if any(self.keyed(gram) in known for gram in grams):
                return True
        return self._classifier is not None and self._classifier(text) >= self._threshold


def _bytes(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ParameterError(f"cannot read {what} {path}: {error.strerror or error}") from None
