"""Workers forked from a process that has computed, and numbers of threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gemcut.errors import ParameterError
from gemcut.process import MOST_THREADS, Threads, check_threads

# What a person would write, and what the parent had done before; the children say what they met.
_PROGRAM = """
import multiprocessing, sys, threading
import torch
from engine.words import new_gemma
from engine.driver import small_model
from gemcut.gemma import Gemma
from gemcut.model.dense import dense_logits

gemma = new_gemma()
if sys.argv[1] == "used":
    torch.set_num_threads(2)
    torch.randn(2000, 2000) @ torch.randn(2000, 2000)  # wakes PyTorch's threads
    stream = gemma.stream_ids([5, 6], gemma._params([5, 6], {"seed": 1, "max_new_tokens": 9}))
    next(stream)
else:
    stream = None

def work(name):
    jobs = {
        "generate": lambda: gemma.generate("abc", max_new_tokens=3),
        "forward": lambda: dense_logits(gemma.model, torch.tensor([1, 2, 3])),
        "read": lambda: next(stream) if stream else gemma.complete([[1]], gemma._params([1], {"max_new_tokens": 3})),
        "step": lambda: gemma.engine.step(),
        "load": lambda: Gemma.load("no-such-model"),
        "another": lambda: new_gemma(),
    }
    try:
        jobs[name]()
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}"
    return f"{name}: worked"

if __name__ == "__main__":
    names = ["generate", "forward", "read", "step", "load", "another"]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(*pool.map(work, names), sep="\\n")
    if stream is not None:  # the parent goes on
        print("parent", len(stream.result.token_ids))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("before", ["loaded", "used"])
def test_forked_worker_gets_an_error(before: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, str(program), before],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:6]] == ["generate", "forward", "read", "step", "load", "another"]
    for line in lines[:6]:
        assert "UnsupportedError: this process was forked" in line
        assert '"spawn"' in line
    if before == "used":
        assert lines[6] == "parent 9"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_worker_forked_before_anything_was_loaded_works() -> None:
    """Importing gemcut alone is harmless: servers import their modules before they fork."""
    program = (
        "import multiprocessing, gemcut, gemcut.gemma\n"
        "def work(n):\n"
        "    from engine.words import new_gemma\n"
        "    gemma = new_gemma()\n"
        "    params = gemma._params([5, 6], {'ignore_eos': True, 'max_new_tokens': 4})\n"
        "    return len(gemma.complete([[5, 6]], params)[0].token_ids)\n"
        "with multiprocessing.get_context('fork').Pool(1) as pool:\n"
        "    print(pool.map(work, [0]))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout == "[4]\n", done.stderr


_DROPPED = """
import sys, time, torch
from engine.words import new_gemma
from gemcut.engine import SamplingParams

class Slow:  # as a model of some gigabytes is, whose memory goes back
    def __del__(self):
        for _ in range(40):
            torch.mm(matrix, matrix)
        print("freed", flush=True)

matrix = torch.ones(700, 700)
gemma = new_gemma()
gemma.complete([[5, 6]], SamplingParams(max_new_tokens=2))
gemma.loop.engine.slow = Slow()
del gemma
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.1])
def test_a_dropped_model_is_freed_before_the_interpreter_goes(seconds: float) -> None:
    """The engine's thread is through with its work then, and frees what it held. What is held by nobody else, PyTorch
    frees in that thread, which Python would end amid it."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = [sys.executable, "-c", _DROPPED, str(seconds)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (0, "freed\n"), done.stderr


def test_threads_are_joined_once_they_were_told_to_end() -> None:
    told, ended = threading.Event(), []
    threads = Threads("test")
    for number in (1, 2):
        threads.start(lambda number=number: (told.wait(10), time.sleep(0.05), ended.append(number)))
    told.set()
    threads.join()
    assert sorted(ended) == [1, 2]
    own: list[str] = []
    threads.start(lambda: (threads.join(), own.append("not its own"))).join(10)
    assert own == ["not its own"]


def test_thread_numbers_have_bounds() -> None:
    for good in (1, 2, 256, MOST_THREADS):
        check_threads(good, "--threads")
    for bad in (0, -1, MOST_THREADS + 1, 100_000):
        with pytest.raises(ParameterError, match=f"--threads is {bad}; expected from 1 to {MOST_THREADS}"):
            check_threads(bad, "--threads")


@pytest.mark.slow
def test_a_hundred_thousand_threads_are_refused() -> None:
    program = (
        "import torch\n"
        "from gemcut import Gemma, GemcutError\n"
        "torch.set_num_threads(5000)\n"  # with 100,000 PyTorch itself ends in a segmentation fault
        "try:\n"
        "    Gemma.load('no-such-model')\n"
        "except GemcutError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-m", "gemcut", "generate", "-m", "no-such-model", "--threads", "100000", "hi"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for run, code, message in (
        (command, 2, "error: --threads is 100000"),
        ([sys.executable, "-c", program], 0, "the number of PyTorch's threads (torch.set_num_threads) is 5000"),
    ):
        done = subprocess.run(run, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == code
        assert done.stdout + done.stderr == f"{message}; expected from 1 to {MOST_THREADS}\n"
