"""The commands of the documents, on the real Gemma 3 270M, as a GGUF file and as a folder. Calibration, which takes
minutes on the real weights, has tests of its own on small ones.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

import gemcut.hf.generation
from gemcut.checkpoint.source import Source
from gemcut.gemma import Gemma
from support import gguf_path

from .conftest import Cli, Run
from .documented import Command, commands, shell_lines, snippets, split

pytestmark = pytest.mark.slow

RUN = [command for command in commands() if command.reason is None]
NEW_TOKENS = 3
CHAT = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."}]
_loaded: OrderedDict[Any, Gemma] = OrderedDict()
_load = Gemma.load
_tokenizers: dict[str, Any] = {}
_tokenizer = Source.tokenizer


def _tokenizer_once(self: Source) -> Any:
    """``Source.tokenizer``, which takes seconds for each command otherwise."""
    if self.name not in _tokenizers:
        _tokenizers[self.name] = _tokenizer(self)
    return _tokenizers[self.name]


def _load_once(name: Any, **options: Any) -> Gemma:
    """``Gemma.load``, which commands that load the same model in the same way need only once."""
    key = str(name), *(str(options.get(k)) for k in ("dtype", "device", "quantization", "attn_implementation"))
    if key not in _loaded:
        while len(_loaded) > 1:  # two at a time fit any machine
            _loaded.popitem(last=False)
        _loaded[key] = _load(name, **options)
    return _loaded[key]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 270M as a folder, written by gemcut from the GGUF file."""
    return _as_folder(gguf_path(), tmp_path_factory.mktemp("documented") / "gemma-3-270m")


@pytest.fixture(scope="module", params=["gguf", "folder"])
def source(request: pytest.FixtureRequest) -> Path:
    """The 270M in one form, then the other."""
    _loaded.clear()
    return gguf_path() if request.param == "gguf" else request.getfixturevalue("folder")


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each command wrote from the form that came first."""
    return {}


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to work in, with the files that commands read."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CONFIG_HOME"):  # a command may write settings
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr(Gemma, "load", staticmethod(_load_once))
    monkeypatch.setattr(Source, "tokenizer", _tokenizer_once)
    monkeypatch.setattr(gemcut.hf.generation, "DEFAULT_NEW_TOKENS", NEW_TOKENS)


def _as_folder(gguf: Path, folder: Path) -> Path:
    from gemcut.hf import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(gguf).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf).save_pretrained(folder)
    return folder


def _type(cli: Cli, command: Command, source: Path) -> Run:
    """Run a documented command, with few new tokens."""
    arguments, stdin = split(command.line, source)
    for word in [*arguments, stdin or ""]:
        if word.endswith((".txt", ".md")) and not Path(word).exists():
            Path(word).write_text("Name three colours.")
        if word.endswith(".json") and not Path(word).exists():
            Path(word).write_text(json.dumps(CHAT))
    if arguments[:2] == ["config", "unset"]:  # the document sets it first
        assert cli("config", "set", arguments[2], "0.5").code == 0
    if arguments[0] in ("generate", "chat"):
        arguments += ["--max-new-tokens", str(NEW_TOKENS)]
    given = Path(stdin).read_bytes() if stdin else b"Hello" if arguments[0] == "chat" else b""
    return cli(*arguments, stdin=given)


def test_every_command_runs_or_says_why_not() -> None:
    lines = [command.line for command in commands()]
    assert any(line.startswith("gemcut generate") for line in lines)
    assert {command.line.split()[1] for command in RUN if command.line.startswith("gemcut ")} >= {
        "chat", "generate", "info", "plan", "quantize"
    }  # fmt: skip
    assert [name for name, _ in snippets()]
    stray = [str(command) for command in RUN if not re.match(r"(cat \S+ \| *)?(\.venv/bin/)?gemcut ", command.line)]
    assert not stray, f"give documented.REASONS a reason for: {stray}"


def test_a_command_added_to_a_document_is_found() -> None:
    text = (
        "Text `gemcut new --option` and `gemcut`.\n```bash\n$ gemcut other 'a # b' \\\n  --more # why\nmake demo\n```\n"
    )
    assert shell_lines(text) == ["gemcut other 'a # b' --more", "make demo", "gemcut new --option"]


@pytest.mark.parametrize("command", [c for c in RUN if "--calibrate" not in c.line], ids=lambda c: c.line)
def test_a_documented_command(cli: Cli, source: Path, said: dict[str, str], command: Command) -> None:
    run = _type(cli, command, source)
    assert run.code == 0, run.err
    assert run.out.strip() or " generate " in command.line or " config " in command.line  # white space is an answer
    deterministic = re.search(r"(--temperature|-t) 0", command.line) is not None
    if deterministic:
        assert said.setdefault(command.line, run.out) == run.out  # the same weights in another file
