"""Memorization, on a small Gemma that the test trains until it knows half of a corpus by heart."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import support
from cli.conftest import Run
from gemcut import Gemma
from gemcut.cli.main import main
from gemcut.errors import DataError, ParameterError
from gemcut.evaluation.canaries import by_times, exposures, make_canaries, plant, read_key
from gemcut.evaluation.intervals import bootstrap_mean, difference, wilson
from gemcut.evaluation.memorize import edit_distance, measure, read_documents, report, sample_corpus
from gemcut.text import Tokenizer

LENGTH = 12


def words(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choice("abcdefghijklmnop") for _ in range(3)) for _ in range(count))


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    normal = ["▁", *"abcdefghijklmnopqrstuvwxyzTA0123456789.@"]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *normal]
    types = [3] * len(control) + [6] * 256 + [1] * len(normal)
    scores = [-1000.0] * len(control) + [0.0] * 256 + [-float(i) for i in range(len(normal))]
    return Tokenizer.from_gguf_vocab(tokens, scores, types)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, small: Tokenizer) -> tuple[Path, Any, list[Any]]:
    """(a folder with the model, what it was trained on and what not; the transformers model; the canaries)."""
    folder = tmp_path_factory.mktemp("memory")
    learned = [words(seed, 8) for seed in range(4)]
    learned[0] = "write to ann.b@mail.de for it " + words(99, 3)  # the address begins in the suffix's half
    write(folder / "corpus" / "web.jsonl", [*learned, "too short"])
    write(folder / "corpus" / "code" / "a.jsonl", [words(seed, 8) for seed in range(20, 24)])  # never shown to it
    write(folder / "control" / "new.jsonl", [words(seed, 8) for seed in range(40, 46)])
    canaries = make_canaries([0, 1, 12], 2, seed=3)
    planted = [canary.text for canary in canaries for _ in range(canary.times)]
    texts = [*learned * 10, *planted]
    values = support.tiny_config(
        vocab_size=small.vocab_size, hidden_size=48, num_hidden_layers=2, sliding_window=64,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = support.hf_model(values, seed=2, spread=0.1)
    ids = [small.encode(text, parse_special=False) for text in texts]
    width = max(map(len, ids))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    labels = torch.where(batch == 0, -100, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for step in range(110):
        rows = torch.randperm(len(ids), generator=torch.Generator().manual_seed(step))[:16]
        model(input_ids=batch[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    support.save_checkpoint(folder / "model", model)
    small.save(folder / "model")
    return folder, model, canaries


@pytest.fixture(scope="module")
def gemma(world: tuple[Path, Any, list[Any]]) -> Gemma:
    return Gemma.load(world[0] / "model", device="cpu", progress=False)


def test_what_was_trained_is_found_and_nothing_else(gemma: Gemma, world: tuple[Path, Any, list[Any]]) -> None:
    corpus = sample_corpus(gemma, world[0] / "corpus", length=LENGTH)
    found = measure(gemma, corpus.samples)
    result = report(found, corpus)
    assert (result["documents"], result["too_short"], result["samples"]) == (9, 1, 8)
    web, code = result["by_source"]["web"], result["by_source"]["code"]
    assert (web["exact"]["hits"], web["samples"]) == (4, 4)
    assert (code["approximate"]["hits"], code["samples"]) == (0, 4)
    assert web["probability"]["mean"] > 0.3
    assert code["probability"]["mean"] < 1e-6
    assert web["extractable"]["100"]["hits"] == 4
    assert web["personal_data"]["medium"] == {"found": 1, "in_the_document": 1}
    assert code["personal_data"]["medium"]["found"] == 0
    # Against transformers: greedy decoding, and the suffix's log-probability.
    for each in found:
        prompt = torch.tensor([[gemma.bos_id, *each.sample.prefix]])
        with torch.no_grad():
            answer = world[1].generate(prompt, do_sample=False, max_new_tokens=LENGTH, eos_token_id=None)
            whole = torch.cat([prompt, torch.tensor([each.sample.suffix])], dim=1)
            logs = world[1](whole).logits.log_softmax(-1)[0]
        right = sum(float(logs[prompt.shape[1] - 1 + i, token]) for i, token in enumerate(each.sample.suffix))
        assert each.logprob == pytest.approx(right, abs=2e-3)
        said = answer[0, prompt.shape[1] :].tolist()
        assert each.exact == (said == list(each.sample.suffix))
        assert each.distance == edit_distance(said, each.sample.suffix)


def test_exposure_grows_with_repetitions(gemma: Gemma, world: tuple[Path, Any, list[Any]]) -> None:
    """Rank and exposure against a search by transformers among the same number of other secrets."""
    found = exposures(gemma, world[2], references=63)
    table = by_times(found)
    assert list(table) == ["0", "1", "12"]
    assert table["12"]["beat_all"] == 2
    assert table["12"]["mean_exposure"] == 6.0  # log2(64), the most that 63 others can show
    assert table["0"]["mean_exposure"] < 4
    for each in found:
        assert each["exposure"] == pytest.approx(math.log2(64) - math.log2(each["rank"]))


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("abcd", "bcda", 2), ("flaw", "lawn", 2)],
)
def test_edit_distance(one: str, other: str, distance: int) -> None:
    assert edit_distance(list(map(ord, one)), list(map(ord, other))) == distance


def test_intervals() -> None:
    """Wilson's of 10 of 20 and Newcombe's tenth method from the tables of his papers (1998)."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0, 1)
    assert difference(56, 70, 48, 80) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    low, high = bootstrap_mean([0.0, 1.0] * 200)
    assert (low, high) == pytest.approx((0.5 - 0.049, 0.5 + 0.049), abs=0.006)


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> Run:
    capsys.readouterr()
    code = main([str(arg) for arg in args])
    return Run(code, *capsys.readouterr())


def test_the_commands(world: tuple[Path, Any, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = world[0]
    args = ["eval", "memorize", "-m", folder / "model", "--corpus", folder / "corpus", "--length", str(LENGTH)]
    out = run(capsys, *args, "--control", folder / "control", "--out", tmp_path / "memory.json")
    assert out.code == 0, out.err
    assert "corpus" in out.out
    assert "1 of medium severity" in out.out
    assert "ann.b" not in out.out + (tmp_path / "memory.json").read_text()  # no text of a document is kept
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["above_control"]["exact"]["difference"] == pytest.approx(0.5)
    key, lines = tmp_path / "key.json", tmp_path / "canaries.jsonl"
    assert run(capsys, "eval", "canaries", "plant", lines, key, "--times", "0,2", "--each", "3").code == 0
    texts = [json.loads(line)["text"] for line in lines.read_text().splitlines()]
    assert sorted(texts) == sorted(c.text for c in read_key(key) for _ in range(c.times))
    assert len(texts) == 6
    out = run(capsys, "eval", "canaries", "report", key, "-m", folder / "model", "--references", "7", "--json")
    assert set(json.loads(out.out)["by_times"]) == {"0", "2"}


def test_wrong_input_is_one_line(
    world: tuple[Path, Any, list[Any]], gemma: Gemma, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("short")
    args = ["eval", "memorize", "-m", world[0] / "model"]
    assert "holds no document" in run(capsys, *args, "--corpus", tmp_path / "empty").error
    assert "is no folder" in run(capsys, *args, "--corpus", tmp_path / "none").error
    assert "--corpus is missing" in run(capsys, *args).error
    with pytest.raises(DataError, match=r"none of 1 documents in .* has 100 tokens"):
        sample_corpus(gemma, tmp_path / "text")
    with pytest.raises(ParameterError, match="length 0"):
        sample_corpus(gemma, tmp_path / "text", length=0)
    assert [source for _, source, _ in read_documents(tmp_path / "text")] == ["a"]
    key = tmp_path / "key.json"
    key.write_text("{}")
    assert "is no key of canaries" in run(capsys, "eval", "canaries", "report", key, "-m", world[0] / "model").error
    with pytest.raises(ParameterError, match="exists already"):
        plant(make_canaries([1], 1, 0), tmp_path / "lines", key, 0)
    assert not (tmp_path / "lines").exists()
    assert "--times is 'x'" in run(capsys, "eval", "canaries", "plant", "a", "b", "--times", "x").error
