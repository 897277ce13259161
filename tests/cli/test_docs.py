"""Every command in docs/command-line.md is run, with a tiny checkpoint in the place of the models it names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import support
from gemcut import Gemma, settings
from gemcut.cli.conversation import Conversation
from gemcut.cli.options import LoadOptions

from .conftest import Cli

PAGE = (support.ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
LINES = [line for language, block in BLOCKS for line in block.splitlines() if not language]
MODELS = ("gemma-3-270m", "2b", "2b-it")


@pytest.fixture(scope="module")
def gemma(tiny: Path) -> Gemma:
    return Gemma.load(tiny, progress=False)


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_page(
    cli: Cli, tiny: Path, gemma: Gemma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    levels = list(gemma.sampling_levels)
    # One checkpoint for all; what each command would load is in test_generate, test_chat and tests/checkpoint.
    monkeypatch.setattr(LoadOptions, "load", lambda self, name, **_: gemma)
    (tmp_path / "notes.txt").write_text("Some notes\n")
    (tmp_path / "question.txt").write_text("What is this?\n")
    saved = Conversation()
    saved.add("Hello", "Hi")
    saved.save(tmp_path / "chat.json", "")
    stdin = b"Hello\n"  # a conversation at a terminal is one message here
    if " | " in line:
        source, line = line.split(" | ")
        stdin = (tmp_path / source.removeprefix("cat ")).read_bytes()
    if " < " in line:
        line, source = line.split(" < ")
        stdin = (tmp_path / source).read_bytes()
    command, *args = shlex.split(line)
    assert command == "gemcut"
    model = tiny
    if args[0] == "quantize":  # rows that blocks of 64 divide
        config = support.tiny_config(hidden_size=64, intermediate_size=128, query_pre_attn_scalar=16)
        model = support.save_checkpoint(tmp_path / "checkpoint", support.hf_model(config))
    if args[0] not in ("plan", "config"):
        args = [str(model) if arg in MODELS else arg for arg in args]
    if args[0] in ("generate", "chat") and "-n" not in args:
        args += ["-n", "2"]
    if args[:2] == ["config", "unset"]:
        assert cli("config", "set", args[2], "0.3").code == 0
    try:
        run = cli(*args, stdin=stdin)
    finally:
        gemma.sampling_levels[:] = levels
    assert run.code == 0, run.err
    assert run.out or args[0] == "config"
    if "--json" in args:
        json.loads(run.out)


def test_the_page_says_what_there_is(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.KEYS:
        assert f"`{name}`" in PAGE
    (toml,) = [block for language, block in BLOCKS if language == "toml"]
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "gemcut").mkdir()
    (tmp_path / "gemcut" / "config.toml").write_text(toml)
    assert cli("config").code == 0
    commands = set(re.findall(r"^│ (\w+) ", cli("--help").out, flags=re.MULTILINE))
    assert commands == set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE))
