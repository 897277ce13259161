"""What callers hand to Gemma as prompts, several answers to one, and what a Gemma says of itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.driver import CPU, assert_nothing_held, small_model
from gemcut import Gemma
from gemcut.engine import EngineConfig, SamplingParams
from gemcut.errors import GemcutError, ParameterError, UnsupportedError
from gemcut.prompts import derived_seed
from gemcut.text import Tokenizer
from support import hf_model, save_checkpoint, tiny_config, tokenizer_dir

IDS = [2, 10, 11, 12]
GREEDY = SamplingParams(max_new_tokens=4, temperature=0)


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    model = small_model(vocab_size=256_000, context=128)
    tokenizer = Tokenizer.from_folder(tokenizer_dir())
    return Gemma(model, tokenizer, CPU, engine=EngineConfig(block_size=4, max_batch_tokens=16, sequences=6))


# One prompt, in every form that people have it in. What is right is what the plain list of ints gives.
ONE: dict[str, Any] = {
    "list": IDS,
    "tuple": tuple(IDS),
    "range": range(10, 14),
    "numpy ints": [np.int64(i) for i in IDS],
    "numpy array": np.array(IDS),
    "numpy int32": np.array(IDS, dtype=np.int32),
    "numpy uint16": np.array(IDS, dtype=np.uint16),
    "tensor": torch.tensor(IDS),
    "int32 tensor": torch.tensor(IDS, dtype=torch.int32),
    "tensors of no dimension": list(torch.tensor(IDS)),
    "generator": None,  # made below; it can be read only once
}


def _fresh(name: str) -> Any:
    return (i for i in IDS) if name == "generator" else ONE[name]


@pytest.mark.parametrize("name", ONE)
def test_one_prompt_of_ids(name: str, gemma: Gemma) -> None:
    ids = [int(i) for i in (IDS if name == "generator" else ONE[name])]
    expected = gemma.complete([ids], GREEDY)[0]
    assert expected.prompt_ids == tuple(ids)
    options = {"max_new_tokens": 4, "temperature": 0}
    assert gemma.generate(_fresh(name), **options) == expected.text
    assert gemma.generate([_fresh(name)], **options) == [expected.text]
    assert gemma.stream(_fresh(name), **options).result.token_ids == expected.token_ids
    assert gemma.stream_ids(_fresh(name), GREEDY).result.token_ids == expected.token_ids
    assert [result.token_ids for result in gemma.complete(_fresh(name), GREEDY)] == [expected.token_ids]
    assert gemma.score(_fresh(name)) == gemma.score([ids])
    encoded = gemma.encode(_fresh(name))
    assert encoded == ids
    assert all(type(i) is int for i in encoded)


@pytest.mark.parametrize("make", [np.array, torch.tensor, list, lambda rows: [torch.tensor(row) for row in rows]])
def test_several_prompts_of_ids(make: Callable[[Any], Any], gemma: Gemma) -> None:
    rows = [IDS, [2, 20, 21, 22]]
    expected = [gemma.complete([ids], GREEDY)[0] for ids in rows]
    assert gemma.generate(make(rows), max_new_tokens=4, temperature=0) == [result.text for result in expected]
    assert [result.token_ids for result in gemma.complete(make(rows), GREEDY)] == [r.token_ids for r in expected]
    scores = gemma.score(make(rows))
    assert scores == gemma.score([list(ids) for ids in rows])
    for own, ids in zip(scores, rows, strict=True):  # a product of other rows beside it is rounded in another order
        assert own == pytest.approx(gemma.score([ids])[0], abs=1e-5)


def test_texts_in_other_containers(gemma: Gemma) -> None:
    texts = ["The capital", "of France"]
    options: dict[str, Any] = {"max_new_tokens": 3, "temperature": 0}
    expected = gemma.generate(texts, **options)
    assert gemma.generate(np.array(texts), **options) == expected
    assert gemma.generate(np.array(texts, dtype=object), **options) == expected
    assert gemma.generate((text for text in texts), **options) == expected
    assert gemma.generate(np.str_(texts[0]), **options) == expected[0]
    assert gemma.generate([texts[0], gemma.encode(texts[1])], **options) == expected
    assert gemma.generate([]) == gemma.score([]) == gemma.complete([], GREEDY) == []
    assert gemma.complete(texts[0], GREEDY)[0].prompt_ids == tuple(gemma.encode(texts[0]))
    row = torch.tensor([IDS])  # what a tokenizer returns for one text
    assert gemma.encode(row) == IDS


BAD: dict[str, tuple[Any, str]] = {
    "bool": ([2, True], "True"),
    "float": ([2, 10.0], "10.0"),
    "numpy float": ([2, np.float32(1)], "float32"),
    "numpy bool": ([2, np.bool_(True)], "bool"),
    "float tensor": (torch.tensor([2.0, 3.0]), "dtype float32 and shape"),
    "bool array": (np.array([True, False]), "dtype bool"),
    "three dimensions": (torch.zeros(1, 2, 3, dtype=torch.int64), r"shape \[1, 2, 3\]"),
    "number": (7, "7"),
    "array of no dimension": (np.array(7), "shape"),
    "none": (None, "NoneType"),
    "bytes": (b"text", "decode it"),
    "encoding": ({"input_ids": [IDS]}, "give its input_ids"),
    "set": ({2, 3}, "of type set"),
    "none within": ([None], "NoneType"),
    "mixed": ([2, "text"], "mixes"),
    "deep": ([[[2, 3]]], "several prompts"),
    "text within ids": ([[2, "a"]], "several prompts"),
    "padded": (torch.tensor([[0, 0, 2, 5], [2, 6, 7, 8]]), r"prompts\[0\] begins or ends with padding"),
    "not an id": ([2, -1], "-1"),
    "not in the vocabulary": (np.array([2, 10**6]), "1000000"),
    "no tokens": ([[]], "prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_prompt(name: str, gemma: Gemma) -> None:
    value, message = BAD[name]
    calls = [gemma.generate, gemma.score, lambda prompts: gemma.complete(prompts, GREEDY)]
    if name != "no tokens":
        calls += [gemma.stream, lambda prompt: gemma.stream_ids(prompt, GREEDY)]
    for call in calls:
        with pytest.raises(ParameterError, match=message if call in calls[:3] else None) as caught:
            call(value)
        assert "\n" not in str(caught.value)
    assert not gemma.engine.has_work


def test_one_prompt_where_one_is_asked_for(gemma: Gemma) -> None:
    for call in (gemma.stream, gemma.encode, lambda prompt: gemma.generate(prompt, stream=True)):
        for several in ([IDS, IDS], ["a", "b"], torch.tensor([IDS, IDS])):
            with pytest.raises(ParameterError, match="one"):
                call(several)


@pytest.mark.parametrize("params", [{"temperature": 0}, None, "greedy", [{"temperature": 0}], 3])
def test_sampling_params_of_complete(params: Any, gemma: Gemma) -> None:
    with pytest.raises(ParameterError, match="SamplingParams"):
        gemma.complete([IDS], params)
    with pytest.raises(ParameterError, match="SamplingParams"):
        gemma.stream_ids(IDS, params)


# ---- several answers ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_n_answers(gemma: Gemma) -> None:
    texts = ["The capital of France is", "one"]
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 7}
    alone = [[gemma.generate(text, max_new_tokens=12, seed=derived_seed(7, k)) for k in range(3)] for text in texts]
    assert gemma.generate(texts, n=3, **options) == alone
    assert gemma.generate(texts[0], n=3, **options) == alone[0]
    assert gemma.generate(texts, n=1, **options) == [row[:1] for row in alone]
    assert gemma.generate(texts, **options) == [row[0] for row in alone]
    assert all(len(set(row)) == 3 for row in alone)
    free = gemma.generate(texts[0], n=3, max_new_tokens=12)
    assert len(set(free)) == 3
    assert gemma.generate(texts[0], n=1, max_new_tokens=12, temperature=0) == [
        gemma.generate(texts[0], max_new_tokens=12, temperature=0)
    ]
    messages = [{"role": "user", "content": "hi"}]
    answers = gemma.chat(messages, n=2, **options)
    assert answers[0] == gemma.chat(messages, **options) != answers[1]


def test_no_prompts(gemma: Gemma) -> None:
    assert gemma.generate([]) == gemma.generate([], n=2) == []
    with pytest.raises(ParameterError, match="n is 0"):
        gemma.generate([], n=0)


def test_n_answers_share_their_prompt(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the prompt's blocks all whole ones but the last token's come from the cache for every later answer."""
    prompt, seen = [2, *range(700, 730)], []
    real = gemma.prepare_stream

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(real(*args, **options))
        return seen[-1]

    monkeypatch.setattr(gemma, "prepare_stream", watched)
    gemma.generate(prompt, n=4, max_new_tokens=3)
    stats = [stream.result.stats for stream in seen]
    assert [s.cached_tokens for s in stats] == [0, *[(len(prompt) - 1) // 4 * 4] * 3]
    assert_nothing_held(gemma.engine)


def test_seeds_differ() -> None:
    seeds = [derived_seed(seed, k) for seed in range(-3, 50) for k in range(100)]
    assert len(set(seeds)) == len(seeds)
    assert all(-(2**63) <= seed < 2**64 for seed in seeds)
    assert 0 <= derived_seed(2**64 - 1, 5) < 2**64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0; expected a whole number"),
        ({"n": True}, "n is True"),
        ({"n": 2.0}, "n is 2.0"),
        ({"n": "2"}, "n is '2'"),
        ({"n": 2, "temperature": 0}, "n=2 answers would all be the same"),
        ({"n": 2, "top_k": 1}, "n=2 answers would all be the same"),
        ({"n": 2, "stream": True}, "stream=True gives one answer"),
        ({"n": 2, "logprobs": 1}, "logprobs"),
    ],
)
def test_n_refused(options: dict[str, Any], message: str, gemma: Gemma) -> None:
    with pytest.raises(ParameterError, match=message):
        gemma.generate("a", **options)
    with pytest.raises(ParameterError, match=message):
        gemma.chat([{"role": "user", "content": "hi"}], **options)
    assert not gemma.engine.has_work


# ---- repr and pickle ---------------------------------------------------------------------------------------------


def test_repr(gemma: Gemma, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "tiny", hf_model(tiny_config(vocab_size=256_000)), tokenizer=True)
    loaded = Gemma.load(folder, quantization="nf4", dtype="bfloat16", max_context=200, progress=False)
    size = f"{hf_size(tiny_config(vocab_size=256_000)) / 1e9:.2f}B"
    assert repr(loaded) == f"Gemma('{folder}', {size} parameters, bfloat16, nf4, cpu, context 200)"
    assert repr(gemma).startswith("Gemma('gemma2', 0.")


def hf_size(config: Any) -> int:
    return int(hf_model(config).num_parameters())


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_pickling_is_refused_by_name(way: Callable[[Any], Any], gemma: Gemma) -> None:
    with pytest.raises(UnsupportedError, match=r"a Gemma cannot be pickled or copied.*load in each process"):
        way(gemma)
    with gemma.stream("a", max_new_tokens=2) as stream, pytest.raises(GemcutError, match="a TextStream cannot be"):
        way(stream)
    assert pickle.loads(pickle.dumps(stream.result)) == stream.result
