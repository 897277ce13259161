"""The command as a whole: quick start, version, and errors of one line with the right exit code."""

from __future__ import annotations

import builtins
import contextlib
import errno
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gemcut
from gemcut.cli import generate as generate_module
from gemcut.cli.failures import BROKEN_PIPE, explain
from gemcut.errors import ParameterError

from .conftest import Cli, environment, process


@pytest.mark.parametrize("args", [["--help"], ["chat", "--help"], ["--version"], []])
def test_nothing_heavy_is_imported_before_a_command_needs_it(args: list[str]) -> None:
    code = (
        "import sys; from gemcut.cli.main import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'numpy', 'tokenizers', 'huggingface_hub', 'prompt_toolkit') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment())
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_plan_of_a_published_model_needs_no_torch() -> None:
    code = "import sys; from gemcut.cli.main import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    args = ["plan", "27b-it", "--memory", "24GB"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment())
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"gemcut {gemcut.__version__}\n"
    assert process("--version").out == f"gemcut {gemcut.__version__}\n"


def test_no_arguments_show_the_help(cli: Cli) -> None:
    run = cli()
    assert run.code == 0
    assert "generate" in run.out
    assert "chat" in run.out


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["frobnicate"], ["no such command", "gemcut --help"]),
        (["generate", "--frobnicate", "hi"], ["--frobnicate", "gemcut generate --help"]),
        (["generate", "-t", "warm", "hi"], ["--temperature", "number"]),
        (["generate", "--model"], ["--model"]),
        (["chat", "a", "b"], ["unexpected"]),
        (["plan", "27b", "--batch", "many"], ["--batch"]),
        (["generate", "hi"], ["no model", "--model", "gemma-3-270m", "pip install -e '.[demo]'", "2b-it"]),
        (["chat"], ["no model", "gemcut chat MODEL"]),
        (["plan"], ["no model", "gemcut plan MODEL"]),
        (["chat", "/nowhere/at-all", "--once", "hi"], ["/nowhere/at-all", "does not exist"]),
        (["generate", "-m", "llama-3-8b", "hi"], ["llama-3-8b", "no checkpoint"]),
    ],
)
def test_mistakes_take_one_line_and_exit_code_2(cli: Cli, args: list[str], parts: list[str]) -> None:
    run = cli(*args)
    assert run.code == 2
    assert run.out == ""
    for part in parts:
        assert part in run.error


def test_mistakes_in_a_process_of_their_own() -> None:
    run = process("generate", "--frobnicate", "hi")
    assert run.code == 2
    assert run.error.startswith("error: ")


def test_debug_shows_the_traceback_wherever_it_stands(cli: Cli) -> None:
    for args in (["--debug", "generate", "hi"], ["generate", "hi", "--debug"]):
        run = cli(*args)
        assert run.code == 2
        assert "Traceback" in run.err
        assert run.err.splitlines()[-1].startswith("error: no model")
    assert "Traceback" not in cli("generate", "--", "--debug").err  # there it is a prompt


def test_what_nobody_foresaw_is_called_a_bug(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> str:
        raise ZeroDivisionError("division by zero\nsecond line")

    monkeypatch.setattr(generate_module, "read_prompt", broken)
    run = cli("generate", "-m", "x", "hi")
    assert run.code == 1
    assert "bug" in run.error
    assert "ZeroDivisionError: division by zero second line" in run.error
    assert "--debug" in run.error


def test_ctrl_c_says_interrupted(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_module, "read_prompt", interrupted)
    run = cli("generate", "-m", "x", "hi")
    assert (run.code, run.error) == (130, "interrupted")


@pytest.mark.parametrize("delay", [0.6, 1.2, 2.0])
def test_ctrl_c_while_loading_or_generating(tiny: Path, delay: float) -> None:
    command = [sys.executable, "-m", "gemcut", "generate", "-m", str(tiny), "-n", "8000", "hi"]
    # A job in the background inherits that Ctrl-C is ignored; a person's command does not.
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(delay)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    # Either way a shell sees 130: an interrupt inside an import of C code makes Python end by the signal itself.
    assert running.returncode in (130, -signal.SIGINT), err
    assert err.decode().splitlines() == ["interrupted"]


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (ZeroDivisionError("by zero"), 1, "this is a bug in gemcut, ZeroDivisionError: by zero"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory; choose a smaller model"),
        (ParameterError("id 5 is unknown"), 2, "id 5 is unknown"),
    ],
)
def test_what_fails_in_the_engines_thread_is_told_as_what_it_is(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, code: int, said: str
) -> None:
    def fail(*_: Any) -> None:
        raise raised

    monkeypatch.setattr("gemcut.engine.runner.Runner.run", fail)
    run = cli("generate", "-m", str(tiny), "-n", "3", "hi")
    assert (run.code, run.error.startswith(f"error: {said}")) == (code, True), run.error
    assert len(run.error.splitlines()) == 1


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a process that a person started: a worker of pytest-xdist ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
def test_an_interrupt_that_an_import_swallowed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """C code may lose a KeyboardInterrupt while it imports; numpy then says that it cannot be loaded twice."""

    def swallow(*_: object, **__: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ImportError("cannot load module more than once per process")

    monkeypatch.setattr("gemcut.checkpoint.resolve.resolve", swallow)
    run = cli("info", "2b")
    assert (run.code, run.error) == (130, "interrupted")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("_ctrl_c")
def test_an_interrupt_that_torchs_import_swallowed(cli: Cli, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    """torch's C code loses a KeyboardInterrupt while it starts and goes on: the command must end all the same."""
    before = builtins.__import__

    def swallow(name: str, *rest: Any, **named: Any) -> Any:
        if name == "torch":
            monkeypatch.setattr(builtins, "__import__", before)
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        return before(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", swallow)
    run = cli("generate", "-m", str(tiny), "-n", "3", "hi")
    assert (run.code, run.out, run.error) == (130, "", "interrupted")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(tiny: Path) -> None:
    command = [sys.executable, "-m", "gemcut", "generate", "-m", str(tiny), "-n", "500", "hi"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.read(3)
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(60) == BROKEN_PIPE


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "gemcut", "plan", "2b", "--memory", "24GB"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment(), check=False)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == ["error: the disk is full; free some space and try again"]


@pytest.mark.parametrize(
    ("error", "part", "code"),
    [
        (ParameterError("top_p is 2;\nexpected less"), "error: top_p is 2; expected less", 2),
        (MemoryError(), "out of memory", 2),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory", 2),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
            2,
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/some/file"), "the disk is full: /some/file", 2),
        (PermissionError(errno.EACCES, "Permission denied", "/some/file"), "Permission denied: /some/file", 2),
        (RuntimeError("something else"), "bug", 1),
    ],
)
def test_explain(error: Exception, part: str, code: int) -> None:
    failure = explain(error)
    assert part in failure.message
    assert failure.code == code
    assert "\n" not in failure.message


def test_a_message_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in explain(ParameterError("bad \x1b[2Jname")).message
