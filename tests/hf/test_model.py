"""Loading, the forward call, moving and saving, beside transformers' model on the same weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import gemcut
import support
from gemcut import hf
from gemcut.errors import ContextLengthError, GemcutError, ParameterError, UnsupportedError

load = hf.AutoModelForCausalLM.from_pretrained
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of a network that loads in no time, and transformers' model of it."""
    reference = support.hf_model(support.tiny_config())
    return support.save_checkpoint(tmp_path_factory.mktemp("small") / "model", reference, tokenizer=True), reference


# ---- from_pretrained ---------------------------------------------------------------------------------------------


def test_dtypes(folder: Path) -> None:
    assert load(folder).dtype == torch.float32  # as the card says, whatever the checkpoint's
    assert load(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(folder, dtype="torch.float16").dtype == torch.float16
    assert load(folder, dtype="auto").dtype == torch.float32
    assert load(folder, dtype="bfloat16", torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ParameterError, match=r"torch_dtype=torch\.float16 contradicts dtype=bfloat16"):
        load(folder, torch_dtype=torch.float16, dtype="bfloat16")
    with pytest.raises(ParameterError, match="int8"):
        load(folder, dtype=torch.int8)


@needs_no_gpu
def test_a_gpu_that_is_not_there_warns_once(folder: Path) -> None:
    with pytest.warns(UserWarning, match="no GPU") as seen:
        assert load(folder, device_map="cuda").device == torch.device("cpu")
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for place in ("auto", "cpu", "cuda:0", 0, {"": "cuda"}, {"": 0}, None, torch.device("cuda")):
            assert hf.placement.placement(place)[0] == torch.device("cpu")
        model = load(folder, device_map=0)
        assert model.to(0) is model
        assert model.to("cuda").to("cpu", torch.float32).cuda().cpu().eval() is model


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_safetensors": False}, UnsupportedError, "use_safetensors=False"),
        ({"attn_implementation": "flash_attention_2"}, UnsupportedError, "'flash_attention_2' computes in bfloat16 or"),
        ({"attn_implementation": "flash_attention_3"}, UnsupportedError, "attn_implementation='flash_attention_3'"),
        ({"attn_implementation": {"": "eager"}}, ParameterError, "attn_implementation"),
        ({"use_auth_token": "x"}, UnsupportedError, "use token="),
        ({"device_map": {"model.layers.0": 0, "model.layers.1": 1}}, UnsupportedError, "device_map with keys"),
        ({"device_map": "balanced_low_0"}, UnsupportedError, "device_map='balanced_low_0'"),
        ({"device_map": "everywhere"}, ParameterError, "device_map.*everywhere"),
        ({"devicemap": "auto"}, ParameterError, "no argument 'devicemap'"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str, folder: Path) -> None:
    with pytest.raises(error, match=message) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


def test_every_keyword_transformers_takes_is_known(folder: Path) -> None:
    """No argument of transformers' from_pretrained is called a misspelling."""
    named = transformers.PreTrainedModel.from_pretrained.__func__.__code__
    names = set(named.co_varnames[1 : named.co_argcount + named.co_kwonlyargcount]) - {"pretrained_model_name_or_path"}
    assert {"config", "cache_dir", "revision", "token"} <= names
    for name in names - {"cache_dir", "local_files_only", "token", "revision"}:
        with pytest.raises(UnsupportedError, match=f"{name}="):
            load(folder, **{name: object()})


def test_harmless_arguments(folder: Path) -> None:
    model = load(
        folder,
        low_cpu_mem_usage=True,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation="eager",
        load_in_4bit=False,
        quantization_config=None,
        token=None,
        local_files_only=True,
    )
    assert isinstance(model.gemma, gemcut.Gemma)
    with pytest.warns(UserWarning, match="revision='float16' has no effect"):
        load(folder, revision="float16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, revision="main")


def test_missing_checkpoint(tmp_path: Path) -> None:
    for call in (load, hf.AutoTokenizer.from_pretrained, hf.GenerationConfig.from_pretrained):
        with pytest.raises(GemcutError, match="does not exist"):
            call(tmp_path / "nothing")


# ---- the model object --------------------------------------------------------------------------------------------


def test_attributes(model: Any, reference: Any) -> None:
    assert model.num_parameters() == reference.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters(exclude_embeddings=True) == reference.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) == 0
    assert next(model.parameters()).device == model.device
    ours, theirs = model.config.to_dict(), reference.config.to_dict()
    assert len(ours.keys() & theirs.keys()) > 20
    shared = ours.keys() & theirs.keys()
    assert {name for name in shared if ours[name] != theirs[name]} == {"_name_or_path"}
    assert model.config.hidden_size == 32
    assert model.config.dtype == model.config.torch_dtype == torch.float32
    assert model.config.eos_token_id == 1
    with pytest.raises(UnsupportedError, match=r"config\.hidden_size cannot be changed"):
        model.config.hidden_size = 3
    with pytest.raises(AttributeError, match="no attribute 'hidden'"):
        _ = model.config.hidden
    assert model.generation_config.pad_token_id == 0
    assert model.generation_config.cache_implementation == "hybrid"
    assert model.training is False
    assert model.train(False) is model
    with pytest.raises(UnsupportedError, match="train"):
        model.train()
    with pytest.raises(UnsupportedError, match="load it with dtype"):
        model.to(torch.float16)


def test_moving_rebuilds_the_same_model(small: tuple[Path, Any]) -> None:
    """With two CPUs to torch's mind, since not every machine has a GPU."""
    path, reference = small
    model = load(path)
    ids = torch.randint(4, 320, (2, 20))
    before, answers = model(ids).logits, model.generate(ids, max_new_tokens=9)
    old = model.gemma
    model.gemma = hf.loading.moved(old, torch.device("cpu"))
    assert model.gemma is not old
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=9), answers)
    assert answers.tolist() == reference.generate(ids, max_new_tokens=9, do_sample=False).tolist()
    stream = model.gemma.stream([2, 5], max_new_tokens=9)
    with pytest.raises(ParameterError, match="still generating"):
        hf.loading.moved(model.gemma, torch.device("cpu"))
    stream.cancel()


@pytest.mark.gpu
def test_moving_to_the_gpu(small: tuple[Path, Any]) -> None:
    path, reference = small
    model = load(path)
    ids = torch.randint(4, 320, (2, 20))
    expected = reference.generate(ids, max_new_tokens=9, do_sample=False)
    for where in ("cuda", "cpu", 0):
        model.to(where)
        assert model.device.type == next(model.parameters()).device.type == torch.device(where).type
        assert torch.equal(model.generate(ids, max_new_tokens=9), expected)
        on_gpu = model.generate(ids.to("cuda"), max_new_tokens=9)
        assert on_gpu.is_cuda
        assert torch.equal(on_gpu.cpu(), expected)
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=1e-4, rtol=0)
    assert load(path, device_map="auto").device == torch.device("cuda", 0)
    assert load(path).device == torch.device("cpu")


# ---- forward -----------------------------------------------------------------------------------------------------


def test_logits_and_loss(small: tuple[Path, Any]) -> None:
    path, reference = small
    model = load(path)
    ids = torch.randint(4, 320, (3, 21))
    ours, theirs = model(ids, labels=ids), reference(ids, labels=ids)
    assert ours.logits.dtype == torch.float32
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=0)
    assert ours[0] is ours.loss
    assert ours["logits"] is ours[1] is ours.to_tuple()[1]
    assert model(ids).loss is None
    assert model(ids)[0].shape == (3, 21, 320)
    assert list(model(input_ids=ids)) == ["logits"]
    kept = model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(kept, model(ids).logits[:, -2:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_and_loss(side: str, small: tuple[Path, Any]) -> None:
    path, reference = small
    model = load(path)
    ids, mask = torch.randint(4, 320, (3, 21)), torch.ones(3, 21).long()
    for row, padding in enumerate((0, 5, 18)):
        mask[row, :padding] = 0
    if side == "right":
        mask = mask.flip(1)
    ids = ids * mask
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left":  # what a masked position is followed by, transformers predicts from that position
        first = mask.argmax(dim=1)
        labels[torch.arange(3), first] = torch.where(first > 0, -100, labels[torch.arange(3), first])
    ours = model(input_ids=ids, attention_mask=mask, labels=labels)
    theirs = reference(input_ids=ids, attention_mask=mask, labels=labels)
    kept = mask.bool()
    torch.testing.assert_close(ours.logits[kept], theirs.logits[kept], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=0)
    assert (ours.logits[~kept] == 0).all()
    torch.testing.assert_close(model(ids, mask, logits_to_keep=4).logits, ours.logits[:, -4:], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"position_ids": torch.arange(3)[None]}, UnsupportedError, "position_ids="),
        ({"past_key_values": object()}, UnsupportedError, "past_key_values="),
        ({"inputs_embeds": torch.zeros(1, 3, 4)}, UnsupportedError, "inputs_embeds="),
        ({"use_cache": True}, UnsupportedError, "use_cache=True"),
        ({"output_attentions": True}, UnsupportedError, "output_attentions=True"),
        ({"return_dict": False}, UnsupportedError, "return_dict=False"),
        ({"inputids": 3}, ParameterError, "no argument 'inputids'"),
        ({"labels": torch.zeros(1, 2).long()}, ParameterError, "labels has shape"),
        ({"logits_to_keep": -1}, ParameterError, "logits_to_keep is -1"),
    ],
)
def test_forward_refusals(options: dict[str, Any], error: type[Exception], message: str, model: Any) -> None:
    with pytest.raises(error, match=message):
        model(torch.tensor([[2, 5, 6]]), **options)


def test_forward_of_nothing_and_of_too_much(model: Any) -> None:
    with pytest.raises(ParameterError, match="needs input_ids"):
        model()
    with pytest.raises(ContextLengthError, match="65 tokens in a row; this model takes 64"):
        model(torch.full((1, 65), 5))


# ---- saving ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_saved_model_loads_in_transformers(small: tuple[Path, Any], tmp_path: Path) -> None:
    path, reference = small
    model, tokenizer = load(path), hf.AutoTokenizer.from_pretrained(path)
    model.generation_config.max_new_tokens = 6
    ids = torch.randint(4, 320, (1, 20))
    for order in ("model first", "tokenizer first"):
        target = tmp_path / order
        if order == "tokenizer first":
            tokenizer.save_pretrained(target)
        model.save_pretrained(target, max_shard_size="40KB")
        if order == "model first":
            tokenizer.save_pretrained(target)
        assert len(list(target.glob("*.safetensors"))) > 1
        assert not [p for p in target.iterdir() if p.name.startswith(".")]
        back = transformers.AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager").float()
        for (name, ours), (_, theirs) in zip(
            sorted(back.state_dict().items()), sorted(reference.state_dict().items()), strict=True
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-6 if "norm" in name else 0, rtol=0)
        assert load(target).generate(ids).shape == (1, 26)
        assert hf.AutoTokenizer.from_pretrained(target).encode("hi") == [2, 544]
        model.save_pretrained(target)  # again, in one file
        assert [file.name for file in target.glob("model*")] == ["model.safetensors"]
        assert load(target).generate(ids).shape == (1, 26)
    with pytest.raises(ParameterError, match="max_shard_size is '5 bananas'"):
        model.save_pretrained(tmp_path / "new", max_shard_size="5 bananas")
    with pytest.raises(UnsupportedError, match="safe_serialization=False"):
        model.save_pretrained(tmp_path / "new", safe_serialization=False)
