"""Damaged and foreign tokenizer.json files: one error each, and never the end of the process."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemcut.errors import TokenizerError
from gemcut.text import Tokenizer

# The library's panics end a process, so files are tried in another one.
CHILD = """
import pathlib, sys, warnings
from gemcut.errors import GemcutError
from gemcut.text import Tokenizer
folder = pathlib.Path(sys.argv[1])
for line in sys.stdin:
    (folder / "tokenizer.json").write_text(line)
    try:
        tokenizer = Tokenizer.from_folder(folder)
        ids = tokenizer.encode("hello the <b> \u20ac x\\n\\n h\u00e9")
        tokenizer.decode(ids)
        tokenizer.decode([0, 1, 2, 300, 10 ** 6], skip_special_tokens=False)
        print("ok", flush=True)
    except GemcutError as error:
        print("refused" if "\\n" not in str(error) else "two lines", flush=True)
"""
VALUES: list[Any] = [
    *(None, "##", "</w>", "", True, False, 0, -1, 1e9, 2**40, 0.5, [], {}, ["a"], "é", "▁", " ", "a" * 1000),
    *({"type": "BPE"}, {"String": ""}, {"Regex": "("}, {"Regex": ""}),
]
PATTERNS: list[Any] = [{"String": ""}, {"String": "é"}, {"Regex": "a*"}, {"Regex": "(?=a)"}, {"Regex": "("}]
PARTS: dict[str, list[Any]] = {
    "normalizer": [
        *({"type": "Replace", "pattern": p, "content": "éé"} for p in PATTERNS),
        *({"type": "Precompiled", "precompiled_charsmap": c} for c in ("", "AAAA", "AAAAAA==", "BAAAAAAAAAA=")),
        {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}]},
    ],
    "pre_tokenizer": [
        *({"type": "Split", "pattern": p, "behavior": "Isolated", "invert": True} for p in PATTERNS),
        *({"type": "FixedLength", "length": n} for n in (0, 3)),
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    ],
    "decoder": [
        *({"type": "Strip", "content": c, "start": n, "stop": 2**40} for c in " é" for n in (0, 5, 2**40)),
        *({"type": "WordPiece", "prefix": p, "cleanup": True} for p in ("", "##", "é")),
    ],
    "truncation": [
        {"direction": "Left", "max_length": 1, "strategy": "LongestFirst", "stride": 5},
    ],
    "model": [
        *(
            {
                "type": "WordPiece",
                "unk_token": "u",
                "continuing_subword_prefix": p,
                "max_input_chars_per_word": 9,
                "vocab": {"u": 0, "h": 1, "##e": 2},
            }
            for p in ("", "##", "é")
        ),
        *(
            {"type": "Unigram", "unk_id": u, "vocab": [["u", 0.0], ["é", -1e308]], "byte_fallback": True}
            for u in (0, 9)
        ),
        {"type": "Unigram", "unk_id": 0, "vocab": [], "byte_fallback": False},
    ],
}


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values of the file stand; of long tables the first entries."""
    inside = list(value.items())[:12] if isinstance(value, dict) else []
    inside = list(enumerate(value[:3])) if isinstance(value, list) else inside
    for key, item in inside:
        yield (*before, key)
        yield from places(item, (*before, key))


def changed(base: dict[str, Any], place: tuple[Any, ...], value: Any) -> str:
    file = copy.deepcopy(base)
    inside: Any = file
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    return json.dumps(file)


@pytest.fixture(scope="module")
def base(small: Tokenizer) -> dict[str, Any]:
    file: dict[str, Any] = json.loads(small.backend.to_str())
    return file


def test_no_file_ends_the_process(base: dict[str, Any], tmp_path: Path) -> None:
    cases = [((name,), value) for name, values in PARTS.items() for value in values]
    cases += [(("model", "continuing_subword_prefix"), value) for value in ("##", " ", "é", "</w>", "a" * 1000)]
    every = [(place, value) for place in places(base) for value in VALUES]
    cases += random.Random(3).sample(every, 250)
    lines = "".join(changed(base, *case) + "\n" for case in cases)
    run = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path],
        input=lines,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
        timeout=120,
    )
    answers = run.stdout.split("\n")[:-1]
    assert run.returncode == 0, (cases[len(answers)], run.stderr[-500:])
    assert len(answers) == len(cases)
    assert set(answers) == {"ok", "refused"}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("model", "continuing_subword_prefix"), "##", "continuing_subword_prefix is '##'; expected null"),
        (("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "type 'Precompiled'"),
        (("pre_tokenizer",), {"type": "FixedLength", "length": 0}, "type 'FixedLength'"),
        (("model", "type"), "BPEE", "damaged or not a tokenizer"),
    ],
)
def test_what_is_refused(base: dict[str, Any], tmp_path: Path, place: Any, value: Any, message: str) -> None:
    text = changed(base, place, value)
    for spelled in (text, text.replace("subword", "sub\\u0077ord").replace("Precompiled", "\\u0050recompiled")):
        (tmp_path / "tokenizer.json").write_text(spelled)
        with pytest.raises(TokenizerError, match=message) as caught:
            Tokenizer.from_folder(tmp_path)
        assert "\n" not in str(caught.value)
