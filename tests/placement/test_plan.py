"""The memory plan against hand computation, against the network's own parameters and against a real cache."""

from __future__ import annotations

import pytest
import torch

import support
from engine.driver import CPU, small_model
from gemcut.checkpoint.names import expected_shapes, hf_module
from gemcut.config import FAMILY, GemmaConfig
from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.errors import CapacityError, ParameterError
from gemcut.model import Model
from gemcut.placement.plan import DTYPE_BYTES, MemoryPlan, weight_bytes
from gemcut.quantization.spec import Quantization
from gemcut.quantization.stream import quantize_tensors

GB = 10**9


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_weights_are_those_of_the_network(name: str, dtype: str) -> None:
    config = FAMILY[name]
    with torch.device("meta"):
        model = Model(config, dtype=getattr(torch, dtype))
    parameters = list(model.parameters())
    assert MemoryPlan.make(config, dtype=dtype).weights == sum(p.numel() * p.element_size() for p in parameters)
    assert config.num_parameters() == sum(p.numel() for p in parameters)


CUTS = [
    Quantization("nf4"),
    Quantization("nf4", double_quant=False, block_size=128, head="int8"),
    Quantization("fp4", block_size=4096, skip=("o_proj", "model.layers.1")),
    Quantization("int8", head="int8"),
]


@pytest.mark.parametrize("spec", CUTS, ids=str)
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_cut_weights_are_counted_to_the_byte(spec: Quantization, kind: str) -> None:
    config = GemmaConfig.from_dict(support.tiny_config(kind, hidden_size=52, intermediate_size=101).to_dict())
    whole = ((name, torch.ones(shape)) for name, shape in expected_shapes(config).items())
    stream = quantize_tensors(whole, spec, module_name=hf_module, dtype=torch.bfloat16)
    held = 0
    for name, weight in stream:
        whole_matrix = isinstance(weight, torch.Tensor) and not name.endswith(".scale")
        held += weight.numel() * 2 if whole_matrix and isinstance(weight, torch.Tensor) else weight.nbytes
    assert weight_bytes(config, "bfloat16", spec) == held


def test_cut_27b_by_hand() -> None:
    config = FAMILY["gemma-2-27b"]
    linears = 46 * 4608 * (2 * 32 * 128 + 2 * 16 * 128 + 3 * 36864)
    table, norms = 256_000 * 4608, 4 * 4608 * (4 * 46 + 1)
    nf4 = linears // 2 + linears // 64 + 4 * (linears // 64 // 256)
    assert round(nf4 / GB, 2) == 13.44
    assert round(table * 2 / GB, 2) == 2.36
    assert MemoryPlan.make(config, quantization=Quantization("nf4")).weights == nf4 + table * 2 + norms
    small = MemoryPlan.make(config, quantization=Quantization("nf4", head="int8"))
    assert small.weights == nf4 + table + 4 * 256_000 + norms
    assert small.label == "nf4 + int8 head"
    rows = 46 * (2 * 32 * 128 // 2 + 2 * 16 * 128 + 4608 + 2 * 36864 + 4608)
    assert MemoryPlan.make(config, quantization=Quantization("int8")).weights == linears + 4 * rows + table * 2 + norms


@pytest.mark.parametrize(
    ("name", "billions", "bf16", "fp32", "kv"),
    [
        # Parameters, weights and bytes a token as published and computed by hand from the shapes:
        # keys and values of a token: 2 · layers · kv heads · head_dim · 2 bytes.
        ("gemma-2-27b", 27.227, 54.5, 108.9, 2 * 46 * 16 * 128 * 2),
        ("gemma-2-9b", 9.242, 18.5, 37.0, 2 * 42 * 8 * 256 * 2),
        ("gemma-2-2b", 2.614, 5.2, 10.5, 2 * 26 * 4 * 256 * 2),
    ],
)
def test_published_numbers(name: str, billions: float, bf16: float, fp32: float, kv: int) -> None:
    plan = MemoryPlan.make(FAMILY[name])
    assert round(FAMILY[name].num_parameters() / 1e9, 3) == billions
    assert round(plan.weights / GB, 1) == bf16
    assert round(MemoryPlan.make(FAMILY[name], dtype="float32").weights / GB, 1) == fp32
    assert plan.full_kv_per_token + plan.sliding_kv_per_token == kv


def test_27b_cache_by_hand() -> None:
    config = FAMILY["gemma-2-27b"]
    plan = MemoryPlan.make(config)
    assert plan.full_kv_per_token + plan.sliding_kv_per_token == 376_832
    assert plan.full_kv_per_token == plan.sliding_kv_per_token == 188_416  # 23 layers of each kind
    # All layers over 8,192 tokens 3.09 GB; half of them over a window of 4,096 alone 2.32 GB.
    assert round(8192 * 376_832 / GB, 2) == 3.09
    hybrid = 8192 * plan.full_kv_per_token + 4096 * plan.sliding_kv_per_token
    assert round(hybrid / GB, 2) == 2.32
    # Ours also holds the tokens of one step (here one), in whole blocks of 16 that may begin and end anywhere.
    least = MemoryPlan.make(config, chunk=1)
    assert hybrid <= least.kv(8192) <= hybrid + 16 * plan.sliding_kv_per_token
    assert plan.kv(8192) == hybrid + (512 + 16) * plan.sliding_kv_per_token
    # Below the window nothing is saved, beyond it each token costs the full layers alone.
    assert plan.kv(4096) == 4096 * 376_832
    assert plan.kv(8192) - plan.kv(8192 - 160) == 160 * 188_416
    assert MemoryPlan.make(config, dtype="float32").kv(8192) == 2 * plan.kv(8192)


def test_gemma3_has_few_full_layers() -> None:
    plan = MemoryPlan.make(FAMILY["gemma-3-270m"])
    assert plan.full_kv_per_token == 2 * 3 * 1 * 256 * 2
    assert plan.sliding_kv_per_token == 2 * 15 * 1 * 256 * 2


@pytest.mark.parametrize("name", FAMILY)
def test_totals(name: str) -> None:
    plan = MemoryPlan.make(FAMILY[name], context=1000, batch=3)
    assert plan.total == plan.weights + plan.workspace + 3 * plan.kv(1000)
    assert plan.fits is plan.largest_context is plan.largest_batch is None
    exact = MemoryPlan.make(FAMILY[name], context=1000, batch=3, memory=plan.total)
    assert exact.fits
    assert exact.largest_batch == 3
    short = MemoryPlan.make(FAMILY[name], context=1000, batch=3, memory=plan.total - 1)
    assert short.fits is False
    assert short.largest_batch == 2


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("chunk", [1, 512, 2048])
def test_largest_context(name: str, chunk: int) -> None:
    config = FAMILY[name]
    limit = config.max_position_embeddings
    empty = MemoryPlan.make(config, chunk=chunk, memory=0)
    fixed = empty.weights + empty.workspace
    assert empty.largest_context == empty.largest_batch == 0
    assert MemoryPlan.make(config, chunk=chunk, memory=fixed - 1).largest_context == 0
    before = 0
    for memory in range(fixed, fixed + int(1.3 * empty.kv(limit)), max(1, empty.kv(limit) // 60)):
        plan = MemoryPlan.make(config, chunk=chunk, memory=memory)
        context = plan.largest_context
        assert context is not None
        assert context >= before
        assert plan.kv(context) <= memory - fixed or context == 0
        assert context == limit or plan.kv(context + 1) > memory - fixed
        before = context
    assert before == limit


def test_engine_keeps_the_plan() -> None:
    """What the plan calls the largest context is what an engine with that much memory for its cache serves."""
    model = small_model(window=20, context=96)
    for tokens in (10, 30, 60, 90):
        wanted = MemoryPlan.make(model.config, dtype="float32", chunk=16)
        room = wanted.kv(tokens)
        memory = wanted.weights + wanted.workspace + room
        largest = MemoryPlan.make(model.config, dtype="float32", chunk=16, memory=memory).largest_context
        assert largest is not None
        assert largest >= tokens
        engine = Engine(model, CPU, EngineConfig(kv_memory=room, max_batch_tokens=16))
        assert engine.cache.nbytes <= room
        params = SamplingParams(max_new_tokens=2, temperature=0)
        sequence = engine.submit(Request(prompt_ids=(1,) * (largest - 2), params=params))
        while engine.has_work:
            engine.step()
        assert len(sequence.tokens) == largest
        if largest < 96:
            with pytest.raises(CapacityError):
                engine.submit(Request(prompt_ids=(1,) * (largest - 1), params=params))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context is 0; this model takes from 1 to 8192"),
        ({"context": 8193}, "context is 8193"),
        ({"batch": 0}, "batch is 0; expected at least 1"),
        ({"chunk": -1}, "chunk is -1"),
        ({"dtype": "int3"}, "dtype is 'int3'; expected one of float32, bfloat16, float16"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        MemoryPlan.make(FAMILY["gemma-2-2b"], **arguments)  # type: ignore[arg-type]
