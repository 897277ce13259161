"""A folder of weights and configuration alone: ids go in and come out as in transformers, texts are refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import support
from gemcut import Gemma, SamplingParams, hf
from gemcut.cli.main import main
from gemcut.errors import TokenizerError

IDS = torch.tensor([[2, 10, 11, 12, 13], [2, 20, 21, 22, 23]])
SPECIAL = {"bos_token_id": 3, "eos_token_id": [7, 8], "pad_token_id": 5}


@pytest.fixture(scope="module")
def reference() -> Any:
    return support.hf_model(support.tiny_config(**SPECIAL))


@pytest.fixture(scope="module")
def bare(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.save_checkpoint(tmp_path_factory.mktemp("bare") / "m", reference)


@pytest.fixture(scope="module")
def gemma(bare: Path) -> Gemma:
    return Gemma.load(bare, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 20, "do_sample": False},
        {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.3},
        {"max_length": 12, "do_sample": False, "eos_token_id": 11},
        {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": list(range(100))},
    ],
)
def test_greedy_ids_are_transformers(options: dict[str, Any], bare: Path, reference: Any) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(bare, attn_implementation="eager")
    model = hf.AutoModelForCausalLM.from_pretrained(bare)
    assert torch.equal(model.generate(IDS, **options), theirs.generate(IDS, **options))
    padded = torch.tensor([[5, 5, 2, 10, 11], [2, 20, 21, 22, 23]])  # 5 is the pad token
    assert torch.equal(model.generate(padded, **options), theirs.generate(padded, **options))
    assert torch.equal(model.generate(**options), theirs.generate(**options))  # from <bos> alone
    for name, value in SPECIAL.items():
        assert getattr(model.generation_config, name) == getattr(theirs.generation_config, name) == value
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)  # fp32 in another order


def test_each_row_ends_at_the_configs_end(bare: Path, reference: Any) -> None:
    free = reference.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None)
    end = int(free[0, 8])
    model = hf.AutoModelForCausalLM.from_pretrained(bare)
    model.generation_config.eos_token_id = end
    ours = model.generate(IDS, max_new_tokens=12)
    assert torch.equal(ours, reference.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=end))
    assert (ours[0] == 5).any() or (ours[1] == 5).any() or ours.shape[1] < 17


def test_gemma_takes_ids_and_its_texts_are_empty(gemma: Gemma, reference: Any) -> None:
    params = SamplingParams(max_new_tokens=9, temperature=0)
    theirs = reference.generate(IDS[:1], max_new_tokens=9, do_sample=False)[0, IDS.shape[1] :]
    for result in (gemma.complete(IDS[0], params)[0], gemma.stream_ids(IDS[0].tolist(), params).result):
        assert list(result.token_ids) == theirs.tolist()
        assert result.text == ""
    logprobs = torch.log_softmax(reference(IDS[:1]).logits[0].double(), dim=-1)
    expected = logprobs[:-1].gather(1, IDS[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(gemma.score(IDS[:1])[0]).double(), expected, rtol=1e-4, atol=1e-4)
    assert gemma.stop_ids == {7, 8}
    assert (gemma.bos_id, gemma.pad_id) == (3, 5)
    assert repr(gemma).startswith("Gemma(")


def test_texts_raise_what_is_missing_and_what_to_do(gemma: Gemma, bare: Path) -> None:
    params = SamplingParams(max_new_tokens=2)
    model = hf.AutoModelForCausalLM.from_pretrained(bare)
    calls: list[Any] = [
        lambda: gemma.tokenizer,
        lambda: gemma.generate("Hello"),
        lambda: gemma.generate([2, 3]),  # which gives a text
        lambda: gemma.stream([2, 3]),
        lambda: gemma.score("Hello"),
        lambda: gemma.complete("Hello", params),
        lambda: gemma.complete([2, 3], SamplingParams(stop=("a",))),
        lambda: gemma.chat([{"role": "user", "content": "Hello"}]),
        lambda: model.generate(IDS, stop_strings=["a"]),
    ]
    for call in calls:
        with pytest.raises(TokenizerError, match=r"no tokenizer\.json in .*put the checkpoint's.*token ids alone") as e:
            call()
        assert "\n" not in str(e.value)
        assert str(bare) in str(e.value)
    assert not gemma.engine.has_work
    assert not model.gemma.engine.has_work
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        hf.AutoTokenizer.from_pretrained(bare)


def test_the_bare_model_is_saved_and_moved(bare: Path, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(bare)
    model.gemma = hf.loading.moved(model.gemma, torch.device("cpu"))
    model.save_pretrained(tmp_path / "again")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.generate(IDS, max_new_tokens=5), model.generate(IDS, max_new_tokens=5))
    with pytest.raises(Exception, match="cannot be pickled"):
        pickle.dumps(model)


def test_on_the_command_line(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["generate", "-m", str(bare), "Hello"], ["chat", str(bare), "--once", "Hello"]):
        assert main(line) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"error: there is no tokenizer.json in {bare}, so this model takes no texts: put")
        assert len(err.splitlines()) == 1
    assert main(["info", str(bare)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "none, and no tokenizer: it takes token ids alone" in shown
    assert main(["info", str(bare), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stop_tokens"] == [{"id": 7, "token": None}, {"id": 8, "token": None}]


def test_a_damaged_tokenizer_is_no_missing_one(bare: Path, tmp_path: Path) -> None:
    for file in bare.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="damaged or not a tokenizer"):
        Gemma.load(tmp_path, progress=False)
