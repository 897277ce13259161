"""What docs/training.md and configs/ say: the commands run, the sizes are the card's."""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path

import pytest

import support
from gemcut.cli.main import main
from gemcut.config import FAMILY
from gemcut.training.fit import default_mesh
from gemcut.training.runfile import network_config, read_run_file
from gemcut.training.sharding import check_batch, check_network
from gemcut.training.topology import Pod

from .runs import command, write_run

DOCUMENT = (support.ROOT / "docs" / "training.md").read_text("utf-8")
CONFIGS = sorted((support.ROOT / "configs").glob("*.toml"))
CARD = {
    "gemma2-27b-v5p-6144": ("gemma-2-27b", "v5p:16x16x24", 1, 13e12),
    "gemma2-9b-v4-4096": ("gemma-2-9b", "v4:16x16x16", 1, 8e12),
    "gemma2-2b-v5e-512": ("gemma-2-2b", "v5e:16x16", 2, 2e12),
}


def with_sources(path: Path, folder: Path) -> Path:
    """A copy of a run file in ``folder``, where what it names is there."""
    text = path.read_text("utf-8")
    copy = folder / path.name
    copy.write_text(text)
    for source in tomllib.loads(text)["source"]:
        (folder / source["path"]).mkdir(parents=True, exist_ok=True)
    return copy


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_can_be_read(path: Path, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    file = read_run_file(with_sources(path, tmp_path / "configs"))
    config = network_config(file, file.model.train_tokenizer or None)
    assert file.run.length <= config.max_position_embeddings
    if path.stem not in CARD:
        assert config.num_parameters() < 60_000_000
        return
    name, pod, slices, tokens = CARD[path.stem]
    assert config == FAMILY[name]
    mesh = dict(zip(("replica", "data", "model"), file.run.mesh, strict=True))
    assert math.prod(file.run.mesh) == Pod.parse(pod, slices).chips
    assert file.run.mesh == default_mesh(config, Pod.parse(pod, slices))  # the one that `train fit` compiles
    check_network(config, mesh)
    check_batch(file.run.batch, mesh)
    assert file.run.steps * file.run.batch * file.run.micro_batches * file.run.length == pytest.approx(tokens, rel=1e-3)


def test_the_document_names_every_config_and_the_pods_page_is_right() -> None:
    assert set(CARD) <= {path.stem for path in CONFIGS}
    for path in CONFIGS:
        assert path.name in DOCUMENT


def test_the_run_file_of_the_document_is_one(tmp_path: Path) -> None:
    """Its keys are all known, and its values are the built-in ones where it says so."""
    text, teacher = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
    (tmp_path / "tokens" / "web").mkdir(parents=True)
    (tmp_path / "run.toml").write_text(text)
    file = read_run_file(tmp_path / "run.toml")
    least = '[run]\nsteps=1000\nbatch=8\nlength=1024\n[model]\nsize="gemma-2-2b"\ntokenizer="tokenizer.json"\n'
    (tmp_path / "least.toml").write_text(least + '[[source]]\nname="web"\npath="tokens/web"\n')
    built_in = read_run_file(tmp_path / "least.toml")
    assert file.optimizer == built_in.optimizer
    assert vars(file.run) | {"mesh": ()} == vars(built_in.run)
    assert vars(file.model) | {"remat": "none"} == vars(built_in.model)
    assert vars(file.sources[0]) | {"weight": 1.0} == vars(built_in.sources[0])
    (tmp_path / "teacher.toml").write_text(text + teacher)
    taught = read_run_file(tmp_path / "teacher.toml").teacher
    assert taught is not None
    assert (taught.temperature, taught.share) == (1.0, 1.0)


@pytest.mark.slow
def test_the_commands_of_the_document(tmp_path: Path) -> None:
    """Preview, run, stop, resume, plot and stored answers, each a command of its own."""
    for line in ("train preview configs/", "train run configs/", "train resume", "train plot", "train teacher-logits"):
        assert f"gemcut {line}" in DOCUMENT
    file = write_run(tmp_path, steps=3, run='sample_every = 3\nsample_prompt = "the model"')

    def said(*arguments: object) -> str:
        out, err = (child := command(*arguments)).communicate(timeout=240)
        assert child.returncode == 0, err
        return out

    shown = json.loads(said("preview", file, "--json", "-n", "1"))
    assert [source["share"] for source in shown["sources"]] == pytest.approx([2 / 3, 1 / 3])
    window = shown["sources"][0]["shown"][0]
    assert sum(document["tokens"] for document in window) == 16
    first = (tmp_path / "a" / "000.txt").read_text()
    assert ("<bos>" + first).startswith(window[0]["text"].rstrip("�"))
    assert "source b: " in said("preview", file)
    out = said("run", file, tmp_path / "out", "--until", "2")
    assert "step      2" in out
    assert "model: " not in out
    lines = [json.loads(line) for line in said("resume", tmp_path / "out", "--json").splitlines()]
    assert lines[0]["step"] == 3
    assert lines[0]["sample"].startswith("the model")
    assert lines[-1]["model"] == str(tmp_path / "out" / "model")
    assert f"model: {tmp_path}" in said("run", file, tmp_path / "out", "--resume")
    said("plot", tmp_path / "out")
    assert (tmp_path / "out" / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "tokenizer.json").write_bytes((tmp_path / "out" / "tokenizer.json").read_bytes())
    taught = write_run(tmp_path, "taught.toml", model='tokenizer = "tokenizer.json"')
    told = said(
        "teacher-logits", taught, "a", tmp_path / "answers", "--model", tmp_path / "out" / "model", "--top", "5"
    )
    assert re.fullmatch(r"\d+ windows: .*answers\n", told)
    assert (tmp_path / "answers" / "ids.npy").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "none.toml", "out"), "there is no run file none.toml"),
        (("resume", "nowhere"), "nowhere is no run; expected a folder that `gemcut train run` made"),
        (("plot", "nowhere"), "nowhere has no metrics"),
        (("plot", "nowhere", "-o", "a.txt"), "a.txt"),
        (("preview", "none.toml", "-n", "0"), "--windows is 0; expected 1 to 100"),
        (("run", "{file}", "{folder}/x", "--until", "11"), "--until is 11; expected 1 to 10"),
        (("run", "{file}", "{folder}/x", "--driver", "horse"), "driver is 'horse'; expected one of auto"),
        (("teacher-logits", "{file}", "a", "{folder}/y", "-m", "{folder}", "--batch", "0"), "--batch is 0"),
    ],
)
def test_what_cannot_be_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    file = write_run(tmp_path)
    assert main(["train", *(word.format(file=file, folder=tmp_path) for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
