"""The watermark: unbiased over keys, found by its key alone, the same in any batch. Distributions by arithmetic."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from gemcut import SamplingParams
from gemcut.engine.sampler import uniform
from gemcut.errors import ParameterError
from gemcut.safety.watermark import MARKED, Contexts, Watermark, _binomial_tail
from gemcut.server.state import ServerSettings, ServerState
from server.host import NAME, new_gemma, serving

from ..cli.conftest import Cli, cli, tiny  # noqa: F401

KEY = b"an invented key of some length"
KEYS = 10_000


def test_one_draw_over_many_keys_is_unmarked() -> None:
    chances = np.array([0.4, 0.2, 0.15, 0.1, 0.08, 0.04, 0.02, 0.01])
    ids, text = np.arange(100, 108), [5, 9, 2, 7, 7]
    counts, changed = Counter[int](), 0
    for number in range(KEYS):
        mark = Watermark(f"key number {number:08d}".encode())
        point = uniform(number, 5)
        token = mark.choose(chances, ids, text, Contexts(4, 1), point)
        plain = int(ids[np.searchsorted(chances.cumsum(), point, side="right")])
        changed += token != plain
        counts[token] += 1
    found = stats.chisquare([counts[int(i)] for i in ids], chances * KEYS)
    assert found.pvalue > 1e-3, found
    assert changed > KEYS / 10  # it does do something


def test_the_average_over_keys_is_exactly_the_distribution() -> None:
    rng = np.random.default_rng(1)
    chances, ids = np.sort(rng.dirichlet(np.ones(6)))[::-1], np.arange(6)
    total = np.zeros(6)
    for number in range(4000):
        mark = Watermark(f"another key {number:08d}".encode())
        own = mark.reweighed(chances.copy(), mark.bits([1, 2, 3, number], ids))
        assert own.sum() == pytest.approx(chances.sum())
        slow = chances / chances.sum()  # two players a round, by the definition: P(x) = p(x) (1 + g(x) - sum of p g)
        for row in mark.bits([1, 2, 3, number], ids):
            mean = sum(p for p, g in zip(slow, row, strict=True) if g)
            slow = np.array([p * (1 + float(g) - mean) for p, g in zip(slow, row, strict=True)])
        assert own == pytest.approx(slow * chances.sum(), rel=1e-9)
        total += own
    assert np.abs(total / 4000 - chances).max() < 0.03


def test_the_tail_of_a_fair_coin() -> None:
    for total in (1, 30, 3000, 30_000):
        for hits in {0, total // 3, total // 2, total // 2 + 3 * int(total**0.5) // 2, total}:
            wanted = stats.binom.sf(hits - 1, total, 0.5)
            assert _binomial_tail(hits, total) == pytest.approx(wanted, rel=1e-6, abs=1e-300)


def test_contexts() -> None:
    contexts, tokens, marked = Contexts(2, 3), [1, 2, 3], []
    for token in (7, 8, 9, 7, 8, 9, 5, 7, 8):
        marked.append(contexts.fresh(tokens))
        assert contexts.fresh(tokens) == marked[-1]  # asked again
        tokens = [*tokens, token]
    #            -      7      78    89    97    78     89     95    57
    assert marked == [False, False, True, True, True, False, False, True, True]


def test_texts_without_it_have_even_p_values() -> None:
    rng, mark = np.random.default_rng(3), Watermark(KEY)
    values = [mark.detect(rng.integers(0, 256_000, 40).tolist()).p_value for _ in range(400)]
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert sum(value < 0.05 for value in values) < 40  # 20 are expected
    repeated = [1, 2, 3, 4, 5] * 200
    assert mark.detect(repeated).tokens == 5  # each context counts once
    assert mark.detect([1, 2]).p_value == 1.0


def test_a_model_that_marks() -> None:
    gemma, mark = new_gemma(), Watermark(KEY)
    prompts = ["The sky is", "A rose", "One", "Well"]
    base = {"max_new_tokens": 60, "seed": 5, "ignore_eos": True}
    for more in ({}, {"top_k": 50}, {"top_k": 100, "top_p": 0.6}, {"top_k": 1000, "temperature": 1.3}):
        params = SamplingParams(**base, **more, watermark=mark)  # type: ignore[arg-type]
        together = [found.token_ids for found in gemma.complete(prompts, params)]
        alone = [gemma.complete(prompt, params)[0].token_ids for prompt in prompts]
        assert together == alone, "the batch changed the draws"
        plain = SamplingParams(**base, **more)  # type: ignore[arg-type]
        free = [found.token_ids for found in gemma.complete(prompts, plain)]
        if more:
            assert [each[:4] for each in free] == [each[:4] for each in together]
        if more != {"top_k": 50}:  # this network's chances are all alike, so 64 of many are hardly ever drawn
            continue
        assert max(mark.detect(each).p_value for each in together) < 1e-4
        assert min(mark.detect(each).p_value for each in free) > 1e-4
        assert min(Watermark(KEY + b"!").detect(each).p_value for each in together) > 1e-4


def test_the_rest_of_a_vocabulary_keeps_its_chances() -> None:
    """Nothing is filtered: tokens beyond the marked ones are drawn as often as without a key."""
    gemma = new_gemma()
    prompt = gemma.encode("The sky is")
    beyond = [0, 0]
    for which, mark in enumerate((None, Watermark(KEY))):
        base = {"max_new_tokens": 6, "ignore_eos": True, "logprobs": MARKED, "watermark": mark}
        params = [SamplingParams(**base, seed=n) for n in range(60)]  # type: ignore[arg-type]
        for found in gemma.complete([prompt] * 60, params):
            assert found.logprobs is not None
            beyond[which] += sum(each.token_id not in {i for i, _ in each.top} for each in found.logprobs)
    assert abs(beyond[0] - beyond[1]) < 5 * 360**0.5 / 2
    assert beyond[1] > 0


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="has 3 bytes; expected 16 to"):
        Watermark(b"abc")
    with pytest.raises(ParameterError, match="without the key that marked a text nothing can be detected"):
        Watermark.read(tmp_path / "none")
    with pytest.raises(ParameterError, match="draws alone are marked"):
        SamplingParams(watermark=Watermark(KEY), temperature=0)
    with pytest.raises(ParameterError, match="watermark is str"):
        SamplingParams(watermark="key")  # type: ignore[arg-type]
    assert KEY.decode() not in repr(SamplingParams(watermark=Watermark(KEY)))


def test_commands(tiny: Path, cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    key = tmp_path / "key"
    key.write_bytes(KEY + b"\n")
    run = cli(
        "generate",
        "-m",
        tiny,
        "--watermark-key",
        key,
        "-n",
        "80",
        "--top-k",
        "40",
        "--seed",
        "3",
        "--json",
        "The sky is",
    )
    assert run.code == 0, run.err
    report = json.loads(run.out)
    assert report["sampling"]["watermark"]["value"] is True
    (tmp_path / "text").write_text(report["text"])
    run = cli("watermark", "detect", "-m", tiny, "--key", key, "-f", tmp_path / "text", "--json")
    assert json.loads(run.out)["p_value"] < 1e-3
    assert "--key FILE is missing" in cli("watermark", "detect", "-m", tiny, "Some text").error
    assert "nothing can be detected" in cli("watermark", "detect", "-m", tiny, "--key", "none", "A text").error


def test_a_server_that_marks() -> None:
    mark, gemma = Watermark(KEY), new_gemma()
    with serving(gemma, ServerState(ServerSettings(names=(NAME,)), watermark=mark)) as served:
        ask = {"max_tokens": 80, "ignore_eos": True, "seed": 1, "prompt": [2, 651, 7], "top_k": 40}
        served.complete(**ask)
        choice = served.complete(**ask).json()["choices"][0]
        ids = gemma.tokenizer.encode(choice["text"], add_bos=False)
        assert mark.detect(ids).p_value < 1e-3
        assert served.complete(temperature=0).status_code == 200  # nothing is drawn, so nothing is marked
