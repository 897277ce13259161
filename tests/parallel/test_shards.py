"""What a rank holds of each weight: its values are those of the whole, as bitsandbytes dequantizes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gemcut.checkpoint.names import expected_shapes
from gemcut.config import FAMILY, GemmaConfig
from gemcut.errors import ParameterError
from gemcut.parallel import shards
from gemcut.parallel.shape import Share, Slice, check_split, local_config, refusal, slice_of
from gemcut.parallel.shards import cut_weight
from gemcut.quantization.dequantize import dequantize_weight
from gemcut.quantization.spec import Quantization
from gemcut.quantization.stream import quantize_tensors
from gemcut.quantization.weights import FourBitWeight, Int8Weight, Nested

bnb = pytest.importorskip("bitsandbytes.functional")


def random(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 7 + columns)
    scale = torch.rand((rows, 1), generator=generator) * 3  # so that statistics differ from block to block
    return (torch.randn((rows, columns), generator=generator) * scale).to(dtype)


def theirs(whole: Tensor, nested: bool) -> tuple[FourBitWeight, Tensor]:
    """bitsandbytes' NF4 of ``whole`` in our form, and what bitsandbytes dequantizes it to."""
    codes, state = bnb.quantize_4bit(whole, blocksize=64, compress_statistics=nested, quant_type="nf4")
    inner = Nested(state.state2.absmax, float(state.offset)) if nested else None
    weight = FourBitWeight(codes.view(-1), state.absmax, "nf4", 64, tuple(whole.shape), whole.dtype, inner)
    return weight, bnb.dequantize_4bit(codes, state)


def values(weight: Any) -> Tensor:
    return dequantize_weight(weight, torch.bfloat16)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((64, 256), Slice("rows", 16, 32)),
        ((1024, 256), Slice("rows", 512, 768)),  # begins with a group of 256 statistics
        ((64, 1024), Slice("columns", 256, 512)),
        ((37, 512), Slice("columns", 448, 512)),
        ((66, 128), Slice("rows", 33, 66)),
    ],
)
def test_a_part_of_nf4_has_the_values_that_bitsandbytes_gives_the_whole(
    nested: bool, shape: tuple[int, int], part: Slice
) -> None:
    weight, expected = theirs(random(*shape), nested)
    cut = cut_weight(weight, part)
    rows = slice(part.start, part.stop) if part.axis == "rows" else slice(None)
    columns = slice(part.start, part.stop) if part.axis == "columns" else slice(None)
    assert torch.equal(values(cut), expected[rows, columns])
    assert isinstance(cut, FourBitWeight)
    assert cut.codes.numel() * 2 == values(cut).numel()


def test_statistics_stay_8_bits_wide_where_their_groups_allow_it() -> None:
    weight, _ = theirs(random(1024, 256), True)
    rows, columns = cut_weight(weight, Slice("rows", 512, 768)), cut_weight(weight, Slice("columns", 0, 64))
    assert isinstance(rows, FourBitWeight)
    assert isinstance(columns, FourBitWeight)
    assert rows.absmax.dtype == torch.uint8
    assert rows.nested is not None
    assert rows.nested.scale.numel() == 4
    assert columns.absmax.dtype == torch.float32
    assert columns.nested is None
    # At 27B over 2, 4 and 8 devices it is so for every row split.
    config = FAMILY["gemma-2-27b"]
    for size in (2, 4, 8):
        for name, shape in expected_shapes(
            config.replace(num_hidden_layers=1, layer_types=("full_attention",))
        ).items():
            part = slice_of(name, config, Share(size - 1, size))
            if part is not None and part.axis == "rows" and name != "embed.weight":
                assert part.start * shape[1] // 64 % 256 == 0


@pytest.mark.parametrize("part", [Slice("rows", 3, 9), Slice("columns", 5, 31)])
def test_a_part_of_int8(part: Slice) -> None:
    whole = random(12, 32, torch.float16)
    codes, absmax, _ = bnb.int8_vectorwise_quant(whole)
    expected = bnb.int8_vectorwise_dequant(codes, absmax)
    cut = cut_weight(Int8Weight(codes, absmax, torch.float32), part)
    rows = slice(part.start, part.stop) if part.axis == "rows" else slice(None)
    columns = slice(part.start, part.stop) if part.axis == "columns" else slice(None)
    torch.testing.assert_close(
        dequantize_weight(cut, torch.float32), expected[rows, columns].float(), rtol=1e-6, atol=0
    )
    assert torch.equal(cut.codes, codes[rows, columns])


@pytest.mark.parametrize("name", sorted(FAMILY))
@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_ranks_hold_every_value_of_the_published_models_once(name: str, size: int) -> None:
    config = FAMILY[name]
    if refusal(config, size) is not None:
        assert config.num_attention_heads % size  # 4 heads over 8
        return
    one_layer = {"num_hidden_layers": 1, "layer_types": config.layer_types[:1]}
    small = local_config(config, size).replace(**one_layer)
    assert small.num_attention_heads * size == config.num_attention_heads
    whole, own = expected_shapes(config.replace(**one_layer)), expected_shapes(small)
    for tensor, shape in whole.items():
        parts = [slice_of(tensor, config, Share(rank, size)) for rank in range(size)]
        if tensor.endswith(".scale"):
            assert parts == [None] * size
            continue
        axis = 0 if parts[0].axis == "rows" else 1
        covered = [place for part in dict.fromkeys(parts) for place in range(part.start, part.stop)]
        assert covered == list(range(shape[axis]))
        if tensor != "embed.weight":
            assert {part.stop - part.start for part in parts} == {own[tensor][axis]}


def test_a_rank_has_the_key_value_head_of_its_queries() -> None:
    config = FAMILY["gemma-2-2b"]  # 8 heads, 4 key-value heads
    per_head = config.num_attention_heads // config.num_key_value_heads
    for rank in range(8):
        query = slice_of("layers.0.attention.q_proj.weight", config, Share(rank, 8))
        key = slice_of("layers.0.attention.k_proj.weight", config, Share(rank, 8))
        assert key.start // config.head_dim == query.start // config.head_dim // per_head


def tiny(**changes: Any) -> GemmaConfig:
    shape = {
        "num_hidden_layers": 2, "layer_types": FAMILY["gemma-2-2b"].layer_types[:2],
        "vocab_size": 320, "hidden_size": 64,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 512,
    }  # fmt: skip
    return FAMILY["gemma-2-2b"].replace(**{**shape, **changes})


@pytest.mark.parametrize(
    ("changes", "size", "spec", "reason"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 4, None, "6 attention heads"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, 4, None, "6 key-value heads"),
        ({"intermediate_size": 514}, 4, None, "514 columns of its MLP"),
        ({}, 3, None, "8 attention heads cannot be shared evenly by 3 devices"),
        ({"head_dim": 16}, 4, Quantization("nf4"), "no whole number of nf4 blocks of 64"),
        ({"vocab_size": 12}, 4, None, "vocabulary"),
    ],
)
def test_counts_that_do_not_divide_are_refused_with_the_reason(
    changes: dict[str, Any], size: int, spec: Quantization | None, reason: str
) -> None:
    with pytest.raises(ParameterError, match=reason) as caught:
        check_split(tiny(**changes), size, spec)
    assert "\n" not in str(caught.value)
    assert "expected 1" in str(caught.value)


def test_arithmetic_that_needs_whole_rows_is_refused_by_name() -> None:
    with pytest.raises(ParameterError, match="float16 is not supported over 2 devices"):
        check_split(tiny(), 2, None, torch.float16)
    with pytest.raises(ParameterError, match="activation_threshold"):
        check_split(tiny(), 2, Quantization("int8", activation_threshold=6.0))
    check_split(tiny(), 1, None, torch.float16)


@pytest.mark.parametrize("spec", [None, *(Quantization(f, double_quant=d) for f, d in
                                         [("int8", False), ("nf4", False), ("nf4", True)])])  # fmt: skip
@pytest.mark.parametrize("size", [2, 4])
def test_quantized_while_loading_a_part_is_that_of_the_whole(spec: Quantization | None, size: int) -> None:
    config = tiny()
    tensors = {name: random(*shape) if len(shape) == 2 else torch.ones(shape)
               for name, shape in expected_shapes(config).items()}  # fmt: skip
    modules = lambda name: name.removesuffix(".weight")  # noqa: E731
    whole = dict(tensors if spec is None else quantize_tensors(tensors.items(), spec, module_name=modules))
    for rank in range(size):
        share = Share(rank, size)
        if spec is None:
            own = dict(shards.cut_stream(tensors.items(), config, share))
        else:
            before = shards.cut_before(tensors.items(), config, share, spec)
            cut = quantize_tensors(before, spec, module_name=modules)
            own = dict(shards.cut_behind(cut, config, share, spec))
        assert own.keys() == whole.keys()
        for name, weight in own.items():
            expected, part = dequantize_weight(whole[name], torch.float32), slice_of(name, config, share)
            if part is not None:
                expected = expected.narrow(0 if part.axis == "rows" else 1, part.start, part.stop - part.start)
            assert torch.equal(dequantize_weight(weight, torch.float32), expected), name


def test_of_rows_in_a_file_no_others_are_read_and_columns_are_right(tmp_path: Any) -> None:
    gguf = pytest.importorskip("gguf")
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    from gguf import quants

    from gemcut.checkpoint.ggml_types import TYPES
    from gemcut.checkpoint.gguf_header import GgufTensor
    from gemcut.checkpoint.gguf_weight import GgufWeight
    from gemcut.checkpoint.mapped import MappedFile

    kind = gguf.GGMLQuantizationType.Q8_0
    raw = quants.quantize(random(64, 128, torch.float32).numpy(), kind)
    expected = torch.from_numpy(quants.dequantize(raw, kind))
    (tmp_path / "w").write_bytes(np.ascontiguousarray(raw).tobytes())

    read: list[tuple[int, int]] = []

    class Watched(MappedFile):
        def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            read.append((offset, offset + shape[0]))
            return super().tensor(offset, shape, dtype)

    file = Watched(tmp_path / "w")
    whole = GgufWeight(GgufTensor("w", file, TYPES[kind.value], (64, 128), 0, raw.nbytes), torch.float32,
                       ThreadPoolExecutor(1), None)  # fmt: skip
    rows = cut_weight(whole, Slice("rows", 16, 48))
    out = torch.empty((32, 128))
    rows.read(out)
    assert torch.equal(out, expected[16:48])
    assert min(a for a, _ in read) == 16 * raw.shape[1]
    assert max(b for _, b in read) == 48 * raw.shape[1]
    both = cut_weight(rows, Slice("columns", 40, 104))
    out = torch.empty((32, 64), dtype=torch.bfloat16)
    both.read(out)
    assert torch.equal(out, expected[16:48, 40:104].bfloat16())
