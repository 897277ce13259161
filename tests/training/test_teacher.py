"""Distillation by run files: a teacher in the same step, and answers that were stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemcut.errors import DataError, GemcutError, ParameterError
from gemcut.training.answers import answer_source
from gemcut.training.runfile import read_run_file
from gemcut.training.teacher import StoredTeacher

from .runs import write_run, write_texts
from .test_trainer import train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources, a teacher that has learned from them for ten steps, and its tokenizer beside the run files."""
    folder = tmp_path_factory.mktemp("teacher")
    train(folder / "run", write_run(folder, "teach.toml"))
    shutil.copytree(folder / "run" / "model", folder / "big")
    shutil.copyfile(folder / "big" / "tokenizer.json", folder / "tokenizer.json")
    return folder


def student(folder: Path, name: str, teacher: str, **options: Any) -> Path:
    """A run file of a student of half the width, with a [teacher] table."""
    path = write_run(folder, name, model='tokenizer = "tokenizer.json"', steps=4, **options)
    text = path.read_text().replace("intermediate_size = 64", "intermediate_size = 32")
    path.write_text(text.replace("[[source]]", f"[teacher]\n{teacher}\n\n[[source]]", 1))
    return path


def stored(path: Path, folders: dict[str, str]) -> Path:
    """Give each source of a run file its folder of answers."""
    text = path.read_text()
    for name, folder in folders.items():
        text = text.replace(f'path = "{name}"', f'path = "{name}"\nteacher = "{folder}"')
    path.write_text(text)
    return path


def answered(base: Path, top: int) -> dict[str, str]:
    file = read_run_file(student(base, f"ask{top}.toml", "folder = 'big'"))
    names = {}
    for name in ("a", "b"):
        names[name] = f"answers-{name}-{top}"
        count = answer_source(file, name, base / names[name], base / "big", top=top, batch=3)
        assert count > 2
    return names


def test_stored_answers_are_the_teacher_s_likeliest_words(base: Path) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    names = answered(base, 7)
    ids = np.load(base / names["a"] / "ids.npy")
    chances = np.load(base / names["a"] / "probabilities.npy")
    from gemcut.training.mixture import Mixture

    mixture = Mixture(read_run_file(base / "ask7.toml"), base / "none")
    windows = mixture.windows(base / "a", 400)
    assert ids.shape == chances.shape == (len(windows), 16, 7)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base / "big", dtype=torch.float32)
    for number in (0, len(windows) - 1):
        row = windows[number]
        for segment in np.unique(row["segments"]):  # a document sees nothing of the one before it
            inside = row["segments"] == segment
            with torch.no_grad():
                logits = theirs(torch.tensor(row["tokens"][inside][None].astype(np.int64))).logits[0]
            want = logits.softmax(-1).topk(7)
            np.testing.assert_allclose(chances[number][inside], want.values.numpy(), atol=2e-3)
            there = np.take_along_axis(logits.softmax(-1).numpy(), ids[number][inside], -1)
            np.testing.assert_allclose(there, want.values.numpy(), atol=1e-4)


def test_a_teacher_in_the_step_and_its_stored_answers_teach_the_same(base: Path) -> None:
    """With every word stored, the loss is divergence plus the teacher's own entropy: the same gradient."""
    names = answered(base, 400)
    together = train(base / "together", student(base, "together.toml", 'folder = "big"'))
    apart = train(base / "apart", stored(student(base, "apart.toml", "share = 1"), names))
    for one, other in zip(together, apart, strict=True):
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=2e-2)
        assert other["nll"] == pytest.approx(one["nll"], rel=1e-3)
        assert other["loss"] > one["loss"] > 0
        assert one["loss"] == pytest.approx(one["divergence"], rel=1e-6)
    assert together[-1]["divergence"] < together[0]["divergence"]


def test_a_share_of_nothing_is_training_on_the_text_alone(base: Path) -> None:
    names = answered(base, 3)
    shared = train(base / "none", stored(student(base, "none.toml", "share = 0"), names))
    path = student(base, "plain.toml", "")
    path.write_text(path.read_text().replace("[teacher]\n\n", ""))
    plain = train(base / "plain", path)
    assert [line["loss"] for line in shared] == pytest.approx([line["loss"] for line in plain], rel=1e-5)


def test_answers_of_other_windows_are_refused(base: Path, tmp_path: Path) -> None:
    names = answered(base, 5)
    folders = {name: str(base / folder) for name, folder in names.items()}
    write_texts(tmp_path)
    shutil.copyfile(base / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "a" / "000.txt").write_text("another text altogether, which nobody answered")
    with pytest.raises(DataError, match="belongs to other text or another length"):
        train(tmp_path / "out", stored(student(tmp_path, "run.toml", "share = 1"), folders))
    with pytest.raises(DataError, match="already exists"):
        answer_source(read_run_file(base / "ask5.toml"), "a", base / names["a"], base / "big", top=5, batch=1)
    broken = tmp_path / "broken"
    shutil.copytree(base / names["a"], broken)
    index = json.loads((broken / "teacher.json").read_text())
    (broken / "teacher.json").write_text(json.dumps({**index, "top": 6}))
    with pytest.raises(DataError, match="is damaged: its arrays have not the shape"):
        StoredTeacher(broken, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("teacher", "sources", "message"),
    [
        ("share = 1", {}, "needs a folder, or every source its teacher; source a has none"),
        ('folder = "big"', {"a": "answers"}, "has a folder and source a stored answers; choose one"),
        ("share = 2", {"a": "x", "b": "x"}, "expected a share of 0 to 1"),
        ("temperature = 2", {"a": "x", "b": "x"}, "stored answers have temperature 1"),
        ('folder = "nowhere"', {}, "nowhere"),
        ("folders = 1", {}, r"\[teacher\]: unknown key 'folders'; did you mean folder"),
        ("share = 1", {"a": "a", "b": "b"}, "holds no teacher's answers"),
    ],
)
def test_what_cannot_be(base: Path, tmp_path: Path, teacher: str, sources: dict[str, str], message: str) -> None:
    for name in ("a", "b", "big", "tokenizer.json"):
        (tmp_path / name).symlink_to(base / name)
    path = stored(student(tmp_path, "run.toml", teacher), sources)
    with pytest.raises(GemcutError, match=message) as caught:
        train(tmp_path / "out", path)
    assert "\n" not in str(caught.value)


def test_a_teacher_with_another_vocabulary_is_refused(base: Path, tmp_path: Path) -> None:
    write_texts(tmp_path)
    shutil.copytree(base / "big", tmp_path / "big")
    path = student(tmp_path, "run.toml", 'folder = "big"')
    path.write_text(path.read_text().replace('tokenizer = "tokenizer.json"', "train_tokenizer = 390"))
    with pytest.raises(ParameterError, match="teacher has a vocabulary of 400, the student one of 390"):
        train(tmp_path / "out", path)
    with pytest.raises(ParameterError, match="learns a tokenizer of its own"):
        answer_source(read_run_file(path), "a", tmp_path / "answers", base / "big", top=5, batch=1)
    with pytest.raises(ParameterError, match="no source 'c'; expected one of a, b"):
        answer_source(read_run_file(path), "c", tmp_path / "answers", base / "big", top=5, batch=1)
