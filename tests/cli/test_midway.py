"""A request that fails after some tokens: the text so far, then one line of error, and an exit code that is not 0."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from gemcut import Gemma
from gemcut.cli.chat_session import ChatSession
from gemcut.cli.options import LoadOptions
from gemcut.text import Detokenizer

from .conftest import Cli, environment

TOKENS = 5
PATCH = f"""
from gemcut.text import Detokenizer
real, seen = Detokenizer.push, []
def push(self, token_id):
    seen.append(token_id)
    if len(seen) > {TOKENS}:
        raise OSError("the text\\nis lost")
    return real(self, token_id)
Detokenizer.push = push
"""
MESSAGES = [{"role": "user", "content": "Hello"}]
SAMPLING = {"seed": 7, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def gemma(tiny: Path) -> Gemma:
    return Gemma.load(tiny, progress=False)


def so_far(gemma: Gemma, ids: list[int]) -> str:
    """The text of the tokens before the one that fails, from the tokenizer alone."""
    answer = gemma.complete(ids, gemma.resolve_sampling(len(ids), SAMPLING).params)[0]
    assert len(answer.token_ids) == 12
    return gemma.tokenizer.decode(answer.token_ids[:TOKENS])


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real, seen = Detokenizer.push, []

    def push(self: Detokenizer, token_id: int) -> str:
        seen.append(token_id)
        if len(seen) > TOKENS:
            raise OSError("the text\nis lost")
        return real(self, token_id)

    monkeypatch.setattr(Detokenizer, "push", push)
    yield
    assert len(seen) == TOKENS + 1


@pytest.mark.slow
def test_generate_in_a_process_of_its_own(tiny: Path, gemma: Gemma) -> None:
    arguments = ["generate", "-m", str(tiny), "--seed", "7", "-n", "12", "Hello"]
    program = f"{PATCH}\nimport sys\nfrom gemcut.cli.main import main\nsys.exit(main({arguments!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        env=environment(),
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout.decode() == so_far(gemma, gemma.encode("Hello")) + "\n"
    assert done.stderr.decode() == "error: the text is lost\n"


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (("generate", "Hello"), True),
        (("generate", "--show-prompt", "Hello"), True),
        (("generate", "--json", "Hello"), False),
        (("chat", "--once", "Hello"), True),
        (("chat", "--json", "--once", "Hello"), False),
    ],
    ids=str,
)
def test_one_answer(
    command: tuple[str, ...],
    shown: bool,
    cli: Cli,
    gemma: Gemma,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gemma, "sampling_levels", list(gemma.sampling_levels))
    monkeypatch.setattr(LoadOptions, "load", lambda self, name, **_: gemma)
    ids = gemma.encode("Hello") if command[0] == "generate" else gemma.encode_messages(MESSAGES)
    text = so_far(gemma, ids)
    request.getfixturevalue("failing")
    run = cli(command[0], "-m", "any", "--seed", "7", "-n", "12", *command[1:])
    assert run.code == 2
    assert run.err.splitlines()[-1] == "error: the text is lost"
    assert "Traceback" not in run.err
    prompt = "Hello" if "--show-prompt" in command else ""
    assert run.out == (f"{prompt}{text}\n" if shown else "")


@pytest.mark.parametrize("markdown", [False, True])
def test_in_a_conversation(
    markdown: bool, gemma: Gemma, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    text = so_far(gemma, gemma.encode_messages(MESSAGES))
    request.getfixturevalue("failing")
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        session = ChatSession(gemma, dict(SAMPLING), markdown=markdown)
        keyboard.send_text("Hello\r\x03\x04")  # Ctrl-C: the message is in the line again
        session.run()
    shown = capsys.readouterr().out
    assert "".join(text.split()) in "".join(shown.split()) or markdown
    assert "the text is lost" in shown
    assert session.conversation.turns == []
    assert not gemma.engine.has_work
