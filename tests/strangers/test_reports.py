"""Public reports about other engines, tried here. docs/strangers.md lists them with links and verdicts.

Each test is named after what went wrong for its reporter; its right value comes from transformers, from the prompt's
own ids, or from arithmetic.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import support
from gemcut import Gemma, Quantization
from gemcut.engine import SamplingParams
from gemcut.errors import CheckpointError, ContextLengthError, GemcutError
from gemcut.hf import AutoModelForCausalLM, AutoTokenizer

CONTEXT = 96
WINDOW = 8
BOS, EOS, START, END = 2, 1, 106, 107

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' tiny Gemma 2 whose window (8) is much smaller than its context (96)."""
    config = support.tiny_config(
        vocab_size=256000, hidden_size=32, intermediate_size=64, sliding_window=WINDOW, max_position_embeddings=CONTEXT
    )
    model = support.hf_model(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.1)  # the layers decide, not the last token's own row
    return model


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.save_checkpoint(
        tmp_path_factory.mktemp("reports") / "tiny", theirs, tokenizer=True, bos_token_id=BOS, eos_token_id=EOS
    )


@pytest.fixture(scope="module")
def their_tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def gemma(folder: Path) -> Gemma:
    return _load(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The checkpoint's small files in a folder of their own, with the weights linked."""
    target = tmp_path / "copy"
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            (target / path.name).symlink_to(path)
        else:
            shutil.copyfile(path, target / path.name)
    return target


def _load(folder: Path, **options: Any) -> Gemma:
    return Gemma.load(folder, dtype="float32", device="cpu", progress=False, **options)


def _edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def _ids(count: int, seed: int = 0) -> list[int]:
    drawn = torch.randint(1000, 200_000, (count - 1,), generator=torch.Generator().manual_seed(seed))
    return [BOS, *drawn.tolist()]


def _their_greedy(theirs: Any, ids: list[int], new: int) -> list[int]:
    """Greedy ids by whole forward passes, without any cache."""
    text = list(ids)
    with torch.no_grad():
        for _ in range(new):
            text.append(int(theirs(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(ids) :]


def _greedy(gemma: Gemma, ids: list[int], new: int, **more: Any) -> list[int]:
    params = SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True, **more)
    return list(gemma.complete([ids], params)[0].token_ids)


# ---- long texts and the window -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [5, 512])
def test_long_prompts_repeat_themselves_or_crash(theirs: Any, folder: Path, chunk: int) -> None:
    """vllm #8580, llama.cpp #8227, transformers #31848: prompts longer than the window, read whole or in pieces."""
    gemma = _load(folder, max_batch_tokens=chunk)
    ids = _ids(5 * WINDOW)
    assert _greedy(gemma, ids, 24) == _their_greedy(theirs, ids, 24)


def test_gibberish_after_the_context_is_full(gemma: Gemma) -> None:
    """llama.cpp #12357: nothing is shifted; an answer ends where the context does, and more is refused."""
    ids = _ids(CONTEXT - 10)
    with pytest.raises(ContextLengthError, match=rf"{len(ids)} tokens.*{CONTEXT}"):
        gemma.complete([ids], SamplingParams(max_new_tokens=11))
    stream = gemma.stream(ids, temperature=0, ignore_eos=True)
    assert len(stream.result.token_ids) == 10
    assert stream.result.finish_reason == "length"


def test_half_of_the_context_only(tmp_path: Path) -> None:
    """vllm #6220: a Gemma 2 has its 8,192 tokens without a flag, though every second layer sees 4,096."""
    from gemcut.config import FAMILY

    for name in ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b"):
        assert FAMILY[name].max_position_embeddings == 8192
        assert FAMILY[name].sliding_window == 4096


# ---- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_empty_answers_in_fp16(theirs: Any, folder: Path, tmp_path: Path, quantization: str | None) -> None:
    """bitsandbytes #1572, transformers #39686: in fp16 a Gemma overflows in its MLP and answers nothing.

    gate × up passes 65,504 here, as it does in real Gemmas; the fp32 network says what is right.
    """
    loud = support.hf_model(theirs.config, seed=3)
    with torch.no_grad():
        loud.model.embed_tokens.weight.mul_(0.1)
        for layer in loud.model.layers:
            layer.mlp.gate_proj.weight.mul_(60)
            layer.mlp.up_proj.weight.mul_(60)
            layer.mlp.down_proj.weight.mul_(1 / 3600)
    support.save_checkpoint(tmp_path, loud, tokenizer=True)
    ids = _ids(12)
    inputs: list[torch.Tensor] = []
    hook = loud.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    with torch.no_grad():
        right = loud(torch.tensor([ids])).logits[0].log_softmax(-1)
    hook.remove()
    assert max(x.abs().max().item() for x in inputs) > 65_504
    spec = None if quantization is None else Quantization(quantization)  # type: ignore[arg-type]
    gemma = Gemma.load(tmp_path, dtype="float16", device="cpu", progress=False, quantization=spec)
    result = gemma.complete([ids], SamplingParams(max_new_tokens=0), prompt_logprobs=True)[0]
    ours = torch.tensor(result.prompt_logprobs)
    expected = right[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    assert torch.isfinite(ours).all()
    # The soft-cap keeps logits within ±3: 4-bit weights move them by a few tenths, fp16 by thousandths.
    assert (ours - expected).abs().max() < {None: 0.02, "int8": 0.2, "nf4": 1.0}[quantization]


def test_an_answer_depends_on_what_ran_before(gemma: Gemma, folder: Path) -> None:
    """gemma_pytorch #10: some prompts gave NaN unless another had run first (memory that nobody wrote)."""
    prompts = [_ids(n, seed=n) for n in (3, 17, 9, 40)]
    fresh = [_load(folder).complete([ids], _SCORE, **_LOGPROBS)[0] for ids in prompts]
    used = [gemma.complete([ids], _SCORE, **_LOGPROBS)[0] for ids in reversed(prompts)][::-1]
    for one, other in zip(fresh, used, strict=True):
        assert torch.isfinite(torch.tensor(one.prompt_logprobs)).all()
        assert one.prompt_logprobs == other.prompt_logprobs


_SCORE = SamplingParams(max_new_tokens=0)
_LOGPROBS: dict[str, Any] = {"prompt_logprobs": True}


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_batches_answer_otherwise_than_single_prompts(folder: Path, quantization: str | None) -> None:
    """unsloth #9708, #2939, transformers #22707: prompts of different lengths, alone and together."""
    gemma = _load(folder, quantization=quantization)
    prompts = [_ids(n, seed=n) for n in (13, 13, 14, 15, 13, 12, 15, 16)]
    params = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
    alone = [gemma.complete([ids], params)[0].token_ids for ids in prompts]
    for size in (2, 4, 8):
        together = [r.token_ids for i in range(0, 8, size) for r in gemma.complete(prompts[i : i + size], params)]
        assert together == alone


# ---- <bos>, turns and stops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["<bos>Once upon a time", "Once upon a time"])
def test_a_second_bos(gemma: Gemma, text: str) -> None:
    """vllm #27517, open-r1 #462, transformers #39686: a text that begins with <bos> already has it."""
    plain = gemma.tokenizer.encode("Once upon a time")
    assert plain[0] == BOS
    assert plain.count(BOS) == 1
    assert gemma.encode(text) == plain


def test_a_templated_text_that_is_generated_from(gemma: Gemma, their_tokenizer: Any) -> None:
    """vllm #27517: apply_chat_template(tokenize=False), then generate(text): one <bos>, and the same ids."""
    messages = [{"role": "user", "content": "hello, how are you?"}]
    text = their_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    right = their_tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert right.count(BOS) == 1
    assert gemma.encode(text) == right
    assert gemma.encode_messages(messages) == right


def test_a_template_that_writes_no_bos(copy: Path) -> None:
    """unsloth #10312: of 30 chat models two have a template without <bos>; Gemma needs exactly one all the same."""
    _edit(copy / "tokenizer_config.json", chat_template=CHATML)
    gemma = _load(copy)
    messages = [{"role": "user", "content": "hi"}]
    theirs = transformers.AutoTokenizer.from_pretrained(copy)
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = gemma.encode_messages(messages)
    assert ids == theirs(rendered)["input_ids"]
    assert ids.count(BOS) == 1


@pytest.mark.parametrize("stop", [END, EOS])
def test_turns_that_never_end(copy: Path, stop: int) -> None:
    """tunix #842, mlx-vlm #244, transformers #32110: only <eos> is in the config, the model says <end_of_turn>."""
    _edit(copy / "generation_config.json", eos_token_id=EOS)
    gemma = _load(copy)
    result = gemma.complete([_ids(5)], SamplingParams(max_new_tokens=20, temperature=0, logit_bias={stop: 1e6}))[0]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)
    assert result.text == ""


def test_the_system_role_is_an_error(gemma: Gemma, their_tokenizer: Any) -> None:
    """chat-ui #1386, sglang #892 and #1342, guidellm #67, Toolio #1: people send a system message to Gemma."""
    messages = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Hello"}]
    folded = [{"role": "user", "content": "You are brief.\n\nHello"}]
    right = their_tokenizer.apply_chat_template(folded, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert gemma.encode_messages(messages) == right
    with pytest.raises(GemcutError, match="system"):
        gemma.encode_messages(messages, system="error")


def test_a_backslash_n_of_the_shell(gemma: Gemma, their_tokenizer: Any) -> None:
    """llama.cpp #7384: the two characters \\n are not a line break; nothing is unescaped behind one's back."""
    assert gemma.encode(r"a\nb") == their_tokenizer(r"a\nb")["input_ids"] != their_tokenizer("a\nb")["input_ids"]


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 31, 32])
def test_tabs_are_split_and_a_space_appears(gemma: Gemma, their_tokenizer: Any, count: int) -> None:
    """llama.cpp #8338: six tabs became two pieces of three, and decoding brought a space."""
    text = "\t" * count + "test"
    ids = gemma.tokenizer.encode(text)
    assert ids == their_tokenizer(text)["input_ids"]
    assert gemma.tokenizer.decode(ids[1:]) == text
    if 1 < count < 32:
        assert len(ids) == 3  # <bos>, all tabs as one piece, "test"


# ---- files -------------------------------------------------------------------------------------------------------


def test_only_tokenizer_json(copy: Path, gemma: Gemma) -> None:
    """llama.cpp #19152, unsloth #1486: a merged fine-tune is saved without tokenizer.model."""
    assert not list(copy.glob("tokenizer.model"))
    (copy / "tokenizer_config.json").unlink()
    (copy / "generation_config.json").unlink()
    loaded = _load(copy)
    messages = [{"role": "user", "content": "x\t y"}]
    assert loaded.encode_messages(messages) == gemma.encode_messages(messages)


@pytest.mark.slow
def test_added_tokens(theirs: Any, folder: Path, tmp_path: Path) -> None:
    """unsloth-zoo #121, unsloth #237 and #377, peft #2415: tokens were added and the embedding resized."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<NEW1>", "<NEW2>"], special_tokens=True)
    wider = support.hf_model(theirs.config, seed=5)
    wider.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    wider.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    gemma = _load(tmp_path)
    text = "a <NEW1>b<NEW2>"
    ids = tokenizer(text)["input_ids"]
    assert gemma.encode(text) == ids
    assert 256_000 in ids
    with torch.no_grad():
        right = wider(torch.tensor([ids])).logits[0].log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    assert torch.tensor(gemma.score([text])[0]) == pytest.approx(right.numpy(), abs=2e-5)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_git_lfs_left_a_pointer(copy: Path, name: str) -> None:
    """MFTCoder #20, OmniParser #34, transformers #27923, DeepSeek-V3 #557: cloned without git-lfs."""
    (copy / name).unlink()
    (copy / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 5228717512\n")
    with pytest.raises(GemcutError, match=f"{name}.*git.lfs") as raised:
        Gemma.load(copy, device="cpu", progress=False)
    assert "\n" not in str(raised.value)


def test_a_download_that_was_cut_off(copy: Path) -> None:
    """LlamaFactory #5201, airllm #137: "MetadataIncompleteBuffer" says neither which file nor what to do."""
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").unlink()
    for size in (len(whole) - 1, len(whole) // 2, 9, 4, 0):
        (copy / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors") as raised:
            Gemma.load(copy, device="cpu", progress=False)
        assert "\n" not in str(raised.value)


# ---- code written for transformers -------------------------------------------------------------------------------


def test_a_cache_of_ones_own(folder: Path) -> None:
    """transformers #32896, #37906, #39593: past_key_values crashed on the device; here it is refused by name."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("Hello", return_tensors="pt")
    for call in (model, model.generate):
        with pytest.raises(GemcutError, match="past_key_values") as raised:
            call(**inputs, past_key_values=transformers.DynamicCache())
        assert "\n" not in str(raised.value)


def test_a_batch_answers_with_pads_alone(folder: Path, theirs: Any) -> None:
    """opencompass #1429: padded prompts, and the answer was <pad> everywhere. <pad> is never chosen for a live row."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["one", "one two three four five"], return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    for row, answer in zip(rows, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        assert answer == _their_greedy(theirs, row, 8)


def test_a_loop_of_ones_own(folder: Path, theirs: Any) -> None:
    """transformers #37269, #31981: people call forward token by token; without a cache the whole text goes in."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([_ids(2 * WINDOW)])
    for _ in range(3):
        step = model(ids).logits[:, -1]
        with torch.no_grad():
            assert (step - theirs(ids).logits[:, -1]).abs().max() < 2e-5
        ids = torch.cat([ids, step.argmax(-1, keepdim=True)], dim=1)


@pytest.mark.slow
def test_saved_in_4_bits_and_loaded_again(tmp_path: Path) -> None:
    """transformers-bloom-inference #85, bitsandbytes #1123, peft #508: what is saved quantized loads as it was."""
    # With AVX-512 bitsandbytes 0.50.2 dequantizes rows wrongly that are not whole blocks of 64.
    config = support.tiny_config(vocab_size=256000, hidden_size=64, intermediate_size=128, head_dim=32)
    folder = support.save_checkpoint(
        tmp_path / "whole", support.hf_model(config), tokenizer=True, bos_token_id=BOS, eos_token_id=EOS
    )
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "four")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "four")
    ids = torch.tensor([_ids(11)])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "four", dtype=torch.float32)
    assert torch.equal(model(ids).logits, again(ids).logits)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "four", dtype=torch.float32)
    assert (reference(ids).logits - again(ids).logits).abs().max() < 1e-3
