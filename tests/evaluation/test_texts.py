"""Perplexity, needle and position curve against transformers' log-softmax of the same network."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from engine.driver import twins
from evaluation.test_asking import Bytes, asker, sums
from gemcut.errors import ParameterError
from gemcut.evaluation.needle import NeedleCell, measure_needle, plot, position_curve, trial
from gemcut.evaluation.perplexity import text_perplexity

TEXT = "Some words é of a text. " * 4


def test_perplexity_of_a_whole_text() -> None:
    gemma, ids = asker().gemma, Bytes().encode(TEXT)
    found = text_perplexity(gemma, TEXT)
    logprob = sums(ids, 1)
    assert found.tokens == len(ids) - 1
    assert found.perplexity == pytest.approx(math.exp(-logprob / (len(ids) - 1)), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(-logprob / math.log(2) / len(TEXT.encode()), rel=1e-4)
    assert found.word_perplexity == pytest.approx(math.exp(-logprob / len(TEXT.split())), rel=1e-3)
    part = text_perplexity(gemma, TEXT, window=32, stride=8)
    assert part.tokens == found.tokens
    wanted, body = sums(ids[:32], 1), ids[1:]
    for done in range(31, len(body), 8):
        end = min(done + 8, len(body))
        window = [2, *body[end - 31 : end]]
        wanted += sums(window, len(window) - (end - done))
    assert part.logprob == pytest.approx(wanted, abs=1e-2)
    for sizes, said in (
        ({"window": 1}, "window is 1"),
        ({"window": 300}, "300"),
        ({"window": 9, "stride": 9}, "stride"),
    ):
        with pytest.raises(ParameterError, match=said):
            text_perplexity(gemma, TEXT, **sizes)
    with pytest.raises(ParameterError, match="the text is empty"):
        text_perplexity(gemma, "")


def test_needles_stand_where_they_are_said_to() -> None:
    ours = asker()
    for depth in (0.0, 0.5, 1.0):
        request, right = trial(ours, 250, depth, random.Random(3))
        text, question = request.context.split("\n\n")
        number = request.continuations[right]
        sentence = f"{question}{number}."
        assert text.count(sentence) == 1
        before = text.index(sentence) / (len(text) - len(sentence))
        assert before == pytest.approx(depth, abs=0.3 if depth == 0.5 else 1e-9)
        assert len(Bytes().encode(request.context + number)) <= 250
        assert len(set(request.continuations)) == 10
        assert not any(text.count(each) for i, each in enumerate(request.continuations) if i != right)


def test_needle_of_a_network() -> None:
    """A random network finds nothing but by chance; one with planted answers is counted right."""
    gemma = asker().gemma
    cells = measure_needle(gemma, lengths=(160,), depths=(0, 1), trials=2)
    assert [(cell.length, cell.depth, cell.trials) for cell in cells] == [(160, 0, 2), (160, 1, 2)]
    for cell in cells:
        margins = []
        for number in range(2):
            request, right = trial(asker(), 160, cell.depth, random.Random(f"0 160 {cell.depth} {number}"))
            before = Bytes().encode(request.context)
            each = [sums(before + Bytes().encode(c, add_bos=False), len(before)) for c in request.continuations]
            margins.append(each[right] - max(value for i, value in enumerate(each) if i != right))
        assert cell.margin == pytest.approx(sum(margins) / 2, abs=1e-3)
        assert cell.found == sum(margin > 0 for margin in margins)
    with pytest.raises(ParameterError, match="a length is 999; expected 128 to 256"):
        measure_needle(gemma, lengths=(999,))
    with pytest.raises(ParameterError, match="a depth is 2"):
        measure_needle(gemma, lengths=(200,), depths=(2,))
    with pytest.raises(ParameterError, match="trials is 0"):
        measure_needle(gemma, lengths=(200,), trials=0)


@pytest.mark.slow
def test_a_picture_of_needles(tmp_path: Path) -> None:
    cells = [NeedleCell(length=64 * i, depth=0, found=i, trials=2, margin=1.0) for i in (1, 2)]
    for curve in ([], [(1, 2.0), (3, 1.0)]):
        plot(tmp_path / "x.png", cells, curve, "x")
        assert (tmp_path / "x.png").stat().st_size > 1000


def test_position_curve() -> None:
    gemma, ids = asker().gemma, Bytes().encode(TEXT)[:65]
    curve = position_curve(gemma, TEXT, 65, buckets=4)
    with torch.no_grad():
        logprobs = twins()[1](torch.tensor([ids])).logits[0].log_softmax(-1)
    costs = [-logprobs[place - 1, ids[place]].item() for place in range(1, 65)]
    assert [place for place, _ in curve] == [8, 24, 40, 56]
    assert [cost for _, cost in curve] == pytest.approx(
        [sum(costs[i : i + 16]) / 16 for i in (0, 16, 32, 48)], abs=1e-4
    )
    with pytest.raises(ParameterError, match="expected at least 8"):
        position_curve(gemma, "ab", 65, buckets=4)
