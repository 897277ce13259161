"""Programs that tests fork are as processes of their own: environment, arguments, modules, streams, exit status."""

from __future__ import annotations

import json
import os

import pytest

import forked
from support import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
ENV = {"PYTHONPATH": str(ROOT / "src"), "PATH": os.environ["PATH"]}

SHOW = """
import json, os, sys
print(json.dumps([dict(os.environ), sys.argv, sorted(sys.modules), sys.stdin.read(), __name__]))
print("wrong", file=sys.stderr)
sys.exit(3)
"""


def test_a_program_of_its_own() -> None:
    done = forked.run(["a", "b c"], env={**ENV, "HF_HOME": "/nowhere"}, code=SHOW)
    environment, arguments, modules, stdin, name = json.loads(done.stdout)
    assert environment == {**ENV, "HF_HOME": "/nowhere"}
    assert (arguments, stdin, name) == (["-c", "a", "b c"], "", "__main__")
    assert "torch" in modules
    assert not {*forked.ABSENT} & {*modules}
    assert (done.returncode, done.stderr) == (3, "wrong\n")


def test_programs_do_not_see_each_other() -> None:
    write = "import os, torch; os.environ['LEFT'] = '1'; torch.left = 1; import gemcut.checkpoint.resolve"
    assert forked.run([], env=ENV, code=write).returncode == 0
    look = "import os, sys, torch; print('LEFT' in os.environ, hasattr(torch, 'left'), 'gemcut' in sys.modules)"
    assert forked.run([], env=ENV, code=look).stdout == "False False False\n"


def test_a_module_and_an_error() -> None:
    done = forked.run(["--version"], env=ENV, module="gemcut")
    assert done.stdout.startswith("gemcut ")
    failed = forked.run([], env=ENV, code="1 / 0")
    assert failed.returncode == 1
    assert failed.stderr.rstrip().endswith("ZeroDivisionError: division by zero")
    ended = forked.run([], env=ENV, code="import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert ended.returncode == -9
    assert forked.run([], env=ENV, code="print(6 * 7)").stdout == "42\n"
