"""The table of kernels: complete, and true of the files."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from gemcut.kernels.catalogue import KERNELS, table
from support import ROOT
from test_records import parse

SOURCES = ROOT / "src/gemcut/kernels"
#: Functions that one row of the table speaks for.
TOGETHER = {"norm_embed": "norm_add", "geglu_ordered": "geglu", "prefill_attention": "varlen_hopper"}


def test_the_readme_is_the_table() -> None:
    made = (SOURCES / "README.md").read_text()
    assert made == table(), "run: python -m gemcut.kernels.catalogue > src/gemcut/kernels/README.md"


@pytest.mark.parametrize("name", KERNELS)
def test_what_it_names_exists(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    it = KERNELS[name]
    for path in (it.source, it.test, it.note):
        assert (ROOT / path).is_file(), path
    if it.benchmark:
        parse(it.benchmark, monkeypatch)  # the benchmark itself takes these options


def test_every_cuda_function_is_in_it() -> None:
    found = set()
    for file in SOURCES.rglob("*.cu"):
        text = re.sub(r"//[^\n]*|__\w+__\([^)]*\)", "", file.read_text())  # comments and attributes
        found |= set(re.findall(r"extern \"C\" __global__\s+void\s+(\w+)\(", text))
    assert len(found) > 15
    assert {TOGETHER.get(name, name) for name in found} <= set(KERNELS), found


def test_the_module_prints_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gemcut.kernels.catalogue"], capture_output=True, text=True, check=True
    )
    assert done.stdout == table()
