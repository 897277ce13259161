"""The network and the engine on an NVIDIA GPU, against the same on the CPU and against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemcut.checkpoint.load import load_model_weights
from gemcut.checkpoint.resolve import resolve
from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.model import Model
from gemcut.model.dense import dense_logits
from support import hf_model, save_checkpoint, tiny_config

pytestmark = pytest.mark.gpu


def load(folder: Path, dtype: torch.dtype, device: str) -> Model:
    source = resolve(folder)
    with torch.device("meta"):
        model = Model(source.config(), dtype=dtype)
    load_model_weights(model, source.tensors(), dtype=dtype, device=torch.device(device))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "model", hf_model(tiny_config(), seed=3))


def run(model: Model, device: str, prompts: list[list[int]], **sampling: object) -> list[list[int]]:
    engine = Engine(model, torch.device(device), EngineConfig(max_batch_tokens=9, block_size=4))
    params = SamplingParams(max_new_tokens=24, ignore_eos=True, **sampling)  # type: ignore[arg-type]
    sequences = [engine.submit(Request(prompt_ids=tuple(p), params=params)) for p in prompts]
    while engine.has_work:
        engine.step()
    assert engine.cache.full.free == engine.cache.full.count
    return [s.tokens[s.prompt_length :] for s in sequences]


def random_prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(4, 320, (1 + 7 * i,), generator=generator).tolist() for i in range(count)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2), (torch.float16, 0.03)])
def test_logits_on_the_gpu_equal_those_on_the_cpu(folder: Path, dtype: torch.dtype, tolerance: float) -> None:
    # Logits lie within ±3 (the final cap). Both sides round at other places; the bounds are about three times
    # the error that bf16 and fp16 themselves have against fp32 on this network.
    ids = torch.tensor(random_prompts(8)[7])
    here = dense_logits(load(folder, dtype, "cpu"), ids)
    there = dense_logits(load(folder, dtype, "cuda"), ids.cuda()).cpu()
    assert torch.isfinite(there).all()
    assert (here - there).abs().max() < tolerance


def test_greedy_on_the_gpu_equals_transformers_on_the_gpu(folder: Path) -> None:
    peer = hf_model(tiny_config(), seed=3).cuda()
    prompts = random_prompts(8)
    got = run(load(folder, torch.float32, "cuda"), "cuda", prompts, temperature=0)
    for prompt, tokens in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        want = peer.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tokens == want[0, len(prompt) :].tolist()


def test_a_seed_gives_the_same_text_on_both_devices(folder: Path) -> None:
    prompts = random_prompts(4)
    sampling = {"seed": 11, "temperature": 0.9, "top_p": 0.9, "top_k": 50}
    here = run(load(folder, torch.float32, "cpu"), "cpu", prompts, **sampling)
    assert run(load(folder, torch.float32, "cuda"), "cuda", prompts, **sampling) == here


def test_bf16_head_gives_unrounded_logits(folder: Path) -> None:
    # fp32 accumulation must reach us: logits on bf16's grid would all survive a round trip through bf16.
    logits = dense_logits(load(folder, torch.bfloat16, "cuda"), torch.tensor(random_prompts(5)[4]).cuda())
    cap = 3.0
    raw = cap * torch.atanh((logits / cap).clamp(-0.999, 0.999))
    assert (raw.bfloat16().float() - raw).abs().max() > 1e-4
