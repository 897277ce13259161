"""A compute dtype below the model's: linear layers in fp16 in a network whose MLP passes 65,504."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import BitsAndBytesConfig as TheirConfig

from gemcut.checkpoint.resolve import resolve
from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.kernels.cpu import library
from gemcut.kernels.linear.plain import dense_matmul_fp16
from gemcut.loading import export_network, load_network
from gemcut.model import Model
from gemcut.model.dense import dense_logits
from gemcut.model.ops.plain import PlainOps
from gemcut.quantization.dequantize import dequantize_weight
from gemcut.quantization.int8 import llm_int8_product, quantize_int8
from gemcut.quantization.spec import Quantization
from model.build import random_ids, rms
from reference.gemma import reference_logits
from support import hf_model, save_checkpoint, tiny_config

#: What is multiplied by how much: the gated product passes fp16, or the second product does.
OVERFLOWS = {
    "gated-product": {"gate_proj.weight": 400.0, "up_proj.weight": 400.0},
    "down-projection": {"up_proj.weight": 2000.0, "down_proj.weight": 200.0},
    "nowhere": {},
}
WIDE = (torch.bfloat16, torch.float32)
FORMATS = ("nf4", "fp4", "int8")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=OVERFLOWS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    theirs = hf_model(tiny_config(hidden_size=64, intermediate_size=128))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            for ending, factor in OVERFLOWS[request.param].items():
                if name.endswith(ending):
                    parameter.mul_(factor)
    return save_checkpoint(tmp_path_factory.mktemp("wide") / request.param, theirs)


def _network(checkpoint: Path, dtype: torch.dtype, kernels: str = "auto", **spec: Any) -> Model:
    return load_network(
        resolve(checkpoint), dtype=dtype, device=CPU, quantization=Quantization(**spec), kernels=kernels
    )


def _exact(model: Model, ids: Tensor) -> Tensor:
    """float64 logits of what the network's weights stand for."""
    weights = {name: dequantize_weight(weight, torch.float32) for name, weight in export_network(model)}
    return reference_logits(weights, model.config.to_dict(), ids, scale_dtype=model.dtype)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_logits_are_those_of_float64(checkpoint: Path, form: Any, dtype: torch.dtype, kernels: str) -> None:
    """On both paths of the CPU. fp16 rounds to 2^-11, bf16, which the first kind of model does too, to 2^-8."""
    model, ids = _network(checkpoint, dtype, kernels, format=form, compute_dtype=torch.float16), random_ids(29)
    found, exact = dense_logits(model, ids), _exact(model, ids)
    assert torch.isfinite(found).all()
    assert rms(found - exact) < (0.03 if dtype == torch.bfloat16 else 0.004) * rms(exact)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_llm_int8_stays_finite_too(checkpoint: Path, dtype: torch.dtype) -> None:
    """Its arithmetic is no fp16's, but bitsandbytes rounds activations to fp16 first."""
    model = _network(checkpoint, dtype, format="int8", compute_dtype=torch.float16, activation_threshold=6.0)
    found, exact = dense_logits(model, random_ids(29)), _exact(model, random_ids(29))
    assert torch.isfinite(found).all()
    assert rms(found - exact) < 0.1 * rms(exact)


@pytest.mark.parametrize("form", FORMATS)
def test_tokens_of_an_engine_are_those_of_float64(checkpoint: Path, form: Any) -> None:
    """A prompt and the steps behind it, through the cache and the kernels of decode steps."""
    model = _network(checkpoint, torch.bfloat16, format=form, compute_dtype=torch.float16)
    assert isinstance(model.ops, PlainOps) == (library.unavailable() is not None)
    engine = Engine(model, CPU, EngineConfig(max_context=64))
    prompt = tuple(random_ids(9).tolist())
    sequence = engine.submit(Request(prompt_ids=prompt, params=SamplingParams(max_new_tokens=6, temperature=0)))
    while engine.has_work:
        engine.step()
    assert len(sequence.tokens) == 15
    exact = _exact(model, torch.tensor(sequence.tokens[:-1]))
    for place, token in enumerate(sequence.tokens[9:], start=8):
        best = exact[place].max()
        assert exact[place, token] > best - 0.1, place  # the likeliest, or as good as


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_it_is_what_transformers_and_bitsandbytes_compute_where_they_can(tmp_path: Path, quant_type: str) -> None:
    """Without an overflow theirs is right, too: ours is no further from float64."""
    checkpoint = save_checkpoint(tmp_path / "model", hf_model(tiny_config(hidden_size=64, intermediate_size=128)))
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=TheirConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_compute_dtype=torch.float16
        ),
    )
    ids = random_ids(29)
    with torch.no_grad():
        reference = theirs(ids[None]).logits[0]
    model = _network(checkpoint, torch.float32, format=quant_type, compute_dtype=torch.float16, double_quant=False)
    found, exact = dense_logits(model, ids), _exact(model, ids)
    assert rms(reference - exact) < 0.01 * rms(exact)
    assert rms(found - exact) < 1.1 * rms(reference - exact)


def test_the_product_alone() -> None:
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    x[1] *= 1e6
    x[2] *= 1e30
    x[3, 4] = torch.nan
    weight = torch.randn(7, 48, generator=torch.Generator().manual_seed(1)).half()
    found, exact = dense_matmul_fp16(x, weight, torch.float32), x.double() @ weight.double().t()
    sound = [0, 1, 2, 4]
    assert ((found - exact)[sound].norm(dim=1) < 1e-3 * exact[sound].norm(dim=1)).all()
    assert found[3].isnan().all()


def test_llm_int8s_product_alone() -> None:
    """Rounded to fp16 as far as fp16 goes: bitsandbytes' own numbers there."""
    from gemcut.kernels.linear.case import LinearCase
    from gemcut.kernels.linear.plain import plain_linear

    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    x[1, 7] = 1e6
    weight = quantize_int8(torch.randn(7, 48, generator=torch.Generator().manual_seed(1)))
    found = plain_linear(LinearCase((weight,), torch.float16, torch.float32, 6.0), x)
    wanted = x.half().float()
    wanted[1, 7] = 1e6
    assert torch.equal(found, llm_int8_product(wanted, weight, 6.0))
