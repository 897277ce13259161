"""Recipes are read strictly: each mistake is one line that names the file and the key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gemcut.data.recipe import read_recipe
from gemcut.errors import GemcutError, RecipeError

from ..cli.conftest import Cli, cli  # noqa: F401
from .corpus import sentences, write_jsonl, write_recipe

SOURCE = '[[source]]\nname = "a"\nreader = "jsonl"\npaths = ["a.jsonl"]\n'
MISTAKES = {
    "": "names no source; expected at least one [[source]]",
    "x = 1\n" + SOURCE: "unknown key 'x'; expected one of name, seed",
    "sed = 1\n" + SOURCE: "unknown key 'sed'; did you mean seed?",
    "name = 1\n" + SOURCE: "name is 1; expected a text",
    'name = "a/b"\n' + SOURCE: "name is 'a/b'; expected letters",
    "seed = true\n" + SOURCE: "seed is True; expected a whole number",
    "part_mb = 0\n" + SOURCE: "part_mb is 0; expected more than 0",
    "part_mb = nan\n" + SOURCE: "part_mb is nan; expected a number",
    "source = 5": "source is 5; write [[source]] above its keys",
    SOURCE + SOURCE: "has two sources of the name a; give each its own",
    SOURCE.replace('name = "a"', ""): "[[source]] 1: needs the key name",
    SOURCE.replace('"a.jsonl"', ""): "source a: paths is empty",
    SOURCE.replace('["a.jsonl"]', '"a.jsonl"'): "source a: paths is 'a.jsonl'; expected a list",
    SOURCE.replace('"jsonl"', '"jsnl"', 1): "source a: unknown reader 'jsnl'; did you mean jsonl?",
    SOURCE + "colour = 1": "source a: unknown key 'colour'; expected one of",
    SOURCE + "text_key = 1": "source a: text_key is 1; expected a text",
    SOURCE + "[[step]]": "[[step]] 1: expected exactly one of use",
    SOURCE + '[[step]]\nuse = "a"\nfilter = "b"': "[[step]] 1: expected exactly one of use",
    SOURCE + '[[step]]\nuse = "nothing"': "[[step]] 1: unknown step 'nothing'",
    SOURCE + '[[step]]\nfilter = "s.py:one"\nsources = ["b"]': "step s.py:one: sources names 'b'; expected one of a",
    SOURCE + '[[step]]\nfilter = "s.py:one"\nmin = 3': "step s.py:one: unknown key 'min'",
    SOURCE + '[[step]]\nfilter = "s.py"': "filter is 's.py'; expected \"file.py:name\"",
    SOURCE + '[[step]]\nfilter = "none.py:one"': "none.py: No such file",
    SOURCE + '[[step]]\nfilter = "s.py:two"': "s.py has no function two",
    SOURCE + '[[step]]\nfunction = "s.py:one"': "one of {}/s.py cannot be called with (documents, rank, world_size)",
    SOURCE + '[[step]]\nfilter = "bad.py:one"': "bad.py raised ZeroDivisionError when it was imported",
    "name = ": "recipe.toml, line 1: Invalid value",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "s.py").write_text("def one(document):\n    return True\n")
    (tmp_path / "bad.py").write_text("1 / 0\n")
    write_jsonl(tmp_path / "a.jsonl", [{"text": sentences(1)}])
    return tmp_path


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes(folder: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(MISTAKES[text].replace("{}", str(folder)))) as error:
        read_recipe(write_recipe(folder, text))
    assert "\n" not in str(error.value)
    assert "recipe.toml" in str(error.value)


def test_a_whole_recipe(folder: Path) -> None:
    recipe = read_recipe(write_recipe(folder, f'name = "n"\nseed = 3\n{SOURCE}[[step]]\nfilter = "s.py:one"\n' * 1))
    assert (recipe.name, recipe.seed, [s.name for s in recipe.steps]) == ("n", 3, ["one"])
    assert recipe.source("a").paths == (str(folder / "a.jsonl"),)


def test_the_same_step_twice_has_two_names(folder: Path) -> None:
    step = '[[step]]\nfilter = "s.py:one"\n'
    assert [s.name for s in read_recipe(write_recipe(folder, SOURCE + step + step)).steps] == ["one", "one-2"]


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe at"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_recipe(tmp_path / "bytes.toml")
    with pytest.raises(GemcutError, match="is not a file"):
        read_recipe(tmp_path)


def test_commands(folder: Path, cli: Cli) -> None:  # noqa: F811
    recipe = write_recipe(folder, SOURCE + '[[step]]\nfilter = "s.py:one"\n')
    planned = cli("data", "plan", recipe)
    assert planned.code == 0
    assert re.search(r"^a +1 files .* 1 parts +jsonl, licence not stated$", planned.out, re.M)
    assert "stage 1: read, one" in planned.out
    assert cli("data", "report", folder / "out").error.startswith("error: there is no report at")
    ran = cli("data", "run", recipe, folder / "out", "-w", "1")
    assert ran.code == 0, ran.err
    assert "1 of 1 documents kept" in ran.out
    assert cli("data", "report", folder / "out").out.strip() in ran.out
    assert "report.html" in ran.out
    assert (folder / "out" / "report.html").read_text().startswith("<!doctype html>")
    looked = cli("data", "inspect", folder / "out", "-n", "1", "--characters", "10")
    assert f"--- kept (a/a.jsonl#1)\n{sentences(1)[:10]}…" in looked.out
    for arguments, line in {
        ("run", recipe, folder / "out", "-w", "0"): "error: --workers is 0; expected 1 to 1024",
        ("run", recipe, recipe): f"error: {recipe} is a file; expected a folder, or a name that is not taken",
        ("run", recipe, recipe / "x"): f"error: cannot make the folder {recipe / 'x'}: a part of its path is a file",
        ("inspect", folder): "error: there are no rejects (was keep_rejects false in the recipe?) in "
        f"{folder}; expected the folder of a `gemcut data run`",
        ("inspect", folder / "out", "-n", "0"): "error: --limit is 0; expected at least 1",
    }.items():
        found = cli("data", *arguments)
        assert (found.code, found.error) == (2, line)


def test_plan_of_files_that_are_not_there(folder: Path, cli: Cli) -> None:  # noqa: F811
    recipe = write_recipe(folder, SOURCE.replace("a.jsonl", "none/*.jsonl"))
    found = cli("data", "plan", recipe)
    assert found.code == 2
    assert found.error == f"error: source a: nothing to read at {folder}/none/*.jsonl; check the path in the recipe"
