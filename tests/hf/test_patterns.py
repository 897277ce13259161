"""Ways in which programs use transformers, run on both: each gives the same, or is refused with one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gemcut import hf
from gemcut.errors import GemcutError

TEXT, TEXTS = "The capital of France is", ["Hello, world!", "a longer text\n\twith  spaces", "né 你好 🙂"]
CHAT = [{"role": "user", "content": "Hi there"}]
DIALOGUE = [*CHAT, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
IDS = torch.tensor([[2, 10, 11, 12], [2, 20, 21, 22]])
PADDED = torch.tensor([[0, 0, 2, 10], [2, 20, 21, 22]])
MASK = (PADDED != 0).long()

Pattern = Callable[[Any, Any, Any], Any]  # (model, tokenizer, the library)

EQUAL: dict[str, Pattern] = {
    # ---- the tokenizer, called
    "text": lambda m, t, lib: t(TEXT),
    "text as keyword": lambda m, t, lib: t(text=TEXT),
    "texts": lambda m, t, lib: t(TEXTS),
    "texts in a tuple": lambda m, t, lib: t(tuple(TEXTS)),
    "one text in a list": lambda m, t, lib: t([TEXT]),
    "no special tokens": lambda m, t, lib: t(TEXT, add_special_tokens=False),
    "tensor": lambda m, t, lib: t(TEXT, return_tensors="pt"),
    "numpy": lambda m, t, lib: t(TEXT, return_tensors="np"),
    "padded": lambda m, t, lib: t(TEXTS, padding=True, return_tensors="pt"),
    "padded to a length": lambda m, t, lib: t(TEXTS, padding="max_length", max_length=20),
    "padded right": lambda m, t, lib: t(TEXTS, padding=True, padding_side="right"),
    "padded to a multiple": lambda m, t, lib: t(TEXTS, padding=True, pad_to_multiple_of=8),
    "truncated": lambda m, t, lib: t(TEXTS, truncation=True, max_length=3),
    "truncated and padded": lambda m, t, lib: t(TEXTS, truncation=True, max_length=4, padding="max_length"),
    "no mask": lambda m, t, lib: t(TEXT, return_attention_mask=False),
    "special tokens mask": lambda m, t, lib: t(TEXTS, return_special_tokens_mask=True),
    "empty text": lambda m, t, lib: t(""),
    "encode": lambda m, t, lib: t.encode(TEXT),
    "encode to a tensor": lambda m, t, lib: t.encode(TEXT, return_tensors="pt"),
    "encode bare": lambda m, t, lib: t.encode(TEXT, add_special_tokens=False),
    "tokenize": lambda m, t, lib: t.tokenize(TEXT),
    "length": lambda m, t, lib: len(t(TEXT)["input_ids"]),
    "keys": lambda m, t, lib: list(t(TEXT)),
    "items": lambda m, t, lib: dict(t(TEXT).items()),
    "attribute": lambda m, t, lib: t(TEXT).input_ids,
    "shape": lambda m, t, lib: tuple(t(TEXT, return_tensors="pt").input_ids.shape),
    "to a device": lambda m, t, lib: t(TEXT, return_tensors="pt").to("cpu"),
    "to the model": lambda m, t, lib: t(TEXT, return_tensors="pt").to(m.device),
    "later tensors": lambda m, t, lib: t(TEXTS, padding=True).convert_to_tensors("pt"),
    "encoding is fast": lambda m, t, lib: (t(TEXT).is_fast, t(TEXT).n_sequences),
    # ---- ids and tokens
    "decode": lambda m, t, lib: t.decode(t(TEXT)["input_ids"]),
    "decode skipping": lambda m, t, lib: t.decode(t(TEXT)["input_ids"], skip_special_tokens=True),
    "decode a tensor": lambda m, t, lib: t.decode(IDS[0]),
    "decode a number": lambda m, t, lib: t.decode(10),
    "batch_decode": lambda m, t, lib: t.batch_decode(IDS, skip_special_tokens=True),
    "batch_decode lists": lambda m, t, lib: t.batch_decode(IDS.tolist()),
    "tokens to ids": lambda m, t, lib: t.convert_tokens_to_ids(["<bos>", "Hello", "no such token"]),
    "token to id": lambda m, t, lib: t.convert_tokens_to_ids("<end_of_turn>"),
    "ids to tokens": lambda m, t, lib: t.convert_ids_to_tokens([2, 10, 999]),
    "tokens to string": lambda m, t, lib: t.convert_tokens_to_string(t.tokenize(TEXTS[2])),
    "tokens to string, none": lambda m, t, lib: t.convert_tokens_to_string([]),
    "special ids": lambda m, t, lib: (t.bos_token_id, t.eos_token_id, t.pad_token_id, t.unk_token_id),
    "special tokens": lambda m, t, lib: (t.bos_token, t.eos_token, t.pad_token, t.unk_token),
    "all special ids": lambda m, t, lib: [i for i in t.all_special_ids if i != 4],  # transformers adds <mask>
    "special tokens map": lambda m, t, lib: {k: v for k, v in t.special_tokens_map.items() if k != "mask_token"},
    "extra special tokens": lambda m, t, lib: t.extra_special_tokens,
    "sizes": lambda m, t, lib: (len(t), t.vocab_size, len(t.get_vocab()), len(t.vocab)),
    "added vocabulary": lambda m, t, lib: t.get_added_vocab(),
    "mask of special ids": lambda m, t, lib: t.get_special_tokens_mask([2, 10, 1], already_has_special_tokens=True),
    "about it": lambda m, t, lib: (t.is_fast, t.model_input_names, t.padding_side, t.pad_token_type_id),
    "special tokens to add": lambda m, t, lib: t.num_special_tokens_to_add(),
    "a pad token set again": lambda m, t, lib: (t.add_special_tokens({"pad_token": "<pad>"}), t.pad_token_id),
    # ---- collating
    "pad": lambda m, t, lib: t.pad([t(text) for text in TEXTS], return_tensors="pt"),
    "pad lists": lambda m, t, lib: t.pad({"input_ids": [[2, 5], [2, 5, 6]]}),
    "pad one": lambda m, t, lib: t.pad({"input_ids": [2, 5]}, padding="max_length", max_length=4),
    "pad tensors": lambda m, t, lib: t.pad([{"input_ids": torch.tensor([2, 5])}, {"input_ids": torch.tensor([2])}]),
    "pad with a multiple": lambda m, t, lib: t.pad({"input_ids": [[2, 5], [2]]}, pad_to_multiple_of=4),
    "DataCollatorWithPadding": lambda m, t, lib: transformers.DataCollatorWithPadding(t)([t(x) for x in TEXTS]),
    "DataCollatorForLanguageModeling": lambda m, t, lib: transformers.DataCollatorForLanguageModeling(t, mlm=False)(
        [t(x) for x in TEXTS]
    ),
    # ---- dialogues
    "chat as text": lambda m, t, lib: t.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True),
    "chat as ids": lambda m, t, lib: t.apply_chat_template(DIALOGUE, add_generation_prompt=True),
    "chat as tensor": lambda m, t, lib: t.apply_chat_template(DIALOGUE, return_tensors="pt", return_dict=True),
    "chat ids alone": lambda m, t, lib: t.apply_chat_template(DIALOGUE, return_dict=False),
    "chats": lambda m, t, lib: t.apply_chat_template([CHAT, DIALOGUE], padding=True, return_tensors="pt"),
    "chat, left open": lambda m, t, lib: t.apply_chat_template(
        DIALOGUE[:2], continue_final_message=True, tokenize=False
    ),
    "chat template": lambda m, t, lib: t.get_chat_template(),
    # ---- the forward call
    "logits": lambda m, t, lib: m(IDS).logits,
    "logits of an encoding": lambda m, t, lib: m(**t(TEXT, return_tensors="pt")).logits,
    "last logits": lambda m, t, lib: m(IDS, logits_to_keep=1).logits,
    "output by place": lambda m, t, lib: m(IDS)[0],
    "output by name": lambda m, t, lib: m(IDS)["logits"],
    "next token": lambda m, t, lib: m(IDS).logits[:, -1].argmax(-1),
    "log-probabilities": lambda m, t, lib: m(IDS).logits.log_softmax(-1).gather(2, IDS[..., None]),
    "loss": lambda m, t, lib: m(IDS, labels=IDS).loss,
    "loss by place": lambda m, t, lib: m(IDS, labels=IDS)[0],
    "loss with ignored labels": lambda m, t, lib: m(IDS, labels=IDS.masked_fill(IDS == 11, -100)).loss,
    "perplexity": lambda m, t, lib: torch.exp(m(IDS[:1], labels=IDS[:1]).loss),
    "evaluation loop": lambda m, t, lib: _evaluate(m, t),
    "hidden states": lambda m, t, lib: m(IDS, output_hidden_states=True).hidden_states,
    "mean embedding": lambda m, t, lib: m(IDS, output_hidden_states=True).hidden_states[-1].mean(1),
    "last hidden state": lambda m, t, lib: m.model(IDS).last_hidden_state,
    "masked logits": lambda m, t, lib: m(PADDED, attention_mask=MASK).logits[MASK.bool()],
    # ---- generate
    "generate": lambda m, t, lib: m.generate(IDS, **GREEDY),
    "generate from an encoding": lambda m, t, lib: m.generate(**t(TEXT, return_tensors="pt"), **GREEDY),
    "generate from input_ids": lambda m, t, lib: m.generate(input_ids=IDS, **GREEDY),
    "generate with padding": lambda m, t, lib: m.generate(PADDED, attention_mask=MASK, **GREEDY),
    "max_length": lambda m, t, lib: m.generate(IDS, max_length=8, do_sample=False),
    "min_new_tokens": lambda m, t, lib: m.generate(IDS, min_new_tokens=6, **GREEDY),
    "repetition_penalty": lambda m, t, lib: m.generate(IDS, repetition_penalty=1.3, **GREEDY),
    "suppress_tokens": lambda m, t, lib: m.generate(IDS, suppress_tokens=[5, 6], **GREEDY),
    "eos_token_id": lambda m, t, lib: m.generate(IDS, eos_token_id=[1, 107], **GREEDY),
    "pad_token_id": lambda m, t, lib: m.generate(IDS, pad_token_id=t.eos_token_id, **GREEDY),
    "GenerationConfig": lambda m, t, lib: m.generate(IDS, generation_config=lib.GenerationConfig(**GREEDY)),
    "num_beams of one": lambda m, t, lib: m.generate(IDS, num_beams=1, **GREEDY),
    "as a dictionary": lambda m, t, lib: m.generate(IDS, return_dict_in_generate=True, **GREEDY).sequences,
    "with logits": lambda m, t, lib: m.generate(IDS, return_dict_in_generate=True, output_logits=True, **GREEDY).logits,
    "transition scores": lambda m, t, lib: _transitions(m),
    "decoded answer": lambda m, t, lib: t.decode(m.generate(IDS[:1], **GREEDY)[0, 4:], skip_special_tokens=True),
    "decoded answers": lambda m, t, lib: t.batch_decode(m.generate(IDS, **GREEDY)[:, 4:]),
    "chat answer": lambda m, t, lib: m.generate(
        **t.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True), **GREEDY
    ),
    "inference mode": lambda m, t, lib: _inference(m),
    "iterator streamer": lambda m, t, lib: _stream(m, t, lib),
    # ---- the pipeline
    "pipeline": lambda m, t, lib: _pipeline(m, t)(TEXT, **GREEDY),
    "pipeline, new text": lambda m, t, lib: _pipeline(m, t)(TEXT, return_full_text=False, **GREEDY),
    "pipeline, texts": lambda m, t, lib: _pipeline(m, t)(TEXTS, **GREEDY),
    "pipeline in batches": lambda m, t, lib: _pipeline(m, t)(TEXTS, batch_size=2, **GREEDY),
    "pipeline, tensors": lambda m, t, lib: _pipeline(m, t)(TEXT, return_tensors=True, **GREEDY),
    "pipeline, dialogue": lambda m, t, lib: _pipeline(m, t)(CHAT, **GREEDY),
    # ---- the model object
    "eval": lambda m, t, lib: (m.eval() is m, m.training, m.train(False) is m),
    "device and dtype": lambda m, t, lib: (m.device, m.dtype, next(m.parameters()).device),
    "to": lambda m, t, lib: m.to("cpu") is m,
    "to with dtype": lambda m, t, lib: m.to(device="cpu", dtype=torch.float32) is m,
    "number of parameters": lambda m, t, lib: (m.num_parameters(), sum(p.numel() for p in m.parameters())),
    "config": lambda m, t, lib: (m.config.vocab_size, m.config.hidden_size, m.config.model_type),
    "config of the text model": lambda m, t, lib: m.config.get_text_config().num_hidden_layers,
    "generation defaults": lambda m, t, lib: (m.generation_config.bos_token_id, m.generation_config.pad_token_id),
    "can_generate": lambda m, t, lib: (m.can_generate(), m.main_input_name),
    "input embeddings": lambda m, t, lib: m.get_input_embeddings()(IDS),
    "a weight": lambda m, t, lib: m.state_dict()["model.layers.0.mlp.up_proj.weight"],
    "linear layers": lambda m, t, lib: [n for n, x in m.named_modules() if isinstance(x, torch.nn.Linear)],
}

REFUSED: dict[str, tuple[Pattern, str]] = {
    "beam search": (lambda m, t, lib: m.generate(IDS, num_beams=4, **GREEDY), "num_beams=4"),
    "assisted": (lambda m, t, lib: m.generate(IDS, assistant_model=m, **GREEDY), "assistant_model"),
    "logits processor": (lambda m, t, lib: m.generate(IDS, logits_processor=[print], **GREEDY), "logits_processor"),
    "stopping criteria": (lambda m, t, lib: m.generate(IDS, stopping_criteria=[print], **GREEDY), "eos_token_id"),
    "attentions": (lambda m, t, lib: m(IDS, output_attentions=True), "output_attentions=True"),
    "cache by hand": (lambda m, t, lib: m(IDS).past_key_values, "call generate"),
    "cache given": (lambda m, t, lib: m(IDS, past_key_values=object()), "past_key_values"),
    "cache asked for": (lambda m, t, lib: m(IDS, use_cache=True), "use_cache=True"),
    "embeddings given": (lambda m, t, lib: m(inputs_embeds=torch.zeros(1, 2, 32)), "inputs_embeds"),
    "tuple": (lambda m, t, lib: m(IDS, return_dict=False), "to_tuple"),
    "training": (lambda m, t, lib: m.train(), "inference"),
    "checkpointing": (lambda m, t, lib: m.gradient_checkpointing_enable(), "no gradients"),
    "new rows": (lambda m, t, lib: m.resize_token_embeddings(len(t) + 1), "change the checkpoint with transformers"),
    "new tokens": (lambda m, t, lib: t.add_tokens(["<new>"]), "does not grow"),
    "new pad token": (lambda m, t, lib: t.add_special_tokens({"pad_token": "[PAD]"}), "not in the vocabulary"),
    "another eos": (lambda m, t, lib: t.add_special_tokens({"eos_token": "<pad>"}), "trained with it"),
    "unknown role": (lambda m, t, lib: t.add_special_tokens({"cls_token": "<pad>"}), "no role 'cls_token'"),
    "adapter": (lambda m, t, lib: m.load_adapter("x"), "merge it"),
    "hook": (lambda m, t, lib: m.register_forward_hook(print), "output_hidden_states=True"),
    "compile": (lambda m, t, lib: torch.compile(m), "torch.compile"),
    "push": (lambda m, t, lib: m.push_to_hub("x"), "hf upload"),
    "double": (lambda m, t, lib: m.double(), "chosen at loading"),
    "another dtype": (lambda m, t, lib: m.half(), "load it with dtype="),
    "pairs": (lambda m, t, lib: t(TEXT, text_pair=TEXT), "no pairs"),
    "offsets": (lambda m, t, lib: t(TEXT, return_offsets_mapping=True), "offsets"),
    "word ids": (lambda m, t, lib: t(TEXT).word_ids(), "words and characters"),
    "pad with other keys": (lambda m, t, lib: t.pad([{"input_ids": [2], "labels": [2]}]), "'labels' is padded"),
    "pad of nothing": (lambda m, t, lib: t.pad({"ids": [2]}), "expected input_ids"),
    "tensor of ragged texts": (lambda m, t, lib: t(TEXTS, return_tensors="pt"), "padding=True"),
    "number as text": (lambda m, t, lib: t(5), "expected a text"),
    "classifier's labels": (lambda m, t, lib: m.config.id2label, "no labels"),
    "config changed": (lambda m, t, lib: setattr(m.config, "sliding_window", 2), "cannot be changed"),
}


def _evaluate(model: Any, tokenizer: Any) -> float:
    model.eval()
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    loader = torch.utils.data.DataLoader([tokenizer(text) for text in TEXTS], batch_size=1, collate_fn=collate)
    with torch.no_grad():
        losses = [model(**{k: v.to(model.device) for k, v in batch.items()}).loss.item() for batch in loader]
    return sum(losses) / len(losses)


def _transitions(model: Any) -> torch.Tensor:
    options = {**GREEDY, "min_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(IDS, **options)
    scores: torch.Tensor = model.compute_transition_scores(out.sequences, out.logits, normalize_logits=True)
    return scores


def _inference(model: Any) -> Any:
    with torch.inference_mode():
        return model.generate(IDS, **GREEDY).clone()


def _stream(model: Any, tokenizer: Any, library: Any) -> str:
    streamer = library.TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(IDS[:1], streamer=streamer, **GREEDY)
    return "".join(streamer)


def _pipeline(model: Any, tokenizer: Any) -> Any:
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")


def _plain(value: Any) -> Any:
    """Encodings as dictionaries, ours and theirs alike; tensors stay."""
    if isinstance(value, (hf.BatchEncoding, transformers.BatchEncoding)):
        return {name: _plain(value[name]) for name in value}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return {name: _plain(one) for name, one in value.items()} if isinstance(value, dict) else value


def _assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs) or isinstance(ours, torch.Tensor) == isinstance(theirs, torch.Tensor)
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-4, atol=1e-4)  # fp32 in another order
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for name in theirs:
            _assert_same(ours[name], theirs[name])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            _assert_same(one, other)
    else:
        assert ours == (pytest.approx(theirs, abs=1e-4) if isinstance(theirs, float) else theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EQUAL)
def test_equal(name: str, model: Any, tokenizer: Any, reference: Any, reference_tokenizer: Any) -> None:
    ours = _plain(EQUAL[name](model, tokenizer, hf))
    with torch.no_grad():
        theirs = _plain(EQUAL[name](reference, reference_tokenizer, transformers))
    _assert_same(ours, theirs)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, model: Any, tokenizer: Any) -> None:
    pattern, message = REFUSED[name]
    with pytest.raises(GemcutError, match=message) as caught:
        pattern(model, tokenizer, hf)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_saved_by_one_and_loaded_by_the_other(
    model: Any, tokenizer: Any, reference: Any, reference_tokenizer: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    reference_tokenizer.save_pretrained(tmp_path / "theirs")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    _assert_same(back(IDS).logits, reference(IDS).logits)
    _assert_same(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")(IDS).logits, model(IDS).logits)
    for folder in ("ours", "theirs"):
        for library in (hf, transformers):
            assert (
                library.AutoTokenizer.from_pretrained(tmp_path / folder)(TEXTS)["input_ids"]
                == tokenizer(TEXTS).input_ids
            )
