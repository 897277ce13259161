"""What a program in the sandbox can do, seen from outside; skipped where the kernel grants no namespaces."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from gemcut.evaluation import sandbox
from gemcut.evaluation.sandbox import Limits, run_program, run_programs, sandbox_refusal

needs_sandbox = pytest.mark.skipif(bool(sandbox_refusal()), reason=f"no sandbox here: {sandbox_refusal()}")


@needs_sandbox
def test_right_and_wrong_programs() -> None:
    programs = [
        "assert 1 + 1 == 2",
        "assert False, 'no'",
        "def f(:",
        "1/0",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
    ]
    found = run_programs(programs, workers=2)
    assert [each.passed for each in found] == [True, False, False, False, False, False]
    assert [each.said.split(":")[0] for each in found[1:5]] == [
        "AssertionError",
        "SyntaxError",
        "ZeroDivisionError",
        "SystemExit",
    ]
    assert run_program("print('x' * 10**6); import heapq, math, collections, re, itertools").passed


@needs_sandbox
def test_files_outside_cannot_be_seen_or_written(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    tmp_path.chmod(0o777)
    outcome = run_program(f"open({str(secret)!r}).read()")
    assert outcome.said.startswith("FileNotFoundError")
    assert not run_program(f"open({str(tmp_path / 'new')!r}, 'w')").passed
    assert not (tmp_path / "new").exists()
    assert (
        "OSError" in run_program("f = open('big', 'wb')\nfor _ in range(64): f.write(b'x' * (1 << 20)); f.flush()").said
    )


@needs_sandbox
def test_no_network() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert "Error" in run_program(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)").said


@needs_sandbox
def test_memory_time_and_forks_have_limits() -> None:
    assert run_program("x = bytearray(2 << 30)").said.startswith("MemoryError")
    began = time.monotonic()
    outcome = run_program("import time; time.sleep(60)", Limits(seconds=1))
    assert outcome.said == "took more than 1 s"
    assert time.monotonic() - began < 15
    assert not run_program("while True: pass", Limits(seconds=1)).passed
    forks = "import os, time\nfor _ in range(100):\n    if os.fork() == 0:\n        time.sleep(30); os._exit(0)"
    assert run_program(forks, Limits(seconds=2)).said.startswith("BlockingIOError")
    # What it forked is gone with it.
    assert run_program("import os, time\nif os.fork() == 0:\n    time.sleep(3600)").passed
    time.sleep(0.2)
    mine = os.popen("ps -eo user:20,args").read()
    assert "time.sleep(3600)" not in mine


def test_nothing_is_run_without_a_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a step into the sandbox is refused, the program does not run: the kernel's refusal is played."""
    inside = Path(sandbox.__file__).with_name("sandbox_inside.py").read_text()
    mark = tmp_path / "ran"
    tmp_path.chmod(0o777)
    for step in ('call("unshare"', 'call("pivot_root"', 'mount("none"'):
        assert step in inside
        broken = inside.replace(step, f'fail("not permitted") or {step}', 1)
        monkeypatch.setattr(Path, "read_text", lambda self, broken=broken: broken)
        with pytest.raises(sandbox.SandboxError, match="not permitted"):
            run_program(f"open({str(mark)!r}, 'w')")
    assert not mark.exists()


def test_threads_do_not_share_pipes() -> None:
    if sandbox_refusal():
        pytest.skip("no sandbox here")
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append(run_program("pass").passed)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4
