"""GGUF: the real Gemma 3 270M against transformers, small Gemma 2 files written here, damage of every kind."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Q
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from gemcut.calibration.streamed import Rounded, compare_checkpoints
from gemcut.checkpoint import names
from gemcut.checkpoint.gguf_header import read_header
from gemcut.checkpoint.load import load_model_weights
from gemcut.checkpoint.resolve import resolve
from gemcut.config import FAMILY, GemmaConfig
from gemcut.errors import CheckpointError, ConfigError, GemcutError
from gemcut.kernels.cpu.dequantize import dequantize
from gemcut.loading import load_network
from gemcut.model.gemma import Model
from gemcut.quantization.four_bit import quantize_4bit
from gemcut.quantization.int8 import quantize_int8
from gemcut.quantization.spec import Quantization
from gemcut.quantization.stream import quantize_tensors
from gemcut.quantization.weights import FourBitWeight, Int8Weight, StoredWeight
from support import gguf_path, hf_model, save_checkpoint, tiny_config

# llama.cpp's names of a Gemma 2 layer, written out a second time.
LLAMA_CPP = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def llama_cpp_name(name: str) -> str:
    name = name.removeprefix("model.").removesuffix(".weight")
    if name in ("embed_tokens", "norm"):
        return {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{LLAMA_CPP[rest]}.weight"


def write_gguf(
    path: Path, kind: Q = Q.F16, architecture: str = "gemma2", skip: tuple[str, ...] = (), **overrides: Any
) -> dict[str, np.ndarray]:
    """A tiny Gemma 2 as llama.cpp's converter writes it; returns each tensor as it must come back, fp32."""
    config = tiny_config(hidden_size=64, intermediate_size=96, vocab_size=32)
    model = hf_model(config)
    writer = gguf.GGUFWriter(path, architecture)
    metadata: dict[str, Any] = {
        "context_length": 256,
        "embedding_length": 64,
        "block_count": 4,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.sliding_window": 4,
    }
    floats = {"attention.layer_norm_rms_epsilon": 1e-6, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
    for key, value in {**metadata, **floats, **overrides}.items():
        if value is None:
            continue
        if isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(32)])
    writer.add_token_scores([float(-i) for i in range(32)])
    writer.add_token_types([1] * 32)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(7)
    writer.add_add_space_prefix(False)
    expected = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        theirs, data = llama_cpp_name(name), value.numpy()
        if any(theirs.endswith(s) for s in skip):
            continue
        if "norm" in name:
            data = data + 1.0
            writer.add_tensor(theirs, data)
            expected[theirs] = data
        else:
            packed = gguf.quants.quantize(data, kind)
            writer.add_tensor(theirs, packed, raw_dtype=kind)
            expected[theirs] = gguf.quants.dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


# ---- the real file --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_270m() -> Any:
    """transformers' own reading of the file: {"config": ..., "tensors": ...}."""
    config = Gemma3TextConfig(**FAMILY["gemma-3-270m"].to_dict())
    with torch.device("meta"):
        empty = Gemma3ForCausalLM(config)
    return load_gguf_checkpoint(str(gguf_path()), return_tensors=True, model_to_load=empty, torch_dtype=torch.float32)


@pytest.mark.slow  # transformers parses the header for about 11 s
def test_the_real_270m_has_the_published_shape(transformers_270m: Any) -> None:
    config = resolve(gguf_path()).config()
    assert config.replace(torch_dtype="bfloat16") == FAMILY["gemma-3-270m"]
    theirs = transformers_270m["config"]
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "sliding_window"):
        assert getattr(config, name) == theirs[name], name
    assert config.rms_norm_eps == pytest.approx(theirs["rms_norm_eps"])


@pytest.mark.slow  # transformers parses the header for about 11 s
def test_the_real_270m_has_the_values_transformers_reads(transformers_270m: Any) -> None:
    theirs = transformers_270m["tensors"]
    seen = 0
    for name, tensor in resolve(gguf_path()).tensors():
        expected = torch.as_tensor(theirs[names.to_hf(name)])
        if name.endswith(".scale"):
            tensor = tensor - 1.0  # transformers takes the 1 away again
        assert tensor.dtype == expected.dtype == torch.float32
        assert torch.equal(tensor, expected), name
        seen += 1
    assert seen == len({name for name in theirs if name != "lm_head.weight"}) == 236


@pytest.mark.slow
def test_the_real_metadata_and_vocabulary(transformers_270m: Any) -> None:
    vocabulary = resolve(gguf_path())._gguf.vocabulary()
    theirs = transformers_270m["tokenizer"]
    assert vocabulary["tokens"] == theirs["tokens"]
    assert vocabulary["scores"] == theirs["scores"]
    assert vocabulary["types"] == theirs["token_type"]
    assert (vocabulary["bos_id"], vocabulary["eos_id"]) == (2, 1)
    assert resolve(gguf_path()).generation_config() == {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": [1]}


# ---- Gemma 2 written here -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q5_0, Q.Q4_1])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_gemma2_file_comes_back(tmp_path: Path, kind: Q, dtype: torch.dtype | None) -> None:
    expected = write_gguf(tmp_path / "x.gguf", kind)
    source = resolve(tmp_path / "x.gguf")
    found = dict(source.tensors(dtype=dtype))
    assert {names.to_gguf(name) for name in found} == expected.keys()
    for name, tensor in found.items():
        reference = torch.from_numpy(expected[names.to_gguf(name)])
        assert torch.equal(
            tensor.float(), reference if dtype is None or "scale" in name else reference.to(dtype).float()
        )
        assert tensor.shape == reference.shape == source.tensor_shapes()[name]
        if name.endswith(".scale"):
            assert tensor.dtype == torch.float32
    model_config = source.config()
    with torch.device("meta"):
        model = Model(model_config, dtype=torch.float32)
    load_model_weights(model, source.tensors(), dtype=torch.float32, device="cpu")
    assert torch.equal(model.norm.scale, torch.from_numpy(expected["output_norm.weight"]))


@pytest.mark.parametrize("kind", [Q.F16, Q.Q8_0, Q.Q5_0])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_file_can_be_read_in_inference_mode(tmp_path: Path, kind: Q, dtype: torch.dtype | None) -> None:
    """The threads that dequantize are not in the mode of whoever asked, and fill tensors that were made in it."""
    expected = write_gguf(tmp_path / "x.gguf", kind)
    with torch.inference_mode():
        found = dict(resolve(tmp_path / "x.gguf").tensors(dtype=dtype))
    for name, tensor in found.items():
        reference = torch.from_numpy(expected[names.to_gguf(name)]).to(tensor.dtype)
        assert torch.equal(tensor, reference), name


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q5_0, Q.Q4_0, Q.Q4_1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_kernels", [True, False])
def test_a_weight_is_read_into_its_place_and_in_pieces(
    tmp_path: Path, kind: Q, dtype: torch.dtype, by_kernels: bool
) -> None:
    expected = write_gguf(tmp_path / "x.gguf", kind)
    source = resolve(tmp_path / "x.gguf")
    seen = set()
    for name, weight in source.incoming(dtype=dtype, dequantize=dequantize if by_kernels else None):
        assert isinstance(weight, StoredWeight)
        values = torch.from_numpy(expected[names.to_gguf(name)])
        rounded = values.to(torch.float32 if name.endswith(".scale") else dtype)
        assert weight.dtype == rounded.dtype
        assert weight.shape == tuple(rounded.shape)
        # Into a place of another dtype it is rounded to its own first, as a tensor would be.
        for place in (weight.dtype, torch.bfloat16, torch.float32):
            out = torch.full(weight.shape, 7.0, dtype=place)
            weight.read(out)
            assert torch.equal(out, rounded.to(place)), name
        step = 3 * weight.shape[-1]
        pieces = [piece.clone() for piece in weight.pieces(step)]
        assert torch.equal(torch.cat(pieces), rounded.reshape(-1))
        assert {len(p) for p in pieces[:-1]} <= {step}
        seen.add(names.to_gguf(name))
    assert seen == expected.keys()


@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("skip", [None, ("o_proj",)])
def test_weights_cut_on_the_way_are_those_cut_whole(tmp_path: Path, form: Any, skip: tuple[str, ...] | None) -> None:
    """Cut piece by piece from the file, and cut from the whole matrix as gguf dequantizes it."""
    expected = write_gguf(tmp_path / "x.gguf", Q.Q8_0)
    source = resolve(tmp_path / "x.gguf")
    spec = Quantization(form, block_size=32, skip=skip)
    cut_here = quantize_tensors(source.incoming(dtype=torch.bfloat16), spec, module_name=names.hf_module)
    packed = 0
    for name, weight in cut_here:
        whole = torch.from_numpy(expected[names.to_gguf(name)])
        if isinstance(weight, StoredWeight):
            assert name == "embed.weight" or name.endswith(".scale") or (skip and "o_proj" in name)
            continue
        packed += 1
        rounded = whole.to(torch.bfloat16)
        reference: Any = (
            quantize_int8(rounded)
            if form == "int8"
            else quantize_4bit(rounded, form, block_size=32, double_quant=spec.double_quant)
        )
        assert isinstance(weight, (FourBitWeight, Int8Weight))
        assert weight.dtype == torch.bfloat16
        assert all(map(torch.equal, weight.tensors, reference.tensors)), name
    assert packed == 4 * (7 if skip is None else 6)


def test_a_nan_in_a_file_is_named_while_it_is_cut(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", Q.F16)
    at = read_header(tmp_path / "x.gguf").tensors["blk.1.ffn_up.weight"].offset
    data = bytearray((tmp_path / "x.gguf").read_bytes())
    data[at + 200 : at + 202] = b"\x00\x7e"
    (tmp_path / "x.gguf").write_bytes(data)
    for form in (None, "nf4", "int8"):
        spec = None if form is None else Quantization(form, block_size=32)
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
            load_network(
                resolve(tmp_path / "x.gguf"), dtype=torch.bfloat16, device=torch.device("cpu"), quantization=spec
            )


@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_a_comparison_from_a_file_is_that_from_a_folder(tmp_path: Path, form: Any) -> None:
    """What held-out text loses, the whole weights read from a quantized GGUF file or from a folder of the same."""
    expected = write_gguf(tmp_path / "x.gguf", Q.Q8_0)
    config = tiny_config(hidden_size=64, intermediate_size=96, vocab_size=32, query_pre_attn_scalar=16)
    model, values = hf_model(config), {}
    for name in model.state_dict():
        if name != "lm_head.weight":
            value = torch.from_numpy(expected[llama_cpp_name(name)])
            values[name] = value - 1.0 if "norm" in name else value
    model.load_state_dict(values, strict=False)
    file, folder = resolve(tmp_path / "x.gguf"), resolve(save_checkpoint(tmp_path / "folder", model))
    documents = [[2, 5, 9, 11, 30, 4, 4, 8], [2, 31, 17, 3]]
    spec = Quantization(form, block_size=32)
    found, wanted = (
        compare_checkpoints(source, [Rounded(source, spec), source], documents, dtype=torch.float32)
        for source in (file, folder)
    )
    assert found == wanted
    assert found[0].kl > found[1].kl == 0


def test_gemma2_metadata_becomes_the_config(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf")
    source = resolve(tmp_path / "x.gguf")
    expected = GemmaConfig.from_dict(tiny_config(hidden_size=64, vocab_size=32, query_pre_attn_scalar=16).to_dict())
    assert source.config() == expected.replace(eos_token_ids=(1, 7), torch_dtype=None)
    assert source.generation_config()["eos_token_id"] == [1, 7]
    vocabulary = source._gguf.vocabulary()
    assert vocabulary["tokens"][3] == "t3"
    assert vocabulary["scores"][3] == -3.0
    assert vocabulary["add_space_prefix"] is False


@pytest.mark.parametrize(("architecture", "layers", "heads"), [("gemma2", 46, 32), ("gemma3", 62, 32)])
def test_27b_divides_queries_by_hidden_over_heads(tmp_path: Path, architecture: str, layers: int, heads: int) -> None:
    """The file does not say it; llama.cpp knows the 27B by its number of layers, and so do we."""
    write_gguf(tmp_path / "x.gguf", architecture=architecture, block_count=layers)
    with pytest.raises(CheckpointError, match="is missing"):  # the other layers are not there
        resolve(tmp_path / "x.gguf").config()
    from gemcut.checkpoint.gguf_config import LAYERS_OF_27B

    assert LAYERS_OF_27B[architecture] == layers
    small = write_many_layers(tmp_path / "y.gguf", layers)
    assert small.config().query_pre_attn_scalar == 64 / 4
    assert small.config().head_dim == 8


def write_many_layers(path: Path, layers: int) -> Any:
    config = GemmaConfig.from_dict(
        {**tiny_config(hidden_size=64, num_hidden_layers=layers, head_dim=8, vocab_size=32).to_dict()}
        | ({"layer_types": None})
    )
    architecture = "gemma2" if layers == 46 else "gemma3"
    if architecture == "gemma3":
        config = config.replace(qk_norm=True)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"context_length": 256, "embedding_length": 64, "block_count": layers,
                       "feed_forward_length": 96, "attention.head_count": 4, "attention.head_count_kv": 2,
                       "attention.key_length": 8, "attention.sliding_window": 4}.items():  # fmt: skip
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    for name, shape in names.expected_shapes(config).items():
        writer.add_tensor(names.to_gguf(name), np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return resolve(path)


# ---- what must be refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"architecture": "llama"}, ConfigError, r"architecture 'llama'; gemcut reads 'gemma2' and 'gemma3'"),
        ({"architecture": "gemma"}, ConfigError, r"architecture 'gemma'"),
        (
            {"attention.head_count": None},
            ConfigError,
            r"gemma2.attention.head_count is 'None'; expected a whole number",
        ),
        ({"attention.head_count": "four"}, ConfigError, r"head_count is 'four'; expected a whole number"),
        ({"attention.head_count": 0}, ConfigError, r"num_attention_heads is 0"),
        ({"attention.head_count": 3}, ConfigError, r"not a multiple"),
        ({"attention.value_length": 8}, ConfigError, r"value_length is '8'; expected 16"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, ConfigError, r"rope_type is 'yarn'"),
        ({"feed_forward_length": 128}, CheckpointError, r"blk.0.ffn_.*has shape \[.*\]; the config asks for \[.*128"),
        ({"block_count": 5}, CheckpointError, r"blk.4.attn_norm.weight is missing and \d+ more"),
        ({"block_count": 3}, CheckpointError, r"unexpected tensor blk.3"),
        ({"skip": ("2.ffn_up.weight",)}, CheckpointError, r"blk.2.ffn_up.weight is missing"),
        ({"skip": ("token_embd.weight",)}, CheckpointError, r"token_embd.weight is missing"),
    ],
)
def test_files_of_another_kind_are_refused(
    tmp_path: Path, options: dict[str, Any], error: type[GemcutError], message: str
) -> None:
    write_gguf(tmp_path / "x.gguf", **options)
    with pytest.raises(error, match=message) as caught:
        resolve(tmp_path / "x.gguf").config()
    assert "\n" not in str(caught.value)


def test_not_a_gguf_file(tmp_path: Path) -> None:
    for content, message in [(b"", "is empty"), (b"GGUF", "not a GGUF file"), (b"PK" * 50, "not a GGUF file"),
                             (b"GGUF" + (1).to_bytes(4, "little") + bytes(40), "version 1"),
                             (b"GGUF" + (3).to_bytes(4, "big") + bytes(40), "big-endian")]:  # fmt: skip
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            resolve(tmp_path / "x.gguf").config()


def read_all(path: Path) -> None:
    source = resolve(path)
    source.config()
    source._gguf.vocabulary()
    source.generation_config()
    for _ in source.tensors():
        pass


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, Q.Q8_0)
    whole = path.read_bytes()
    end = max(tensor.offset + tensor.nbytes for tensor in read_header(path).tensors.values())
    for length in [*range(1, 3000, 37), *range(3000, end, 997), end - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_all(path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_damage_never_surprises(tmp_path: Path, seed: int) -> None:
    """Whatever bytes change, the answer is a GemcutError or (in tensor data, names, scores) other values."""
    path = tmp_path / "x.gguf"
    write_gguf(path, Q.Q8_0)
    whole = path.read_bytes()
    header = min(tensor.offset for tensor in read_header(path).tensors.values())
    dice = random.Random(seed)
    refused = 0
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(dice.choice([1, 1, 2, 8])):
            at = dice.randrange(header if dice.random() < 0.9 else len(raw))
            raw[at] = dice.choice([0, 255, raw[at] ^ (1 << dice.randrange(8)), dice.randrange(256)])
        if dice.random() < 0.2:  # a whole 64-bit size at once
            at = dice.randrange(8, header - 8)
            raw[at : at + 8] = dice.choice([1 << 63, (1 << 64) - 1, 1 << 40, 0]).to_bytes(8, "little")
        path.write_bytes(raw)
        try:
            with contextlib.closing(open(path, "rb")):
                read_all(path)
        except GemcutError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
    assert refused > 50


def test_the_real_file_damaged_in_its_header(tmp_path: Path) -> None:
    source = gguf_path().read_bytes()[: 8 << 20]
    path = tmp_path / "x.gguf"
    dice = random.Random(1)
    for _ in range(3):
        raw = bytearray(source)
        raw[dice.randrange(8, 1500)] ^= 0x80
        path.write_bytes(raw)
        with pytest.raises(GemcutError):
            read_all(path)
