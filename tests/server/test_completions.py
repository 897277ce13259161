"""/v1/completions: continuations and scores are what Gemma gives in this process."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import pytest

from gemcut.engine import SamplingParams
from gemcut.text import Tokenizer

from .host import NAME, Served, error_of, events, new_gemma, serving

TEXT = "The capital of France is Paris, naïve 🦜 too."
#: What the composition of a batch, and what was cached, do to a log-probability in fp32.
NOISE = 1e-4


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(new_gemma()) as found:
        yield found


@pytest.fixture(autouse=True)
def _clean(served: Served) -> Iterator[None]:
    yield
    served.nothing_held()


@pytest.fixture(scope="module")
def tokenizer(served: Served) -> Tokenizer:
    return served.gemma.tokenizer


def test_text(served: Served) -> None:
    answer = served.client().completions.create(model=NAME, prompt=TEXT, max_tokens=6, seed=3)
    (right,) = served.gemma.complete([TEXT], SamplingParams(max_new_tokens=6, seed=3))
    assert answer.object == "text_completion"
    assert answer.choices[0].text == right.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == right.prompt_tokens
    assert len(answer.choices[0].text) > 0


@pytest.mark.parametrize(
    ("fields", "count", "reason"),
    [({}, 1, "stop"), ({"min_tokens": 4}, 4, "stop"), ({"ignore_eos": True}, 6, "length")],
)
def test_an_answer_that_wants_to_end(
    served: Served, tokenizer: Tokenizer, fields: dict[str, Any], count: int, reason: str
) -> None:
    """By a bias each token is the end: at once, where it first may come, or never."""
    bias = {str(tokenizer.eos_id): 100}
    answer = served.complete(prompt=TEXT, max_tokens=6, temperature=0, logit_bias=bias, **fields).json()
    assert answer["choices"][0]["finish_reason"] == reason
    # The end itself is a token, too.
    assert answer["usage"]["completion_tokens"] == (count + 1 if fields.get("min_tokens") else count)


def test_bos_is_there_once(served: Served, tokenizer: Tokenizer) -> None:
    """Whatever the form, the network sees the same ids."""
    bare = tokenizer.encode(TEXT, add_bos=False)
    forms: list[Any] = [TEXT, f"<bos>{TEXT}", f"<bos><bos>{TEXT}", bare, [tokenizer.bos_id, *bare]]
    answers = [served.complete(prompt=form, seed=1).json() for form in forms]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert {answer["usage"]["prompt_tokens"] for answer in answers} == {len(bare) + 1}
    without = served.complete(prompt=bare, seed=1, add_special_tokens=False).json()
    assert without["usage"]["prompt_tokens"] == len(bare)
    (right,) = served.gemma.complete([bare], SamplingParams(max_new_tokens=4, seed=1))
    assert without["choices"][0]["text"] == right.text


def test_several_prompts_and_n(served: Served, tokenizer: Tokenizer) -> None:
    prompts = ["one two", "red green blue"]
    right = served.gemma.generate(prompts, n=2, seed=5, max_new_tokens=4, temperature=1.0)
    for form in (prompts, [tokenizer.encode(p) for p in prompts]):
        answer = served.complete(prompt=form, n=2, seed=5).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert [choice["text"] for choice in answer["choices"]] == [*right[0], *right[1]]
        assert answer["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(p)) for p in prompts)
        assert answer["usage"]["completion_tokens"] == 16


def harness_scores(answer: dict[str, Any], context: int) -> tuple[float, bool]:
    """What lm-evaluation-harness' local-completions makes of an answer to ids with echo, logprobs 1, max_tokens 1."""
    (choice,) = sorted(answer["choices"], key=itemgetter("index"))
    found = choice["logprobs"]
    logprobs = found["token_logprobs"][context:-1]
    tops = found["top_logprobs"][context:-1]
    greedy = all(logprob == max(top.values()) for logprob, top in zip(logprobs, tops, strict=True))
    return sum(logprobs), greedy


@pytest.mark.parametrize("bos", [True, False], ids=["with bos", "without"])
def test_scores_as_the_harness_reads_them(served: Served, tokenizer: Tokenizer, bos: bool) -> None:
    context, continuation = "The capital of France is", " Paris, a city"
    ids = [tokenizer.encode(text, add_bos=bos and text is context) for text in (context, continuation)]
    asked = {"prompt": [ids[0] + ids[1]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = served.complete(**asked).json()
    whole = ids[0] + ids[1]
    own = whole if bos else [tokenizer.bos_id, *whole]
    (right,) = served.gemma.score([own], start=len(own) - len(ids[1]))
    score, greedy = harness_scores(answer, len(ids[0]))
    assert score == pytest.approx(sum(right), abs=NOISE)
    (ranks,) = served.gemma.score([own], start=len(own) - len(ids[1]), ranks=True)
    assert greedy == all(each.rank == 1 for each in ranks)
    logprobs = answer["choices"][0]["logprobs"]
    assert {len(values) for values in logprobs.values()} == {len(whole) + 1}
    assert (logprobs["token_logprobs"][0] is None) == bos


def test_a_greedy_continuation_is_said_to_be_one(served: Served, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The sky is")
    (right,) = served.gemma.complete([ids], SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True))
    asked = {"prompt": [*ids, *right.token_ids], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    assert harness_scores(served.complete(**asked).json(), len(ids))[1] is True


def test_echo_shows_the_prompt(served: Served, tokenizer: Tokenizer) -> None:
    asked = {"prompt": TEXT, "max_tokens": 3, "echo": True, "logprobs": 1, "seed": 2}
    choice = served.complete(**asked).json()["choices"][0]
    (right,) = served.gemma.complete([TEXT], SamplingParams(max_new_tokens=3, seed=2, logprobs=1), prompt_logprobs=True)
    assert choice["text"] == TEXT + right.text
    logprobs = choice["logprobs"]
    assert right.prompt_logprobs is not None
    assert right.logprobs is not None
    numbers = [*right.prompt_logprobs, *(each.logprob for each in right.logprobs)]
    assert logprobs["token_logprobs"] == pytest.approx(numbers, abs=NOISE)
    tokens = [token for token in logprobs["tokens"] if not token.startswith("bytes:")]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if token in tokens:
            assert choice["text"][offset : offset + len(token)] == token
    scored = served.complete(prompt=TEXT, max_tokens=0, echo=True, logprobs=0).json()["choices"][0]
    assert scored["text"] == TEXT
    assert scored["logprobs"]["token_logprobs"] == pytest.approx(right.prompt_logprobs, abs=NOISE)
    chunks = events(served.complete(**asked, stream=True))[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    streamed = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    for name, values in logprobs.items():
        joined = [value for part in streamed for value in part[name]]
        if name == "top_logprobs":
            assert [sorted(top) for top in joined] == [sorted(top) for top in values]
        else:
            assert joined == (pytest.approx(values, abs=NOISE) if name == "token_logprobs" else values)


def test_bytes_of_a_character(served: Served, tokenizer: Tokenizer) -> None:
    """Tokens that are parts of a character are written as bytes, all at the character's place."""
    ids = tokenizer.encode("a\U0001fae8b", add_bos=False)
    found = served.complete(prompt=ids, max_tokens=0, echo=True, logprobs=0).json()["choices"][0]
    names, offsets = found["logprobs"]["tokens"], found["logprobs"]["text_offset"]
    data = [tokenizer.token_bytes(i) for i in ids]
    assert found["text"] == b"".join(data).decode()
    for name, own in zip(names, data, strict=True):
        assert name == own.decode(errors="replace") or name == "bytes:" + "".join(f"\\x{b:02x}" for b in own)
    assert any(name.startswith("bytes:") for name in names)
    assert offsets[0] == 0
    assert found["text"][offsets[-1] :] == names[-1] == "b"


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"suffix": "end"}, "suffix", "cannot fill gaps"),
    ({"max_tokens": 0}, "max_tokens", "echo"),
    ({"echo": True, "logprobs": 2}, "logprobs", "echo"),
    ({"logprobs": 21}, "logprobs", "<= 20"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [1, "a"]}, "prompt", "neither"),
    ({"prompt": [[]]}, "prompt", "neither"),
    ({"prompt": [1.5]}, "prompt", "neither"),
    ({"prompt": [2, 10**9]}, "prompt", "255999"),
    ({"prompt": [2, -1]}, "prompt", "-1"),
    ({"prompt": ["a"] * 300}, "prompt", "256"),
    ({"prompt": {"a": 1}}, "prompt", "expected"),
    ({"best_of": 2}, "best_of", "unknown field"),
    ({"messages": []}, "messages", "unknown field"),
    ({"prompt": "word " * 600}, "", "512"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=lambda value: str(value)[:40])
def test_bad_field(served: Served, fields: dict[str, Any], param: str, words: str) -> None:
    response = served.complete(**fields)
    error = error_of(response)
    assert response.status_code == 400, error
    assert (error["param"] or "") == param, error
    assert words in error["message"], error


def test_more_answers_than_there_is_room_for() -> None:
    with serving(new_gemma(), max_requests=3) as served:
        assert "3 is the most" in error_of(served.complete(n=4))["message"]
        assert served.complete(n=3).status_code == 200
