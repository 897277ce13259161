"""Names, shapes and numbers of the network's parts beside transformers' modules of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import support
from gemcut import hf
from gemcut.errors import CheckpointError, ParameterError, UnsupportedError

load = hf.AutoModelForCausalLM.from_pretrained
IDS = torch.tensor([[2, 10, 11, 12, 13], [2, 20, 21, 22, 23]])
#: Both compute in fp32, in another order.
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=["gemma2", "gemma3_text"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(gemcut's model, transformers' model) of one tiny checkpoint."""
    reference = support.hf_model(support.tiny_config(request.param, bos_token_id=2, eos_token_id=1, pad_token_id=0))
    folder = support.save_checkpoint(tmp_path_factory.mktemp(request.param) / "tiny", reference, tokenizer=True)
    return load(folder), reference


def test_parameters(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    mine, right = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(mine) == list(right)
    for name, parameter in right.items():
        assert isinstance(mine[name], nn.Parameter)
        assert mine[name].dtype == parameter.dtype
        # A norm is held as 1 + w, so w comes back to within the rounding of that.
        torch.testing.assert_close(mine[name], parameter.detach(), rtol=0, atol=2e-7 if "norm" in name else 0)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    assert not any(p.requires_grad for p in ours.parameters())
    assert ours.requires_grad_(False) is ours
    assert list(dict(ours.named_parameters(remove_duplicate=False))) == list(
        dict(theirs.named_parameters(remove_duplicate=False))
    )
    assert ours.get_parameter("model.norm.weight").shape == theirs.get_parameter("model.norm.weight").shape
    assert list(ours.named_buffers()) == list(ours.buffers()) == []


def test_state_dict(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    mine, right = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(right)
    for name, tensor in right.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=2e-7 if "norm" in name else 0)
    again = type(theirs)(theirs.config)
    again.load_state_dict(mine)
    torch.testing.assert_close(again.eval()(IDS).logits, theirs(IDS).logits, **CLOSE)


def test_modules(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    assert len(list(ours.modules())) == len(list(theirs.modules()))
    linear = [name for name, module in theirs.named_modules() if isinstance(module, nn.Linear)]
    assert [name for name, module in ours.named_modules() if isinstance(module, nn.Linear)] == linear
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    assert list(ours.children()) == [ours.model, ours.lm_head]
    assert ours.get_submodule("model.layers.1.mlp.up_proj").weight.shape == (96, 48)
    assert len(ours.model.layers) == len(theirs.model.layers)
    with pytest.raises(AttributeError):
        ours.get_submodule("model.layers.9")


def test_parts_compute_what_theirs_do(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    torch.testing.assert_close(ours.get_input_embeddings()(IDS), theirs.get_input_embeddings()(IDS), **CLOSE)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.2.mlp.gate_proj", "model.norm", "lm_head"):
        torch.testing.assert_close(ours.get_submodule(name)(x), theirs.get_submodule(name)(x), **CLOSE)
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert torch.equal(ours.get_input_embeddings().weight, theirs.get_input_embeddings().weight)
    assert ours.get_decoder() is ours.model is ours.base_model


def test_hidden_states(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for call in ({}, {"attention_mask": mask}):
        mine = ours(IDS, output_hidden_states=True, **call)
        right = theirs(IDS, output_hidden_states=True, **call)
        assert len(mine.hidden_states) == len(right.hidden_states)
        kept = call.get("attention_mask", torch.ones_like(IDS)).bool()
        for one, other in zip(mine.hidden_states, right.hidden_states, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one[kept], other[kept], **CLOSE)
            assert not one[~kept].any()
        torch.testing.assert_close(mine.logits[kept], right.logits[kept], **CLOSE)
        last = ours.model(IDS, **call).last_hidden_state
        torch.testing.assert_close(last[kept], theirs.model(IDS, **call).last_hidden_state[kept], **CLOSE)
    assert ours(IDS).hidden_states is None
    assert torch.equal(ours.model(input_ids=IDS)[0], ours(IDS, output_hidden_states=True)["hidden_states"][-1])


def test_transition_scores(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    mine, right = ours.generate(IDS, **options), theirs.generate(IDS, **options)
    assert torch.equal(mine.sequences, right.sequences)
    for normalize in (False, True):
        torch.testing.assert_close(
            ours.compute_transition_scores(mine.sequences, mine.logits, normalize_logits=normalize),
            theirs.compute_transition_scores(right.sequences, right.logits, normalize_logits=normalize),
            **CLOSE,
        )
    with pytest.raises(UnsupportedError, match="beam search"):
        ours.compute_transition_scores(mine.sequences, mine.scores, beam_indices=IDS)
    with pytest.raises(ParameterError, match="needs scores"):
        ours.compute_transition_scores(mine.sequences, None)


def test_what_a_part_refuses(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    layer = model.model.layers[0]
    with pytest.raises(UnsupportedError, match="DecoderLayer is not run alone"):
        layer(torch.zeros(1, 3, 48))
    for module in (layer, layer.mlp.up_proj, model.get_input_embeddings()):
        with pytest.raises(UnsupportedError, match="no hook can be registered"):
            module.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="train"):
        model.model.train()
    with pytest.raises(UnsupportedError, match="requires_grad_"):
        model.requires_grad_()
    with pytest.raises(ParameterError, match="labels"):
        model.model(IDS, labels=IDS)
    with pytest.raises(AttributeError, match="'resize_token_embeddings': the network is fixed"):
        model.resize_token_embeddings(100)


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        {"load_in_8bit": True},
    ],
)
def test_quantized_names_are_those_of_bitsandbytes(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    reference = support.hf_model(support.tiny_config(hidden_size=64, intermediate_size=128), dtype=torch.bfloat16)
    folder = support.save_checkpoint(tmp_path / "tiny", reference, tokenizer=True)
    ours = load(folder, dtype=torch.bfloat16, quantization_config=hf.BitsAndBytesConfig(**options))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=transformers.BitsAndBytesConfig(**options), device_map="cpu"
    )
    mine, right = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(mine) == list(right)
    assert [(p.shape, p.dtype) for p in mine.values()] == [(p.shape, p.dtype) for p in right.values()]
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    for name, parameter in right.items():
        if parameter.dtype in (torch.uint8, torch.int8):
            assert torch.equal(mine[name], parameter)


def test_saving_twice(pair: tuple[Any, Any], tmp_path: Path) -> None:
    ours, theirs = pair
    folder = tmp_path / "saved"
    ours.save_pretrained(folder, max_shard_size=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    (folder / "notes.txt").write_text("mine")
    (folder / "adapter_model.safetensors").write_bytes(b"not the model's")
    ours.save_pretrained(folder)
    names = {"config.json", "generation_config.json", "model.safetensors", "notes.txt", "adapter_model.safetensors"}
    assert {file.name for file in folder.iterdir()} == names
    (folder / "adapter_model.safetensors").unlink()
    torch.testing.assert_close(type(theirs).from_pretrained(folder)(IDS).logits, theirs(IDS).logits, **CLOSE)
    (folder / "other.gguf").touch()
    with pytest.raises(CheckpointError, match=r"other\.gguf"):
        ours.save_pretrained(folder)
    assert (folder / "config.json").is_file()


def test_saving_over_the_folder_it_was_loaded_from(pair: tuple[Any, Any], tmp_path: Path) -> None:
    ours, _ = pair
    ours.save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "tokenizer.json").write_bytes((support.tokenizer_dir() / "tokenizer.json").read_bytes())
    model = load(tmp_path / "one")
    before = model(IDS).logits
    model.save_pretrained(tmp_path / "one", max_shard_size=20_000)
    assert torch.equal(model(IDS).logits, before)
    assert torch.equal(load(tmp_path / "one")(IDS).logits, before)


def test_an_empty_name_is_refused(pair: tuple[Any, Any], tokenizer: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for thing in (pair[0], tokenizer, pair[0].generation_config):
        for name in ("", None, 3):
            with pytest.raises(ParameterError, match="save_directory is"):
                thing.save_pretrained(name)
    assert not list(tmp_path.iterdir())
