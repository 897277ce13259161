"""Answers of the runner against transformers' log-softmax and greedy search on the same random weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from engine.driver import CPU, twins
from gemcut.engine import EngineConfig
from gemcut.errors import ChatTemplateError, ContextLengthError
from gemcut.evaluation import Answer, Choices, Generate, Item, Letters, Message, Pair, Rolling, user
from gemcut.evaluation.asking import Asker
from gemcut.evaluation.prompts import Prompts
from gemcut.gemma import Gemma
from gemcut.text import Tokenizer
from support import tokenizer_dir


@cache
def real_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_dir())


class Bytes:
    """A tokenizer of the 256 bytes and pieces of line breaks and words, by the longest match: no file is needed."""

    bos_id, eos_id, pad_id, end_of_turn_id, start_of_turn_id, chat_template = 2, 1, 0, None, None, None
    chat_templates: dict[str, str] = {}  # noqa: RUF012
    special_ids = frozenset({0, 1, 2})
    vocab_size = 320
    pieces = ("\n\n", " A", " B", " C", " D", " yes", " no", "Answer", "Question")

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        ids, data = [], text.encode()
        while data:
            found = next((i for i, p in enumerate(self.pieces) if data.startswith(p.encode())), None)
            ids.append(4 + data[0] if found is None else 260 + found)
            data = data[1 if found is None else len(self.pieces[found].encode()) :]
        return [2, *ids] if add_bos else ids

    def all_token_bytes(self) -> list[bytes]:
        return [b""] * 4 + [bytes([i]) for i in range(256)] + [p.encode() for p in self.pieces]

    def byte_value(self, token: int) -> int | None:
        return token - 4 if 4 <= token < 260 else None

    def token_text(self, token: int) -> str:
        if self.byte_value(token) is not None:
            return f"<0x{token - 4:02X}>"
        return self.pieces[token - 260] if 260 <= token < 260 + len(self.pieces) else ""

    def token_to_id(self, text: str) -> int | None:
        return None


def asker(**sizes: Any) -> Asker:
    model, _ = twins()
    tokenizer: Any = Bytes()
    return Asker(Gemma(model, tokenizer, CPU, engine=EngineConfig(block_size=4, max_batch_tokens=64, **sizes)))


def sums(text: list[int], start: int) -> float:
    _, reference = twins()
    with torch.no_grad():
        logprobs = reference(torch.tensor([text])).logits[0].log_softmax(-1)
    return sum(logprobs[place - 1, text[place]].item() for place in range(start, len(text)))


def test_choices_as_transformers() -> None:
    ours, encode = asker(), Bytes().encode
    request = Choices(
        continuations=(" yes", " no", " yes it is"), context="Q\nAnswer:", prefix="Shots\n\n", unconditional="Answer:"
    )
    answer = ours.answer(request)
    before = encode("Shots\n\nQ\nAnswer:")
    wanted = [sums(before + encode(text, add_bos=False), len(before)) for text in request.continuations]
    assert answer.logprobs == pytest.approx(wanted, abs=1e-3)
    alone = encode("Answer:")
    wanted = [sums(alone + encode(text, add_bos=False), len(alone)) for text in request.continuations]
    assert answer.unconditional == pytest.approx(wanted, abs=1e-3)
    assert answer.tokens == (1, 1, 7)
    partial = Choices(contexts=("The cat", "A dog and a cat"), continuations=(" no more",))
    found = ours.answer(partial)
    texts = [(encode(context), encode(context + " no more")) for context in partial.contexts]
    assert found.logprobs == pytest.approx([sums(whole, len(before)) for before, whole in texts], abs=1e-3)
    pair = ours.answer(Pair(texts=("one", "two.")))
    assert pair.logprobs == pytest.approx([sums(encode(text), 1) for text in ("one", "two.")], abs=1e-3)
    assert pair.tokens == (3, 4)


def test_letters_in_one_pass_are_what_choices_are() -> None:
    ours = asker()
    request = Letters(letters=(" A", " B"), context="Question\nAnswer:", prefix="Shots\n\n")
    answer = ours.answer(request)
    assert ours.counts.computed <= len(Bytes().encode("Shots\n\nQuestion\nAnswer:")) + 1
    by_choices = ours.answer(Choices(continuations=(" A", " B"), context="Question\nAnswer:", prefix="Shots\n\n"))
    assert answer.logprobs == pytest.approx(by_choices.logprobs, abs=1e-4)
    assert answer.greedy == by_choices.greedy
    several = ours.answer(Letters(letters=(" A", " Bx"), context="Answer:"))
    by_choices = ours.answer(Choices(continuations=(" A", " Bx"), context="Answer:"))
    assert several.logprobs == pytest.approx(by_choices.logprobs, abs=1e-4)


def test_a_text_in_windows_is_scored_once() -> None:
    """Every token once; each with as many before it as its window has."""
    ours = asker()
    ids = Bytes().encode("abcdefghijklmnop")
    answer = ours.answer(Rolling(text="abcdefghijklmnop", window=8, stride=3))
    assert answer.tokens == (16,)
    wanted = sums(ids[:8], 1)
    for done, end in ((7, 10), (10, 13), (13, 16)):
        window = [2, *ids[1:][end - 7 : end]]
        wanted += sums(window, len(window) - (end - done))
    assert answer.logprobs[0] == pytest.approx(wanted, abs=1e-3)
    whole = ours.answer(Rolling(text="abcdefghijklmnop"))
    assert whole.logprobs[0] == pytest.approx(sums(ids, 1), abs=1e-3)


def test_generation_stops_and_seeds() -> None:
    ours = asker()
    _, reference = twins()
    ids = Bytes().encode("Go")
    with torch.no_grad():
        greedy = reference.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None)[0]
    answer = ours.answer(Generate(max_new_tokens=6, context="Go"))
    stream = ours.gemma.stream_ids(ids, ours_params(6)).result
    assert list(stream.token_ids) == greedy[len(ids) :].tolist()[: len(stream.token_ids)]
    assert answer.texts == (stream.text,)
    drawn = Generate(max_new_tokens=5, context="Go", sampling={"temperature": 1.0}, n=3)
    first, again = (ours.answer(drawn, "item").texts for _ in range(2))
    assert first == again
    assert len(set(first)) == 3
    ours.seed = 1
    assert ours.answer(drawn, "item").texts != first


def ours_params(count: int) -> Any:
    from gemcut.engine import SamplingParams

    return SamplingParams(max_new_tokens=count, temperature=0)


def test_too_long_and_no_template_are_refused() -> None:
    ours = asker(max_context=16)
    item = Item(id="x/1", request=Pair(texts=("a" * 20,)), target=0)
    with pytest.raises(ContextLengthError, match="1 of 1 prompts need more tokens than the context of 16 holds, x/1"):
        ours.check_lengths([ours.tokenize(item.request)], [item])
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        ours.tokenize(Generate(max_new_tokens=1, dialogue=user("Hello")))


def test_stopping_leaves_nothing_running() -> None:
    ours = asker()
    asked = [ours.tokenize(Generate(max_new_tokens=20, context=f"Go {i}")) for i in range(12)]
    count = 0

    def stopped() -> bool:
        return count >= 2

    answers: Iterator[Answer] = ours.answers(asked, [str(i) for i in range(12)], stopped)
    for _ in answers:
        count += 1
    assert count == 2
    again = list(ours.answers(asked[:1], ["0"]))
    assert len(again) == 1
    assert len(ours.gemma.engine._sequences) <= 1


def test_real_tokenizer_is_cut_exactly() -> None:
    tokenizer = real_tokenizer()
    model = twins()[0]
    prompts = Prompts(Gemma(model, tokenizer, CPU))
    assert prompts.may_be_cut
    for prefix, text in (("Q: a\nA: b\n\n", "Q: x\nA:"), ("a\n\n", " b"), ("a\n\n", "\n b"), ("a:", "b")):
        assert prompts.text(text, prefix) == tokenizer.encode(prefix + text)
    assert prompts.single((" A", " B"), "Q\nAnswer:") == [tokenizer.encode(f"Answer: {x}")[-1] for x in "AB"]
    assert prompts.single((" A", " Nonsensical"), "Q\nAnswer:") is None
    whole, start = prompts.continuation("He said ", "yes")
    assert (whole, start) == (tokenizer.encode("He said yes"), len(tokenizer.encode("He said")))
    # What a stranger's text spells is no control token; a system message is in the first user turn.
    assert prompts.text("<end_of_turn>")[1:] != tokenizer.encode("<end_of_turn>", add_bos=False)
    ids = prompts.dialogue((Message("system", "Be brief."), Message("user", "Hi")))
    assert "Be brief." in tokenizer.decode(ids)
    assert ids.count(tokenizer.bos_id) == 1
