"""A run from its file to a folder: resumed bit for bit, on another mesh, killed, stopped; what its model says."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemcut.errors import CheckpointError, DataError, GemcutError, ParameterError, RecipeError
from gemcut.training import rundir
from gemcut.training.importing import HuggingFaceFolder
from gemcut.training.metrics import read_metrics
from gemcut.training.network import Network
from gemcut.training.parameters import from_hf
from gemcut.training.placement import choose_remat
from gemcut.training.runfile import read_run_file
from gemcut.training.trainer import Trainer

from .runs import command, write_run, write_texts


def train(folder: Path, file: Path, *untils: int | None) -> list[dict[str, Any]]:
    """Train in ``folder``, by a trainer of its own up to each of ``untils``; gives the metrics."""
    read = read_run_file(file)
    with rundir.begin(folder, read):
        for until in untils or (None,):
            Trainer(folder, read).run(until=until)
    return read_metrics(folder)


def tensors(folder: Path) -> dict[str, Any]:
    source = HuggingFaceFolder(folder / "model")
    return {name: source.read(name) for name in source.names}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every trainer compiles the same step: the second one finds it in a folder."""
    settings: Any = jax.config
    settings.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    settings.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    settings.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources, and ten steps in one go in ``whole``."""
    folder = tmp_path_factory.mktemp("base")
    train(folder / "whole", write_run(folder))
    return folder


def test_a_run_resumed_twice_is_the_run_in_one_go_bit_for_bit(base: Path) -> None:
    """In the middle of an epoch of one source, after several of the other, with packing, micro-batches and workers."""
    lines = train(base / "parts", base / "run.toml", 3, 5, None)
    whole = read_metrics(base / "whole")
    assert [line["step"] for line in lines] == list(range(1, 11))
    speeds = ("tokens_per_second", "memory_gib")
    for one, other in zip(whole, lines, strict=True):
        assert {k: v for k, v in one.items() if k not in speeds} == {k: v for k, v in other.items() if k not in speeds}
    ours, theirs = tensors(base / "parts"), tensors(base / "whole")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_the_loss_falls_and_the_sources_are_held_out_apart(base: Path) -> None:
    lines = read_metrics(base / "whole")
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert [line["step"] for line in lines if "held_out" in line] == [5, 10]
    first, last = (line["held_out"] for line in lines if "held_out" in line)
    assert set(last) == {"a", "b"}
    assert last["a"] < first["a"]
    assert lines[0]["loss"] == pytest.approx(np.log(400), abs=1)  # random weights guess


def test_another_mesh_goes_on_from_a_checkpoint_within_rounding(base: Path) -> None:
    one = train(base / "split", base / "run.toml", 5)
    assert len(one) == 5
    state = json.loads((base / "split" / "run.json").read_text())
    text = (base / "split" / "run.toml").read_text()
    (base / "split" / "run.toml").write_text(text.replace("mesh = [1, 1, 1]", "mesh = [1, 2, 2]"))
    assert state["base"] == str(base)
    trainer = Trainer(base / "split", rundir.run_file_of(base / "split"))
    assert trainer.devices.mesh.size == 4
    trainer.run()
    lines, whole = read_metrics(base / "split"), read_metrics(base / "whole")
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in whole], rel=1e-5)
    assert lines[-1]["held_out"] == pytest.approx(whole[-1]["held_out"], rel=1e-4)
    ours, theirs = tensors(base / "split"), tensors(base / "whole")
    for name, tensor in theirs.items():
        np.testing.assert_allclose(
            np.asarray(ours[name], np.float32), np.asarray(tensor, np.float32), atol=2e-3, err_msg=name
        )


@pytest.mark.slow
def test_two_processes_train_together_and_go_on_alone(base: Path, tmp_path: Path) -> None:
    """Over gloo: each reads its rows, both take part in saving and gathering, one writes and speaks."""
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(base / name)
    file = write_run(tmp_path, mesh="[1, 2, 1]", model='train_tokenizer = 400\nremat = "auto"')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    variables = {"GEMCUT_COORDINATOR": address, "GEMCUT_PROCESSES": "2"}
    both = [
        command("run", file, tmp_path / "out", "--until", "6", **variables, GEMCUT_PROCESS=str(i)) for i in range(2)
    ]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "step      6" in said[0][0]
    assert "step" not in said[1][0]
    trainer = Trainer(tmp_path / "out", rundir.run_file_of(tmp_path / "out"))
    trainer.run()
    lines, whole = read_metrics(tmp_path / "out"), read_metrics(base / "whole")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in whole], rel=1e-5)


def test_remat_that_is_chosen_by_the_memory(base: Path) -> None:
    needs = {"none": 900, "dots": 700, "names": 500, "full": 300}
    chosen = [choose_remat("auto", needs.__getitem__, limit) for limit in (1000, 899, 500, 300)]
    assert chosen == ["none", "dots", "names", "full"]
    assert choose_remat("names", needs.__getitem__, 1) == "names"
    with pytest.raises(
        ParameterError, match=r"needs .* GiB a device even with remat full, and .* are there; lower batch"
    ):
        choose_remat("auto", needs.__getitem__, 299)
    with pytest.raises(ParameterError, match="does not say its memory"):
        choose_remat("auto", needs.__getitem__, None)
    file = base / "auto.toml"
    file.write_text((base / "run.toml").read_text().replace("[model]\n", '[model]\nremat = "auto"\n', 1))
    trainer = Trainer(base / "whole", read_run_file(file))
    assert trainer.remat == "none"
    assert trainer._compiled_bytes("full") > 4 * 3 * trainer.parameters()  # weights and two moments at least


def test_the_model_says_in_transformers_what_it_says_here(base: Path) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    folder = base / "whole" / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the model reads red and blue words")["input_ids"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = HuggingFaceFolder(folder)
    network, tree = Network(source.config, jnp.float32), from_hf(source.config, source.read)
    row = np.asarray([ids], np.int32)
    places = np.arange(len(ids))[None]
    ours = network.logits(tree, network.hidden(tree, row, np.ones_like(row), places))
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits.numpy()
    assert np.abs(np.asarray(ours) - want).max() < 1e-4


def test_a_model_goes_on_from_its_folder(base: Path, tmp_path: Path) -> None:
    """Continued training begins with the exported weights: its first loss is near the last one, not near chance."""
    write_texts(tmp_path)
    shutil.copytree(base / "whole" / "model", tmp_path / "model")
    text = write_run(tmp_path, steps=1, model='folder = "model"').read_text()
    begin, end = text.index("[model.config]"), text.index("[optimizer]")
    (tmp_path / "run.toml").write_text(text[:begin] + text[end:])
    lines = train(tmp_path / "more", tmp_path / "run.toml")
    last = read_metrics(base / "whole")[-1]["loss"]
    assert lines[0]["loss"] == pytest.approx(last, abs=0.6)


@pytest.mark.slow
def test_killed_at_any_moment_loses_at_most_the_last_interval(base: Path, tmp_path: Path) -> None:
    write_texts(tmp_path)
    file = write_run(tmp_path, steps=60, save_every=4)
    child = command("run", file, tmp_path / "out")
    for _ in range(2):
        deadline = time.monotonic() + 240
        seen = len(read_metrics(tmp_path / "out"))
        while len(read_metrics(tmp_path / "out")) < seen + 7 and time.monotonic() < deadline:
            time.sleep(0.01)
            assert child.poll() is None, child.stderr.read() if child.stderr else ""
        child.send_signal(signal.SIGKILL)
        child.wait()
        reached = read_metrics(tmp_path / "out")[-1]["step"]
        child = command("resume", tmp_path / "out")
        # The first new line comes after the checkpoint: at most four steps and the one that was being saved are gone.
        while read_metrics(tmp_path / "out")[-1]["step"] == reached and time.monotonic() < deadline:
            time.sleep(0.01)
        steps = [line["step"] for line in read_metrics(tmp_path / "out")]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= reached - 8
    out, err = child.communicate(timeout=240)
    assert child.returncode == 0, err
    assert "model: " in out
    whole = train(tmp_path / "whole", file)
    assert [line["loss"] for line in read_metrics(tmp_path / "out")] == [line["loss"] for line in whole]


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(base: Path) -> None:
    read = read_run_file(base / "run.toml")
    with rundir.begin(base / "stopped", read):
        trainer = Trainer(base / "stopped", read)
        heard: list[int] = []
        trainer.stopping = lambda: len(heard) == 2
        assert trainer.run(lambda line: heard.append(line["step"])) is None
        assert heard == [1, 2]
        assert not (base / "stopped" / "model").exists()
        Trainer(base / "stopped", read).run()
    assert tensors(base / "stopped").keys() == tensors(base / "whole").keys()
    assert read_metrics(base / "stopped")[-1]["loss"] == read_metrics(base / "whole")[-1]["loss"]


def test_a_disk_that_is_full_is_said_and_the_old_checkpoint_stays(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(base / "full", base / "run.toml", 5)
    trainer = Trainer(base / "full", rundir.run_file_of(base / "full"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        with pytest.raises(DataError, match=r"takes 0\.\d GB, 0\.0 are free; .* free some space, and resume"):
            trainer.run()
    # What fills up in the middle of a write: no file of more than 20,000 bytes can be written.
    _, err = (child := command("resume", base / "full", file_bytes=20_000)).communicate(timeout=240)
    assert child.returncode == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(r"cannot be written \(.*\); the one before it is whole: free some space, and resume", line)
    Trainer(base / "full", rundir.run_file_of(base / "full")).run()
    assert read_metrics(base / "full")[-1]["loss"] == read_metrics(base / "whole")[-1]["loss"]


def test_two_runs_in_one_folder_and_a_folder_that_is_none(base: Path) -> None:
    read = read_run_file(base / "run.toml")
    with (
        pytest.raises(DataError, match="holds something already; `gemcut train resume"),
        rundir.begin(base / "whole", read),
    ):
        pass
    with pytest.raises(DataError, match="is no run"):
        rundir.run_file_of(base / "a")
    (base / "shut").mkdir()
    (base / "shut" / ".lock").mkdir()  # stands for a folder that cannot be written into, which root can always
    with (
        pytest.raises(DataError, match=r"cannot write into .*shut: .*; choose another folder"),
        rundir.locked(base / "shut"),
    ):
        pass
    child = command("resume", base / "whole")
    with rundir.locked(base / "whole"):
        _, err = child.communicate(timeout=120)
    assert "another process trains in" in err
    assert err.count("\n") == 1


def test_a_checkpoint_of_another_network_is_refused(base: Path) -> None:
    train(base / "shape", base / "run.toml", 1)
    path = base / "shape" / "run.toml"
    path.write_text(path.read_text().replace("intermediate_size = 64", "intermediate_size = 128"))
    with pytest.raises(DataError, match="the checkpoint is of another network"):
        Trainer(base / "shape", rundir.run_file_of(base / "shape")).run()


def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(base: Path) -> None:
    read = read_run_file(base / "run.toml")
    with rundir.begin(base / "nan", read):
        trainer = Trainer(base / "nan", read)
        fresh = trainer.placed.fresh

        def broken(seed: int) -> Any:
            state = fresh(seed)
            table = state["weights"]["embed_tokens"]
            return {**state, "weights": {**state["weights"], "embed_tokens": table.at[:].set(jnp.nan)}}

        trainer.placed.fresh = broken  # type: ignore[method-assign]
        with pytest.raises(
            DataError, match=r"step 1: the loss is nan.*nothing was updated; look at documents [ab]:\d+"
        ):
            trainer.run()
    assert read_metrics(base / "nan") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps = 10", "stepps = 10"), r"\[run\]: unknown key 'stepps'; did you mean steps\?"),
        (("steps = 10", 'steps = "10"'), "steps is '10'; expected a whole number"),
        (("steps = 10", "steps = 0"), "steps is 0; expected at least 1"),
        (("[run]", "[ran]"), r"unknown key 'ran'; did you mean run\?"),
        (("length = 16", "length = 64"), "length is 64; the model's context has 32 tokens"),
        (("mesh = [1, 1, 1]", "mesh = [1, 3, 1]"), "hidden_size 32 cannot be split 3 ways|a batch of 4 sequences"),
        (("mesh = [1, 1, 1]", "mesh = [1, 1]"), r"mesh is \[1, 1\]; expected three numbers"),
        (("mesh = [1, 1, 1]", "mesh = [8, 1, 1]"), "a batch of 4 sequences cannot be shared by 8"),
        (("weight = 2", "weight = nan"), "weight and held_out must be 0 or more"),
        (('path = "a"', 'path = "none"'), "source a: there is no .*none"),
        (("hidden_size = 32", "hiden_size = 32"), r"unknown key 'hiden_size'; did you mean hidden_size\?"),
        (("train_tokenizer = 400", "train_tokenizer = 100"), "the size is 100; expected 365"),
        (("train_tokenizer = 400", ""), "needs either tokenizer, a tokenizer.json, or train_tokenizer"),
        (("train_tokenizer = 400", 'tokenizer = "none.json"'), "cannot read the tokenizer .*none.json"),
        (("held_out = 2", "held_out = 2000"), "source b has .* windows of 16 tokens and 2000 are held out"),
        (('name = "b"', 'name = "a"'), "two sources have one name"),
        (("rate = 1e-2", "rate = -1"), "rate is -1.0; expected 0 to 10"),
        (("rate = 1e-2", "rate = "), "is no TOML"),
        (('[[source]]\nname = "a"', '[teacher]\nfolder = "none"\n\n[[source]]\nname = "a"'), "none"),
        (('compute_dtype = "float32"', 'compute_dtype = "float8"'), "compute_dtype is 'float8'"),
        (('compute_dtype = "float32"', 'compute_dtype = "float32"\nattention = "flash"'), "attention is 'flash'"),
    ],
    ids=lambda value: value[1][:40] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_said_in_one_line(base: Path, tmp_path: Path, change: tuple[str, str], message: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(base / name)
    file = write_run(tmp_path)
    text = file.read_text()
    assert change[0] in text
    file.write_text(text.replace(*change))
    with pytest.raises(GemcutError, match=message) as caught:
        train(tmp_path / "out", file)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, RecipeError | ParameterError | DataError | CheckpointError) or "config" in str(
        caught.value
    )
