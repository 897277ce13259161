"""Calls of tools, read from an answer's text."""

from __future__ import annotations

import json

import pytest

from gemcut.server.tools import CallReader


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_read_however_their_text_is_cut(size: int) -> None:
    given = [{"a": 'x"}]\\', "b": [{}, "{["]}, {}, {"é": "日本"}]
    text = "\n" + json.dumps([{"name": f"f{i}", "arguments": each} for i, each in enumerate(given)], indent=1)
    reader = CallReader("call")
    for start in range(0, len(text), size):
        reader.feed(text[start : start + size], last=start + size >= len(text))
    assert [call["function"]["name"] for call in reader.calls] == ["f0", "f1", "f2"]
    assert [json.loads(call["function"]["arguments"]) for call in reader.calls] == given
    assert [call["id"] for call in reader.calls] == ["call_0", "call_1", "call_2"]
    plain = CallReader("call")
    deltas = [d for c in " hello {x}" for d in plain.feed(c)]
    assert "".join(d["content"] for d in deltas) == plain.words == " hello {x}"
