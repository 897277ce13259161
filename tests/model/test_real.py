"""Real Gemma 3 270M weights: ours against transformers, both reading the same GGUF file.

Reading it takes transformers about ten seconds, so one fixture serves the file. Logits of 700 tokens over
262,144 words would take a gigabyte a network; they are made and compared in pieces.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from gemcut import Gemma, SamplingParams
from gemcut.model.bind import bind_kernels
from gemcut.model.dense import DenseKeyValues
from model.build import in_dtype, last_logits, our_model, rms, their_logits
from real_weights import PROMPTS, their_gemma3
from reference.gemma import reference_logits
from support import ROOT, gguf_path

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

NEW_TOKENS = 64


@pytest.fixture(scope="module")
def theirs() -> Any:
    return their_gemma3()


@pytest.fixture(scope="module")
def ours() -> Gemma:
    return Gemma.load(gguf_path(), dtype="float32", device="cpu", max_context=2048, progress=False)


@pytest.fixture(scope="module")
def text_ids(ours: Gemma) -> Tensor:
    """700 tokens of English prose, beyond the window of 512: this repository's licence."""
    return torch.tensor(ours.encode((ROOT / "LICENSE").read_text())[:700])


@torch.inference_mode()
def _logit_pairs(ours: Gemma, theirs: Any, ids: Tensor, rows: int = 50) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, our logits, their logits) for 50 rows at a time."""
    our_hidden = ours.model(ids, torch.arange(len(ids)), DenseKeyValues(len(ids)))
    their_hidden = theirs.model(ids[None]).last_hidden_state[0]
    for start in range(0, len(ids), rows):
        part = slice(start, start + rows)
        yield start, ours.model.head(our_hidden[part]), theirs.lm_head(their_hidden[part])


def test_logits_and_perplexity_equal_transformers(ours: Gemma, theirs: Any, text_ids: Tensor) -> None:
    """fp32 logits of size 30 within 2e-3 everywhere, and perplexity, by both networks and by score(), within 0.05 %."""
    largest, size = 0.0, 0.0
    our_log_probabilities, their_log_probabilities = [], []
    for start, our_logits, their_logits_ in _logit_pairs(ours, theirs, text_ids):
        largest = max(largest, (our_logits - their_logits_).abs().max().item())
        size = max(size, their_logits_.abs().max().item())
        for logits, kept in ((our_logits, our_log_probabilities), (their_logits_, their_log_probabilities)):
            following = text_ids[start + 1 : start + 1 + len(logits)]
            kept.append(logits[: len(following)].log_softmax(-1).gather(1, following[:, None])[:, 0])
    assert size > 20  # a network that answers in earnest
    assert largest < 2e-3
    our_perplexity, their_perplexity = (
        math.exp(-torch.cat(each).double().mean()) for each in (our_log_probabilities, their_log_probabilities)
    )
    assert their_perplexity < 20  # real weights, real English
    assert abs(our_perplexity / their_perplexity - 1) < 5e-4
    completion = ours.complete([text_ids.tolist()], SamplingParams(max_new_tokens=0), prompt_logprobs=True)[0]
    scores = torch.tensor(completion.prompt_logprobs)
    assert len(scores) == len(text_ids) - 1
    assert abs(math.exp(-scores.double().mean()) / their_perplexity - 1) < 5e-4
    assert (scores - torch.cat(their_log_probabilities)).abs().max() < 2e-3


GREEDY = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def continuations(ours: Gemma) -> list[list[int]]:
    """What ours continues each prompt with, all ten in one batch; also past an end of sequence."""
    completions = ours.complete([ours.encode(prompt) for prompt in PROMPTS], GREEDY)
    return [list(completion.token_ids) for completion in completions]


@torch.inference_mode()
def test_every_greedy_token_is_the_one_transformers_would_choose(
    ours: Gemma, theirs: Any, continuations: list[list[int]]
) -> None:
    """Ten prompts, 64 tokens each: at every step the likeliest token of transformers, given the same tokens so far.

    By induction that is its own greedy continuation, from one forward pass a prompt instead of 64.
    """
    for prompt, found in zip(PROMPTS, continuations, strict=True):
        ids = torch.tensor(ours.encode(prompt) + found)
        assert len(found) == NEW_TOKENS
        assert their_logits(theirs, ids, NEW_TOKENS + 1)[:-1].argmax(-1).tolist() == found, prompt


@pytest.mark.parametrize("index", [0, 3])
@torch.inference_mode()
def test_generate_equals_generate_of_transformers(
    ours: Gemma, theirs: Any, continuations: list[list[int]], index: int
) -> None:
    """Both front doors step by step with a cache; and alone gives what the batch of ten gave."""
    ids = torch.tensor([ours.encode(PROMPTS[index])])
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    expected = expected[0, ids.shape[1] :].tolist()
    assert expected == continuations[index]
    text = ours.generate(PROMPTS[index], max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    assert text == ours.tokenizer.decode(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_real_weights(theirs: Any, text_ids: Tensor, dtype: torch.dtype) -> None:
    """560 tokens (window 512), the last 40 rows, against float64 of the same rounded weights.

    bf16, with the kernels that a loaded model gets: our RMS error is at most that of transformers in bf16, no margin.
    fp16: finite, and within the same error; transformers gives NaN in fp16 with these weights.
    """
    ids = text_ids[:560]
    rounded = in_dtype(copy.deepcopy(theirs), dtype)
    exact = reference_logits(rounded.state_dict(), rounded.config.to_dict(), ids, scale_dtype=dtype, last=40)
    model = our_model(rounded)
    bind_kernels(model, torch.device("cpu"))  # test_widths.py compares plain PyTorch
    ours = last_logits(model, ids, 40)
    if dtype == torch.float16:
        assert torch.isfinite(ours).all()
        assert rms(ours - exact) < 0.02  # bf16, three bits coarser, has 0.05 here
    else:
        assert rms(ours - exact) <= rms(their_logits(rounded, ids, 40) - exact)


def test_embeddings_equal_transformers(ours: Gemma, theirs: Any, text_ids: Tensor) -> None:
    """In chunks and whole, beyond the window; the largest components are about 40."""
    texts = [text_ids.tolist(), ours.encode("The capital of France is"), ours.encode("a")]
    found = ours.embed(texts)
    for row, ids in zip(found, texts, strict=True):
        with torch.no_grad():
            expected = theirs.model(torch.tensor([ids])).last_hidden_state[0, 1:].double().mean(0)
        assert (row - expected).abs().max() < 1e-4
