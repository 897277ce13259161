"""What the documents tell people to type, on the real Gemma 3 270M, as a GGUF file and as a folder: commands, each in
every format where it names one, and Python. Calibration has test_real_calibration.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

import gemcut.hf.generation
from gemcut.gemma import Gemma
from gemcut.quantization.spec import FORMATS

from . import real_forms as real
from .conftest import Cli, Run
from .documented import FILES, MODELS, Command, commands, shell_lines, snippets, split

pytestmark = pytest.mark.slow

RUN = [command for command in commands() if command.reason is None]
NEW_TOKENS = 3
CHAT = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."}]


@pytest.fixture(scope="module", params=["gguf", "folder"])
def source(request: pytest.FixtureRequest, real_forms: dict[str, Path]) -> Path:
    """The 270M in one form, then the other."""
    real.forget()
    return real_forms[request.param]


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    """What each command wrote from the form that came first."""
    return {}


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to work in, with the files that commands read."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    for name in ("HOME", "XDG_CONFIG_HOME"):  # a command may write settings
        monkeypatch.setenv(name, str(tmp_path / "home"))
    real.share_loads(monkeypatch)
    monkeypatch.setattr(gemcut.hf.generation, "DEFAULT_NEW_TOKENS", NEW_TOKENS)


def _type(cli: Cli, command: Command, source: Path) -> Run:
    """Run a documented command, with few new tokens."""
    arguments, stdin = split(command.line, source)
    if "--schema" in arguments:
        Path(arguments[arguments.index("--schema") + 1]).write_text('{"type": "object", "maxProperties": 1}')
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


@pytest.mark.parametrize("command", [c for c in RUN if " quantize " not in c.line], ids=lambda c: c.line)
def test_a_documented_command(cli: Cli, source: Path, said: dict[str, Any], command: Command) -> None:
    run = _type(cli, command, source)
    assert run.code == 0, run.err
    assert run.out.strip() or " generate " in command.line or " config " in command.line  # white space is an answer
    deterministic = re.search(r"(--temperature|-t) 0", command.line) is not None
    if deterministic:
        assert said.setdefault(command.line, run.out) == run.out  # the same weights in another file


TEXT = "The capital of France is Paris, and the capital of Italy is Rome. Water boils at 100 degrees Celsius."
PLAN = ("--memory", "8GB", "--json")
GREEDY = ("generate", "-t", "0", "-n", "8", "The capital of France is", "-m")


@pytest.mark.parametrize("form", [None, *FORMATS])
def test_each_format_while_loading(cli: Cli, source: Path, said: dict[str, Any], form: str | None) -> None:
    """Text and scores are the same from a file and from a folder of the same weights."""
    chosen = () if form is None else ("--quantization", form)
    run = cli(*GREEDY, source, *chosen)
    assert run.code == 0, run.err
    assert run.out.strip()
    assert said.setdefault(f"generate {form}", run.out) == run.out
    gemma = Gemma.load(source, quantization=form)
    (scores,) = gemma.score([TEXT])
    assert len(scores) == len(gemma.encode(TEXT)) - 1
    assert said.setdefault(f"score {form}", scores) == pytest.approx(scores, abs=1e-3)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("command", [c for c in RUN if " quantize " in c.line and "--cal" not in c.line], ids=str)
def test_each_format_on_disk(cli: Cli, source: Path, command: Command, form: str) -> None:
    """A written folder says what weights that are quantized while loading say, and is as large as planned."""
    run = _type(cli, Command(command.document, re.sub(r"--to \w+", f"--to {form}", command.line)), source)
    assert run.code == 0, run.err
    out = Path(split(command.line, source)[0][2])
    assert json.loads(cli("info", out, "--json").out)["quantization"]["format"] == form
    written, loaded = cli(*GREEDY, out), cli(*GREEDY, source, "--quantization", form)
    assert written.code == 0, written.err
    assert written.out == loaded.out
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    for planned in (cli("plan", out, *PLAN), cli("plan", source, *PLAN, "--quantization", form)):
        (plan,) = json.loads(planned.out)["plans"]
        assert plan["weights_bytes"] == pytest.approx(size, rel=0.02)
    shutil.rmtree(out)  # 400 MB


@pytest.mark.parametrize(("document", "codes"), snippets(), ids=lambda x: x if isinstance(x, str) else "")
def test_documented_python(source: Path, said: dict[str, Any], document: str, codes: list[str]) -> None:
    """A document's snippets one after another, in one session."""
    names: dict[str, Any] = {}
    for code in codes:
        code = re.sub(r"max_new_tokens=\d+", f"max_new_tokens={NEW_TOKENS}", code)
        code = re.sub(r"(generate\([^)\n]*, n=\d)", rf"\1, max_new_tokens={NEW_TOKENS}", code)
        code = re.sub(rf'"{MODELS.pattern}"', repr(str(source)), code)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message='.*"cuda"')  # no GPU here, and the documents say so
            exec(compile(code, document, "exec"), names)
    assert names
    if document == "README.md":
        assert said.setdefault("texts", names["texts"]) == names["texts"]  # temperature 0
        assert [len(names[each]) for each in ("texts", "drafts", "scores")] == [2, 3, 1]
        new = names["outputs"].shape[1] - names["input_ids"]["input_ids"].shape[1]
        assert 0 < new <= NEW_TOKENS
