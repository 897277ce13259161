"""A stream's own edit of the logits, given in Python."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import pytest
import torch

from engine.driver import assert_nothing_held
from engine.words import new_gemma
from gemcut.engine import Edit, SamplingParams
from gemcut.errors import ParameterError

PROMPT = [5, 6, 7]


def drawn(new: int) -> SamplingParams:
    return SamplingParams(seed=3, max_new_tokens=new, ignore_eos=True)


def test_an_edit_decides_the_tokens_of_its_own_stream() -> None:
    """A fixed answer, by mask and by bias; the edit hears the prompt and what was written since."""
    gemma, answer = new_gemma(), [7, 30, 7, 41]
    asked: list[list[int]] = []

    def by_mask(tokens: Many[int], prompt_length: int) -> Edit:
        asked.append(list(tokens))
        bits = 1 << answer[len(tokens) - prompt_length]
        words = [bits & 0xFFFFFFFF, bits >> 32]
        return Edit(allowed=torch.tensor(words, dtype=torch.uint32).view(torch.int32))

    def by_bias(tokens: Many[int], prompt_length: int) -> Edit:
        bias = torch.zeros(64)
        bias[answer[len(tokens) - prompt_length]] = 1000.0
        return Edit(bias=bias)

    params = drawn(4)
    masked = gemma.stream_ids(PROMPT, params, edit=by_mask)
    biased = gemma.prepare_stream(PROMPT, params, edit=by_bias)
    biased.start()
    plain = gemma.stream_ids(PROMPT, params)
    assert list(masked.result.token_ids) == list(biased.result.token_ids) == answer
    assert asked == [[*PROMPT, *answer[:n]] for n in range(4)]
    assert plain.result.token_ids == new_gemma().complete([PROMPT], params)[0].token_ids
    assert_nothing_held(gemma.engine)


def test_what_is_no_edit_is_refused_before_it_starts() -> None:
    gemma = new_gemma()
    edit: Any = Edit()
    with pytest.raises(ParameterError, match="edit is of type Edit; expected a LogitsEdit, which is called"):
        gemma.stream_ids(PROMPT, drawn(4), edit=edit)
    assert not gemma.loop.busy
