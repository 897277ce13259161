"""Streamers: ours with our model, transformers' own with our model, text equal to decoding everything at once."""

from __future__ import annotations

import threading
from queue import Empty
from typing import Any

import pytest
import torch
import transformers

from gemcut import hf
from gemcut.errors import ParameterError, UnsupportedError

PROMPT = "日本語 Write me\n a poem 🙂"


class Recorder:
    """What any object with the protocol's two methods is handed."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.clone())

    def end(self) -> None:
        self.got.append("end")


def test_protocol_equals_transformers(model: Any, reference: Any, tokenizer: Any) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ours, theirs = Recorder(), Recorder()
    out = model.generate(**inputs, max_new_tokens=8, streamer=ours)
    reference.generate(**inputs, max_new_tokens=8, streamer=theirs, do_sample=False)
    assert [getattr(x, "tolist", lambda x=x: x)() for x in ours.got] == [
        getattr(x, "tolist", lambda x=x: x)() for x in theirs.got
    ]
    assert torch.equal(ours.got[0], inputs.input_ids)
    assert torch.cat(ours.got[1:-1]).tolist() == out[0, -8:].tolist()


def test_batch_gets_a_token_of_every_row(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer([PROMPT, "The"], padding=True, return_tensors="pt")
    free = model.generate(**inputs, max_new_tokens=6)
    recorder = Recorder()
    out = model.generate(**inputs, max_new_tokens=6, streamer=recorder, eos_token_id=int(free[0, -4]))
    assert torch.equal(torch.stack(recorder.got[1:-1], dim=1), out[:, inputs.input_ids.shape[1] :])


@pytest.mark.slow
@pytest.mark.parametrize("skip_prompt", [False, True])
@pytest.mark.parametrize("skip_special_tokens", [False, True])
def test_text_streamer_prints_what_decode_says(
    skip_prompt: bool, skip_special_tokens: bool, model: Any, tokenizer: Any, capsys: Any
) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    printed = []
    for kind in (hf.TextStreamer, transformers.TextStreamer):
        streamer = kind(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=skip_special_tokens)
        for _ in range(2):  # a streamer can be used again
            out = model.generate(**inputs, max_new_tokens=20, streamer=streamer)
            printed.append(capsys.readouterr().out)
    start = inputs.input_ids.shape[1] if skip_prompt else 0
    expected = tokenizer.decode(out[0, start:], skip_special_tokens=skip_special_tokens) + "\n"
    assert printed == [expected] * 4


@pytest.mark.parametrize("kind", [hf.TextIteratorStreamer, transformers.TextIteratorStreamer])
def test_iterator_in_another_thread(kind: Any, model: Any, tokenizer: Any) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    streamer = kind(tokenizer, skip_prompt=True, timeout=60.0, skip_special_tokens=True)
    options = {**inputs, "max_new_tokens": 20, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    pieces = list(streamer)
    thread.join()
    out = model.generate(**inputs, max_new_tokens=20)
    assert "".join(pieces) == tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert len(pieces) > 3


def test_half_characters_are_never_shown(tokenizer: Any) -> None:
    pieces: list[str] = []
    streamer = hf.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=1.0)
    streamer.put(torch.tensor([[2]]))
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "\U0001fae8".encode()]
    assert tokenizer.unk_token_id not in ids
    for token in ids:
        streamer.put(torch.tensor([token]))
    assert streamer.text_queue.empty()
    streamer.end()
    pieces += streamer
    assert "".join(pieces) == "\U0001fae8"


def test_a_failing_generate_reaches_the_reader(model: Any, tokenizer: Any) -> None:
    streamer = hf.TextIteratorStreamer(tokenizer, timeout=60.0)
    with pytest.raises(ParameterError, match="top_p"):
        model.generate(torch.tensor([[2]]), streamer=streamer, top_p=3.0)
    with pytest.raises(ParameterError, match="top_p"):
        next(streamer)


def test_timeout_and_refusals(model: Any, tokenizer: Any, reference_tokenizer: Any) -> None:
    with pytest.raises(Empty):
        next(hf.TextIteratorStreamer(tokenizer, timeout=0.01))
    with pytest.raises(ParameterError, match="shows one sequence; it was given 2"):
        model.generate(torch.tensor([[2, 5], [2, 6]]), max_new_tokens=2, streamer=hf.TextStreamer(tokenizer))
    assert not model.gemma.engine.has_work
    with pytest.raises(ParameterError, match="expected gemcut's AutoTokenizer"):
        hf.TextStreamer(reference_tokenizer)
    with pytest.raises(UnsupportedError, match="clean_up_tokenization_spaces"):
        hf.TextStreamer(tokenizer, clean_up_tokenization_spaces=True)
    with pytest.raises(ParameterError, match="no argument 'skip_promt'"):
        hf.TextStreamer(tokenizer, skip_promt=True)
