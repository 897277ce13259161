"""A layer owns its weights once, whatever order its kernel reads them in, and gives them back bit for bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from gemcut.checkpoint.load import load_model_weights
from gemcut.checkpoint.names import expected_shapes, hf_module, to_hf
from gemcut.config import GemmaConfig
from gemcut.kernels.gpu import PRESETS
from gemcut.kernels.linear import cuda, dispatch
from gemcut.kernels.linear.case import LinearImplementation
from gemcut.loading import build_network, export_network, move_network
from gemcut.model import Model
from gemcut.model.bind import bind_kernels, bind_products, release_products
from gemcut.model.dense import dense_logits
from gemcut.model.linear import WeightOwner
from gemcut.model.quantized import Int8Embedding, QuantizedOwner
from gemcut.quantization.spec import Quantization
from gemcut.quantization.state import to_stored
from gemcut.quantization.stream import quantize_tensors
from gemcut.quantization.weights import CheckpointWeight, PackedWeight
from support import tiny_config

SPECS = {
    "nf4": Quantization("nf4", head="int8"),
    "fp4": Quantization("fp4"),
    "nf4 flat": Quantization("nf4", double_quant=False),
    "int8": Quantization("int8", head="int8"),
}
# Sizes that the four-bit kernels take: blocks end with their rows, groups of 256 blocks with their matrices.
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 2,
}
CPU = torch.device("cpu")


def loaded(spec: Quantization) -> tuple[Model, dict[str, Tensor]]:
    """(a random network, the tensors of a file that hold its quantized weights, their names Hugging Face's)."""
    config = GemmaConfig.from_dict(tiny_config(**SIZES).to_dict())
    generator = torch.Generator().manual_seed(0)
    whole = {
        name: (torch.randn(shape, generator=generator) * 0.1).to(torch.bfloat16)
        for name, shape in expected_shapes(config).items()
    }
    given = dict(quantize_tensors(whole.items(), spec, module_name=hf_module, dtype=torch.bfloat16))
    model = build_network(config, dtype=torch.bfloat16, device=CPU, quantization=spec)
    load_model_weights(model, given.items(), dtype=torch.bfloat16, device=CPU)
    return model, stored((to_hf(name), weight) for name, weight in given.items())


def stored(weights: Iterable[tuple[str, CheckpointWeight]]) -> dict[str, Tensor]:
    quantized = ((name, weight) for name, weight in weights if not isinstance(weight, Tensor))
    return {key: tensor for name, weight in quantized for key, tensor in to_stored(name, weight).items()}


def same(found: dict[str, Tensor], given: dict[str, Tensor]) -> bool:
    # A file has no form for a table in 8 bits: it is saved whole.
    given = {key: tensor for key, tensor in given.items() if "embed_tokens" not in key}
    assert found.keys() == given.keys()
    assert len(given) > 14
    return all(torch.equal(found[key], given[key]) and found[key].dtype == given[key].dtype for key in given)


@pytest.fixture(params=["h100", "a100"])
def as_on_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA kernels are prepared as on this GPU, in the CPU's memory; what they launch cannot run here."""

    class Buffer:
        def announce(self, n: int, k: int, most: int) -> None:
            pass

    monkeypatch.setattr(cuda, "gpu_of", lambda device: PRESETS[request.param])
    monkeypatch.setattr(cuda, "_buffer", lambda device: Buffer())
    first = LinearImplementation("cuda", lambda case, device: None, cuda.prepare)
    monkeypatch.setattr(dispatch, "LINEAR", [first, *dispatch.LINEAR[1:]])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_packed_network_saves_what_the_checkpoint_had(name: str) -> None:
    model, given = loaded(SPECS[name])
    owners = [module for module in model.modules() if isinstance(module, QuantizedOwner)]
    before = weakref.ref(owners[-1].weights[0].codes)  # type: ignore[union-attr]
    with torch.inference_mode():
        logits = dense_logits(model, torch.arange(20))
    bind_products(model, CPU)
    gc.collect()
    assert name == "int8" or before() is None  # packing made another copy, and nobody holds the first
    for owner in owners:
        (weight,) = owner.weights
        assert isinstance(weight, PackedWeight)
        assert owner.kernel is not None
        assert owner.kernel.weights == (weight,)
    assert same(stored(export_network(model)), given)
    if isinstance(model.embed, Int8Embedding):
        assert torch.equal(model.embed.table.codes, given["model.embed_tokens.weight"])
        assert torch.equal(model.embed.table.absmax, given["model.embed_tokens.SCB"])
    release_products(model)
    assert torch.equal(dense_logits(model, torch.arange(20)), logits)
    moved = move_network(model, CPU, "plain")
    assert not any(
        isinstance(w, PackedWeight) for m in moved.modules() if isinstance(m, WeightOwner) for w in m.weights
    )
    assert torch.equal(dense_logits(moved, torch.arange(20)), logits)
    bind_products(model, CPU)  # again, from packed weights
    assert same(stored(export_network(model)), given)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_saving_unpacks_one_matrix_at_a_time() -> None:
    model, _ = loaded(SPECS["nf4"])
    bind_products(model, CPU)
    made = []
    for _, weight in export_network(model):
        if not isinstance(weight, Tensor):
            made.append(weakref.ref(weight.codes))
        del weight
        assert sum(codes() is not None for codes in made) <= 1
    assert len(made) == 7 * len(model.layers)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("spec", [None, *SPECS.values()], ids=["bf16", *SPECS])
def test_every_layer_owns_what_its_kernel_reads(spec: Quantization | None, kernels: str) -> None:
    if spec is None:
        model = Model(GemmaConfig.from_dict(tiny_config(**SIZES).to_dict()), dtype=torch.bfloat16)
    else:
        model, _ = loaded(spec)
    bind_kernels(model, CPU, kernels)
    owners = {name: module for name, module in model.named_modules() if isinstance(module, WeightOwner)}
    assert len(owners) == 4 * len(model.layers) + 1
    for name, owner in owners.items():
        assert owner.name == name
        assert owner.kernel is not None
        assert all(read is own for read, own in zip(owner.kernel.weights, owner.weights, strict=True))
