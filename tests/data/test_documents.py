"""What docs/data.md shows: its recipe and its steps are run as they stand there; its lists name what there is."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import support
from gemcut.data.catalogue import READERS, STEPS, load

from .corpus import flow, run, sentences, write_recipe

PAGE = (support.ROOT / "docs" / "data.md").read_text("utf-8")


def fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_recipe_and_the_steps(tmp_path: Path) -> None:
    (tmp_path / "my_steps.py").write_text(fences("python")[-1])
    (tmp_path / "letters").mkdir()
    texts = [sentences(1), "A line."]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "letters" / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    other = '[[step]]\nfunction = "my_steps.py:lower_case"\n'
    report = run(write_recipe(tmp_path, fences("toml")[0] + other), tmp_path / "out")
    assert flow(report, "long_enough", "letters")["dropped"] == {"fewer than 50 words": {"documents": 1, "bytes": 7}}
    assert report["totals"]["documents_out"] == 1


def test_the_reader_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(next(text for text in fences("python") if "def pages" in text))
    (tmp_path / "book.txt").write_text("one\fthe second page")
    source = '[[source]]\nname = "book"\nreader = "mine.py:pages"\npaths = ["book.txt"]\n'
    report = run(write_recipe(tmp_path, source), tmp_path / "out")
    assert (report["totals"]["documents_out"], report["totals"]["bytes_out"]) == (2, len("one" + "the second page"))


def test_every_reader_and_step_is_listed() -> None:
    named = set(re.findall(r"^- `([\w-]+)`:", PAGE, re.MULTILINE))
    assert named >= {*READERS, *STEPS}
    for place in (*READERS.values(), *STEPS.values()):
        assert load(place).__doc__


def test_lower_rooms_know_nothing_of_data() -> None:
    """safety/ serves data, evaluation and the server; text/ all of them."""
    code = "import sys, importlib, pathlib\n"
    code += "for room in ('safety', 'text'):\n"
    code += f"    for path in pathlib.Path({str(support.ROOT)!r}, 'src/gemcut', room).glob('*.py'):\n"
    code += "        importlib.import_module(f'gemcut.{room}.{path.stem}')\n"
    code += "bad = [m for m in sys.modules if m == 'torch' or m.startswith('gemcut.data')]\nassert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(support.ROOT / "src")})
    for path in [*(support.ROOT / "src/gemcut/safety").glob("*.py"), *(support.ROOT / "src/gemcut/text").glob("*.py")]:
        assert "gemcut.data" not in path.read_text("utf-8"), path


def test_nothing_of_torch_and_the_engine_is_imported() -> None:
    code = "import sys\nfrom gemcut.data.catalogue import *\n"
    code += "from gemcut.data import run, report, inspect, plan, progress\n"
    code += "[load(place) for place in (*READERS.values(), *STEPS.values())]\n"
    code += "bad = [m for m in sys.modules if m == 'torch' or m.startswith(('gemcut.engine', 'gemcut.model.'))]\n"
    code += "assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(support.ROOT / "src")})
