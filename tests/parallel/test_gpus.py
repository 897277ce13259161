"""Several GPUs: `make test-gpus`. On fewer than two GPUs everything here is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemcut import Gemma, SamplingParams
from gemcut.quantization.spec import Quantization
from model.build import random_ids
from parallel.cases import FORMATS, SHAPE, checkpoint

COUNT = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.gpus, pytest.mark.skipif(COUNT < 2, reason=f"needs two GPUs; there are {COUNT}")]
PROMPTS = [random_ids(n, vocab_size=SHAPE["vocab_size"], seed=n).tolist() for n in (3, 40, 200)]
GREEDY = SamplingParams(max_new_tokens=24, temperature=0, logprobs=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("tiny"))


def load(folder: Path, gpus: int, spec: Quantization | None, dtype: str) -> Iterator[Gemma]:
    options: dict[str, Any] = {"dtype": dtype, "max_context": 512, "progress": False, "quantization": spec}
    gemma = Gemma.load(folder, gpus=gpus, **options)
    yield gemma
    if gemma.team is not None:
        gemma.team.close()


@pytest.mark.parametrize("size", [n for n in (2, 4, 8) if n <= COUNT])
@pytest.mark.parametrize("name", FORMATS)
def test_greedy_answers_are_those_of_one_gpu_but_for_ties(folder: Path, name: str, size: int) -> None:
    found = {}
    for gpus in (1, size):
        for gemma in load(folder, gpus, FORMATS[name], "float32"):
            found[gpus] = gemma.complete(PROMPTS, GREEDY)
            assert gemma.complete(PROMPTS, GREEDY)[2].logprobs == found[gpus][2].logprobs
    for own, other in zip(found[size], found[1], strict=True):
        for place, (a, b) in enumerate(zip(own.token_ids, other.token_ids, strict=True)):
            if a != b:
                best, second = (value for _, value in other.logprobs[place].top)
                assert best - second < 1e-3
                break


@pytest.mark.parametrize("name", FORMATS)
def test_bf16_log_probabilities_are_near_those_of_fp32(folder: Path, name: str) -> None:
    scores = {}
    for gpus, dtype in ((1, "float32"), (1, "bfloat16"), (2, "bfloat16")):
        for gemma in load(folder, gpus, FORMATS[name], dtype):
            scores[gpus, dtype] = torch.tensor(gemma.score(PROMPTS)[2])
    exact = scores[1, "float32"]
    one, two = ((scores[gpus, "bfloat16"] - exact).square().mean().sqrt() for gpus in (1, 2))
    assert two < 1.5 * one + 1e-3
