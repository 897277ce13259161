"""Python programs in processes of their own without the seconds that importing PyTorch takes.

A helper process imports PyTorch once and forks for each program. A child has its own environment, arguments and
output; nothing of gemcut and nothing of huggingface_hub, which reads its environment when it is imported, is there yet.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

#: What the helper has imported when it forks, and what it must not have.
PRELOADED, ABSENT = "torch, numpy, safetensors.torch", ("gemcut", "huggingface_hub", "transformers")

_HELPER = f"""
import json, os, runpy, sys, traceback
import {PRELOADED}
assert not [name for name in {ABSENT!r} if name in sys.modules]
print(json.dumps(os.getpid()), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child:
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)
        continue
    status = 1
    try:
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["env"])
        for number, name in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
            opened = os.open(name, os.O_RDWR | os.O_CREAT)
            os.dup2(opened, number)
            os.close(opened)
        sys.stdin = open(0, closefd=False)
        sys.path[:0] = [part for part in job["env"].get("PYTHONPATH", "").split(os.pathsep) if part]
        sys.argv = ["-c", *job["args"]]
        try:
            if job["module"]:
                sys.argv[0] = job["module"]
                runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
            else:
                exec(compile(job["code"], "<program>", "exec"), {{"__name__": "__main__"}})
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
"""

_helper: subprocess.Popen[str] | None = None


def run(
    args: Sequence[str], *, env: Mapping[str, str], code: str = "", module: str = ""
) -> subprocess.CompletedProcess[str]:
    """``python -c code args…`` or ``python -m module args…``, with nothing on standard input."""
    global _helper
    if not hasattr(os, "fork"):
        command = [sys.executable, *(["-m", module] if module else ["-c", code]), *args]
        return subprocess.run(command, env=dict(env), capture_output=True, text=True, check=False, timeout=120)
    if _helper is None or _helper.poll() is not None:
        _helper = _start()
    assert _helper.stdin is not None
    assert _helper.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        job = {"args": list(args), "env": dict(env), "code": code, "module": module, "cwd": os.getcwd()}
        try:
            _helper.stdin.write(json.dumps({**job, "out": str(out), "err": str(err)}) + "\n")
            _helper.stdin.flush()
            status = json.loads(_helper.stdout.readline())
        except BaseException:  # a test that took too long ends its program, too
            os.killpg(_helper.pid, signal.SIGKILL)
            _helper.wait()
            _helper = None
            raise
        return subprocess.CompletedProcess(list(args), status, out.read_text("utf-8"), err.read_text("utf-8"))


def _start() -> subprocess.Popen[str]:
    # Of this process's environment only what finds the libraries; one thread, since a fork has no others.
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "GEMCUT_"))}
    helper = subprocess.Popen(
        [sys.executable, "-c", _HELPER],
        env={**clean, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert helper.stdin is not None
    assert helper.stdout is not None
    assert json.loads(helper.stdout.readline()) == helper.pid
    atexit.register(_stop, helper)
    return helper


def _stop(helper: subprocess.Popen[str]) -> None:
    """Let the helper end, and wait for that: it has no work."""
    with helper:
        pass
