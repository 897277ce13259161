"""gemcut next, embed and probe: equal to transformers, layer by layer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import support
from cli.conftest import Cli, cli, tiny  # noqa: F401
from gemcut import Gemma
from gemcut.errors import ContextLengthError, ParameterError
from gemcut.uses.probe import next_tokens, probe

IDS = [2, 7, 9, 200, 7, 31, 5, 9, 250, 3]  # longer than the window of 4
# fp32 on both sides, sums in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=["gemma2", "gemma3_text"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Gemma, Any]:
    theirs = support.hf_model(support.tiny_config(request.param))
    folder = support.save_checkpoint(tmp_path_factory.mktemp("probe") / "c", theirs)
    return Gemma.load(folder, progress=False), theirs


@torch.no_grad()
def _lens(theirs: Any, states: Any) -> torch.Tensor:
    """Log-probabilities [L + 1, T, V]: transformers' own norm and head over each of its hidden states."""
    found = []
    for place, hidden in enumerate(states):
        logits = theirs.lm_head(hidden if place == len(states) - 1 else theirs.model.norm(hidden))[0]
        if (cap := theirs.config.final_logit_softcapping) is not None:
            logits = torch.tanh(logits / cap) * cap
        found.append(logits.double().log_softmax(-1))
    return torch.stack(found)


@torch.no_grad()
def test_a_probe_is_transformers_hidden_states(pair: tuple[Gemma, Any]) -> None:
    ours, theirs = pair
    found = probe(ours, IDS, top=3)
    right = theirs(torch.tensor([IDS]), output_hidden_states=True)
    states = torch.stack([state[0] for state in right.hidden_states])
    assert found.hidden is not None
    torch.testing.assert_close(torch.from_numpy(found.hidden), states, **CLOSE)
    lens = _lens(theirs, right.hidden_states)
    torch.testing.assert_close(lens[-1].float(), right.logits[0].log_softmax(-1), **CLOSE)  # the reference itself
    best = lens.topk(3)
    np.testing.assert_allclose(found.top_logprobs, best.values.numpy(), rtol=1e-3, atol=1e-3)
    own = np.take_along_axis(lens.numpy(), found.top_ids, -1)  # ties may stand in another order
    np.testing.assert_allclose(own, best.values.numpy(), rtol=1e-3, atol=1e-3)
    targets = lens[:, :-1].gather(2, torch.tensor(IDS[1:])[None, :, None].expand(len(lens), -1, 1))[..., 0]
    np.testing.assert_allclose(found.target_logprobs, targets.numpy(), rtol=1e-3, atol=1e-3)


def test_a_probe_agrees_with_scores_and_embeddings(pair: tuple[Gemma, Any]) -> None:
    ours, _ = pair
    found = probe(ours, IDS)
    np.testing.assert_allclose(found.target_logprobs[-1], ours.score([IDS])[0], rtol=1e-4, atol=1e-4)
    assert found.hidden is not None
    np.testing.assert_allclose(found.hidden[-1, 1:].mean(0), ours.embed([IDS])[0], rtol=1e-4, atol=1e-4)
    assert probe(ours, IDS, hidden=False).arrays().keys() == found.arrays().keys() - {"hidden"}


@torch.no_grad()
def test_next_tokens(pair: tuple[Gemma, Any]) -> None:
    ours, theirs = pair
    found = next_tokens(ours, IDS, top=320)
    right = theirs(torch.tensor([IDS])).logits[0, -1].double().log_softmax(-1)
    assert sorted(i for i, _ in found) == list(range(320))
    assert sum(math.exp(logprob) for _, logprob in found) == pytest.approx(1, abs=1e-5)
    for token, logprob in found:
        assert logprob == pytest.approx(float(right[token]), abs=1e-4)


def test_what_cannot_be_probed(pair: tuple[Gemma, Any]) -> None:
    ours, _ = pair
    for ids, top, said in [([], 1, "no tokens"), ([2, 999], 1, "token 999"), ([2], 0, "top is 0"), ([2], 321, "1 to")]:
        with pytest.raises(ParameterError, match=said):
            probe(ours, ids, top=top)
    with pytest.raises(ContextLengthError, match="257 tokens, the context holds 256"):
        probe(ours, [2] * 257)


def test_the_commands(cli: Cli, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    gemma = Gemma.load(tiny, progress=False)
    ids = gemma.encode("The sky")
    found = json.loads(cli("next", "The sky", "-m", tiny, "--top", "3", "--json").out)["next"]
    assert [row["id"] for row in found] == [i for i, _ in next_tokens(gemma, ids, top=3)]
    assert len(cli("next", "The sky", "-m", tiny, "--top", "3").out.splitlines()) == 3
    out = tmp_path / "a.npz"
    done = cli("probe", "The sky", "-m", tiny, "--out", out, "--top", "2")
    assert (done.code, len(done.out.splitlines())) == (0, 5)  # the embedding and four layers
    with np.load(out, allow_pickle=False) as arrays:
        right = probe(gemma, ids, top=2)
        for name, value in right.arrays().items():
            np.testing.assert_array_equal(arrays[name], value)
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"text": "one", "n": 1}\n\n{"text": "two words"}\n')
    vectors = gemma.embed(["one", "two words"])
    assert cli("embed", "--file", lines, "-m", tiny, "--out", tmp_path / "o.jsonl").code == 0
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert (rows[0]["n"], rows[1]["text"]) == (1, "two words")
    np.testing.assert_allclose([row["embedding"] for row in rows], vectors, rtol=1e-5, atol=1e-6)
    assert cli("embed", "--file", lines, "-m", tiny, "--normalize", "--out", tmp_path / "o.npy").code == 0
    units = np.load(tmp_path / "o.npy", allow_pickle=False)
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, rtol=1e-5)
    assert json.loads(cli("embed", "one", "-m", tiny).out)["text"] == "one"
    assert not list(tmp_path.glob(".*.part"))


def test_bad_input(cli: Cli, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"text": "one"}\n{"txt": 1}\n')
    for args, said in [
        (("embed", "--file", lines), "line 2: expected a JSON object"),
        (("embed",), "give a text, or --file"),
        (("embed", "x", "--out", "a.txt"), "ends in .jsonl or .npy"),
        (("probe", "x", "--out", "a.txt"), "ends in .npz"),
        (("probe", "x", "--out", "a.npz", "--top", "0"), "at least 1"),
        (("next",), "give a text, or --file"),
        (("next", ""), "the text is empty"),
    ]:
        done = cli(*args, "-m", tiny)
        assert done.code == 2
        assert said in done.error
