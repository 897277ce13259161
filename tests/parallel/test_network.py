"""The network over several ranks: its logits are those of one, in every format and split."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemcut.checkpoint.resolve import resolve
from gemcut.loading import export_network, load_network
from gemcut.model.dense import dense_logits
from gemcut.parallel import communicator as communicators
from gemcut.parallel.communicator import GroupCommunicator
from model.build import random_ids, their_logits
from parallel.cases import FORMATS, SHAPE, checkpoint, network, ranks
from support import hf_model, tiny_config

IDS = random_ids(9, vocab_size=SHAPE["vocab_size"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("tiny"))


def logits(folder: Path, name: str, communicator: GroupCommunicator) -> Tensor:
    return dense_logits(network(folder, FORMATS[name], communicator), IDS)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_logits_are_those_of_one_process(folder: Path, name: str, size: int) -> None:
    expected = dense_logits(network(folder, FORMATS[name]), IDS)
    found = ranks(size, partial(logits, folder, name))
    for own in found:
        torch.testing.assert_close(own, expected, rtol=2e-5, atol=2e-5)
        assert torch.equal(own, found[0])  # every rank has the same bits
    again = ranks(size, partial(logits, folder, name))
    assert torch.equal(again[0], found[0])


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_logits_are_those_of_transformers(tmp_path: Path, model_type: str) -> None:
    folder = checkpoint(tmp_path, model_type)
    expected = their_logits(hf_model(tiny_config(model_type, **SHAPE)), IDS)
    found = ranks(4, partial(logits, folder, "fp32"))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int8", "nf4-double"])
def test_a_checkpoint_that_is_quantized_already(tmp_path: Path, name: str) -> None:
    from gemcut.checkpoint.write import save_folder

    whole = network(checkpoint(tmp_path / "whole"), FORMATS[name])
    folder = tmp_path / "quantized"
    save_folder(folder, whole.config, export_network(whole), None, 1 << 30, generation_config={},
                quantization=whole.quantization)  # fmt: skip
    expected = dense_logits(network(folder), IDS)

    def work(communicator: GroupCommunicator) -> tuple[Tensor, int]:
        model = network(folder, None, communicator)
        packed = [part for linear in model.layer_list for part in linear.attention.qkv_proj.unpacked()]
        return dense_logits(model, IDS), sum(part.nbytes for part in packed)

    found = ranks(2, work)
    torch.testing.assert_close(found[1][0], expected, rtol=2e-5, atol=2e-5)


def test_the_likeliest_token_is_the_first_of_the_largest_logits(folder: Path) -> None:
    hidden = torch.randn((5, SHAPE["hidden_size"]), generator=torch.Generator().manual_seed(1))
    expected = network(folder).embed.logits(hidden)

    def best(communicator: GroupCommunicator, rows: Tensor) -> Tensor:
        table = network(folder, None, communicator).embed
        assert table.part is not None
        return table.part.best(rows, table.product, lambda logits: logits)

    for found in ranks(4, partial(best, rows=hidden)):
        assert found[:, 0].long().tolist() == expected.argmax(dim=-1).tolist()
        torch.testing.assert_close(found[:, 1].float(), expected.amax(dim=-1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[:, 2].float(), expected.amin(dim=-1), rtol=1e-5, atol=1e-5)
    zeros = ranks(4, partial(best, rows=torch.zeros_like(hidden)))
    assert zeros[3][:, 0].tolist() == [0.0] * 5
    bad = hidden.clone()
    bad[2, 3] = float("nan")
    assert ranks(4, partial(best, rows=bad))[0].isfinite().all(dim=-1).tolist() == [True, True, False, True, True]


def test_a_rank_holds_its_part_alone(folder: Path) -> None:
    def held(communicator: GroupCommunicator | None) -> int:
        model = network(folder, None, communicator)
        return sum(p.numel() for name, p in model.named_parameters() if not name.endswith("scale"))

    whole, parts = held(None), ranks(4, held)
    assert sum(parts) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [3, 1000])
def test_sums_are_those_of_fp32_in_rank_order(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, numel: int) -> None:
    monkeypatch.setitem(communicators.ONE_SHOT_BYTES, "cpu", 100)
    generator = torch.Generator().manual_seed(3)
    parts = (torch.randn((4, numel), generator=generator) * 10 ** torch.arange(4)[:, None]).to(dtype)
    expected = parts[0].float()
    for part in parts[1:]:
        expected = expected + part.float()
    found = ranks(4, lambda communicator: communicator.sum(parts[communicator.rank]))
    assert all(torch.equal(own, expected.to(dtype)) for own in found)
    one_row = ranks(4, lambda communicator: communicator.gather(parts[communicator.rank]))
    assert all(torch.equal(own, parts) for own in one_row)


def test_bf16_kernels_of_the_cpu_sum_too(folder: Path) -> None:
    def work(communicator: GroupCommunicator | None) -> Tensor:
        from gemcut.parallel.shape import Share
        from gemcut.parallel.split import Split

        source = resolve(str(folder))
        split = None
        if communicator is not None:
            split = Split(source.config(), Share(communicator.rank, communicator.size), communicator)
        model = load_network(source, dtype=torch.bfloat16, device=torch.device("cpu"), split=split)
        return dense_logits(model, IDS)

    expected, found = work(None), ranks(2, work)
    exact = dense_logits(network(folder), IDS)
    ours, one = (found[0] - exact).square().mean().sqrt(), (expected - exact).square().mean().sqrt()
    assert ours < 1.3 * one
