"""Every kernel file opens with five short lines that say what it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from support import ROOT

KERNELS = ROOT / "src/gemcut/kernels"
LABELS = ("Computes", "Shapes", "Runs", "Schedule", "Invariants")
SOURCES = sorted(path for suffix in ("cu", "cuh", "cpp", "h") for path in KERNELS.rglob(f"*.{suffix}"))


def header(text: str) -> list[str]:
    """The five lines, without comment signs; ValueError where the text does not have them in order."""
    lines = [line.removeprefix("//").strip() for line in text.splitlines()]
    first = next((i for i, line in enumerate(lines) if line.startswith(f"{LABELS[0]}: ")), None)
    if first is None:
        raise ValueError("no header")
    found = lines[first : first + len(LABELS)]
    for label, line in zip(LABELS, found, strict=True):
        if not line.startswith(f"{label}: ") or len(line) < len(label) + 12:
            raise ValueError(f"{label} is missing or empty in {line!r}")
    return found


def module_docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def defines_a_kernel(path: Path) -> bool:
    """Whether a Python file compiles, generates or is (Triton) GPU code."""
    text = path.read_text()
    return "triton.jit" in text or "compile_kernel(" in text.replace("def compile_kernel(", "") or "wgmma." in text


PYTHON = sorted(path for path in KERNELS.rglob("*.py") if defines_a_kernel(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(KERNELS)))
def test_a_source_opens_with_the_five_lines(path: Path) -> None:
    top = path.read_text().splitlines()[: len(LABELS)]
    assert len(header("\n".join(top))) == len(LABELS)
    assert all(line.startswith("// ") and len(line) <= 120 for line in top)


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(KERNELS)))
def test_a_python_file_that_defines_a_kernel_has_them_in_its_docstring(path: Path) -> None:
    header(module_docstring(path))


def test_none_is_overlooked() -> None:
    names = {path.relative_to(KERNELS).as_posix() for path in SOURCES + PYTHON}
    assert {
        "linear/gemv.cuh",
        "megakernel/decode_step.cu",
        "attention/varlen_triton.py",
        "runtime/wgmma.py",
        "cpu/src/pool.h",
    } <= names
    assert len(SOURCES) > 45
    assert len(PYTHON) > 12


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no header"),
        ("// y = x W^T of few rows", "no header"),
        ("// Computes: y = x W^T of few rows\n// Shapes: x [m, k], W [n, k]\n\n\n", "Runs"),
        ("\n".join(f"// {label}: " for label in LABELS), "no header"),
        ("\n".join(f"// {label}: something" for label in reversed(LABELS)), "Computes|argument"),
    ],
)
def test_a_file_without_them_is_found(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        header(text)
