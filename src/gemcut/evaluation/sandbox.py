"""Programs that a model wrote, run where they can harm nothing, or not at all.

Each runs in a process of its own, in namespaces of its own for users, processes, mounts, network and the rest: it sees
Python and the system's libraries, read-only, an empty folder in memory, no network and no other process. Memory, time,
files and processes have limits. Where the kernel grants one of these not, nothing is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PROBE = """
import os, socket
assert os.getpid() == 1, "the process numbers are not its own"
assert [name for _, name in socket.if_nameindex()] in ([], ["lo"]), "there is a network"
assert not os.path.exists("/proc/self") and not os.path.exists("/etc/passwd"), "the system's files are there"
assert os.getuid() != 0, "it runs as root"
try:
    open("/usr/x", "w")
except OSError:
    pass
else:
    raise AssertionError("the system's files can be written to")
open("file", "w").write("x")
"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use: bytes of memory and of files, seconds, processes."""

    memory: int = 1 << 30
    files: int = 16 << 20
    seconds: int = 10
    processes: int = 16


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """``passed``, or what was wrong in one line ("AssertionError: ", "took more than 10 s")."""

    passed: bool
    said: str = ""


class SandboxError(Exception):
    """The sandbox itself could not be made; nothing was run."""


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program to its end. Raises SandboxError where there is no sandbox."""
    limits = limits or Limits()
    if not sys.platform.startswith("linux"):
        raise SandboxError("it needs Linux's namespaces")
    values = json.dumps({name: getattr(limits, name) for name in ("memory", "files", "seconds", "processes")})
    code = Path(__file__).with_name("sandbox_inside.py").read_text()
    reading, writing = os.pipe()
    python = os.path.realpath(sys.executable)
    try:
        with open(os.devnull, "wb") as nowhere:
            process = subprocess.Popen(
                [python, "-I", "-S", "-c", code, values, str(writing)],
                stdin=subprocess.PIPE,
                stdout=nowhere,
                stderr=nowhere,
                pass_fds=(writing,),
                cwd="/",
                env={"PATH": "/usr/bin:/bin"},
                start_new_session=True,
            )
    except (OSError, subprocess.SubprocessError) as error:
        os.close(reading)
        raise SandboxError(f"no process could be started: {error}") from None
    finally:
        os.close(writing)
    late = False
    try:
        process.communicate(program.encode("utf-8", "replace"), timeout=limits.seconds + 1)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
    with open(reading, "rb") as file:
        said = b"" if late else file.read(1000)
    text = " ".join(said.decode("utf-8", "replace").split())
    if text.startswith("sandbox: "):
        raise SandboxError(text.removeprefix("sandbox: "))
    if late or (not text and process.returncode != 0):
        return Outcome(
            passed=False, said=f"took more than {limits.seconds} s" if late else "was killed, or ended itself"
        )
    return Outcome(passed=text == "passed", said="" if text == "passed" else text or "ended itself")


def run_programs(programs: Iterable[str], workers: int = 1, limits: Limits | None = None) -> list[Outcome]:
    """Run programs, ``workers`` at a time; outcomes in order."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda program: run_program(program, limits), programs))


@cache
def sandbox_refusal() -> str:
    """Why there is no sandbox here; "" where a program that looks around finds itself alone."""
    try:
        outcome = run_program(_PROBE)
    except SandboxError as error:
        return str(error)
    return "" if outcome.passed else f"a program in it was not alone ({outcome.said})"
