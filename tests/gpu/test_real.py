"""Real Gemma 3 270M weights on an NVIDIA GPU: beside float64, transformers' bf16 and our own plain path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gemcut import Gemma, SamplingParams
from gemcut.model import Model
from gemcut.model.dense import dense_logits
from gemcut.quantization.dequantize import dequantize_weight
from gpu_support import check_beside_theirs
from model.build import in_dtype
from real_weights import PROMPTS, their_gemma3
from support import ROOT, gguf_path

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning")]

DEVICE = "cuda"
NEW_TOKENS = 64
LICENCE = (ROOT / "LICENSE").read_text()
MORE_PROMPTS = [
    "In 1969, the first human beings",
    "SELECT name, price FROM products WHERE",
    "Il était une fois une petite fille qui",
    "The mitochondria is",
    "To be, or not to be,",
    "import numpy as np\n\nx = np.",
    "User: How do I boil an egg?\nAssistant:",
    "Monday, Tuesday,",
    LICENCE[:1200],
    LICENCE[2000:5500],  # longer than the window of 512 tokens
]


def load(**how: Any) -> Gemma:
    return Gemma.load(gguf_path(), device=DEVICE, max_context=1024, progress=False, **how)


def test_logits_are_as_near_float64_as_those_of_transformers() -> None:
    """560 tokens of English, past the window of 512, and 40 more that are decoded one by one."""
    ids = load().encode(LICENCE)[:560]
    check_beside_theirs(in_dtype(their_gemma3(), torch.bfloat16).to(DEVICE), ids, 40)


def in_float32(plain: Model) -> Model:
    """A plain network that computes in fp32 with exactly the weights of ``plain``."""
    model = load(dtype="float32", kernels="plain", attn_implementation="eager").model
    for name, module in plain.named_modules():
        if hasattr(module, "case"):
            weight = torch.cat([dequantize_weight(each, torch.float32) for each in module.case.weights])
            twin = model.get_submodule(name)
            twin.weight, twin.kernel = torch.nn.Parameter(weight, requires_grad=False), None
    model.embed_scale = plain.embed_scale
    return model


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_greedy_text_of_twenty_prompts_is_the_plain_paths(quantization: str | None) -> None:
    """Alone and all together: every token is the one the plain path would choose next, or a tie.

    A tie: in fp32 with the same weights the chosen token lies behind the plain path's by no more than four times what
    bf16 moves the plain path's own logits by at that place (root of the mean square over the vocabulary).
    """
    ours = load(quantization=quantization)
    plain = load(quantization=quantization, kernels="plain", attn_implementation="eager").model
    exact = in_float32(plain)
    greedy = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    prompts = [ours.encode(prompt) for prompt in PROMPTS + MORE_PROMPTS]
    assert len(prompts) == 20
    alone = [ours.complete([prompt], greedy)[0].token_ids for prompt in prompts]
    together = [each.token_ids for each in ours.complete(prompts, greedy)]
    same, ties, places = 0, [], 0

    def rows(model: Model, ids: list[int]) -> Tensor:
        return dense_logits(model, torch.tensor(ids, device=DEVICE))[-NEW_TOKENS - 1 : -1]

    for prompt, one, other in zip(prompts, alone, together, strict=True):
        same += one == other
        for found in {tuple(one), tuple(other)}:
            chosen = torch.tensor(found, device=DEVICE)
            theirs, true = rows(plain, [*prompt, *found]), rows(exact, [*prompt, *found])
            wanted = theirs.argmax(-1)
            rounding = (theirs - true).square().mean(-1).sqrt()
            gap = (true.gather(1, wanted[:, None]) - true.gather(1, chosen[:, None]))[:, 0]
            places += len(found)
            ties += [(round(gap[i].item(), 4), round(rounding[i].item(), 4)) for i in (chosen != wanted).nonzero()]
            assert not (gap > 4 * rounding).any(), (prompt[:5], gap / rounding)
    print(f"{same} of 20 texts alike alone and together; {len(ties)} ties in {places} places: (gap, rounding) {ties}")
    assert len(ties) < 0.05 * places
