"""Compile the kernels into one shared library beside this file.

    python -m gemcut.kernels.cpu.build

does it in place, for a source tree that was never installed or an installation on a machine that had no compiler then.
Installing the package does the same through hatch_build.py, which loads this file by its path: the standard library is
all it may import.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "src"
COMPILERS = ("c++", "g++", "clang++")


class BuildError(Exception):
    """The library cannot be built here; the message says why."""


@dataclass(frozen=True)
class Variant:
    """An instruction set that the files in src/variant are compiled for.

    Attributes:
        name: suffix of its entry points.
        flags: what makes a compiler use it.
    """

    name: str
    flags: tuple[str, ...]


_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512")
_AVX512_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vbmi")

#: By architecture, the best first. features.cpp says which of them a processor has.
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "x86_64": (
        Variant("amx", (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8")),
        Variant("avx512bf16", _AVX512_BF16),
        Variant("avx512", _AVX512),
        Variant("avx2", _AVX2),
    ),
    "aarch64": (
        Variant("bf16", ("-march=armv8.2-a+dotprod+bf16",)),
        Variant("dotprod", ("-march=armv8.2-a+dotprod",)),
        Variant("neon", ("-march=armv8-a",)),
    ),
}
_ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}

# No contraction: a product and a sum are fused where the source says so, or results would differ between compilers.
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-math-errno",
    "-ffp-contract=off", "-Wall",
)  # fmt: skip


def architecture() -> str:
    """This machine's architecture by its name in VARIANTS, or as the system calls it."""
    machine = platform.machine().lower()
    return _ARCHITECTURES.get(machine, machine)


def library_path() -> Path:
    """Where the library is, if it is."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    return HERE / f"libgemcut_cpu.{suffix}"


def fingerprint() -> str:
    """A digest of the sources; the library carries that of its own."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> list[str]:
    """The C++ compiler's command: CXX if set, else the first of COMPILERS. Raises BuildError."""
    if command := os.environ.get("CXX", "").strip():
        return shlex.split(command)
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise BuildError(f"no C++ compiler found (looked for CXX, {', '.join(COMPILERS)})")


def build(report: Callable[[str], None] = print, output: Path | None = None) -> Path:
    """Compile everything, side by side, and put the library at ``output`` (None: library_path()) in one move.

    A variant that the compiler does not know is left out, with a line to ``report``. Raises BuildError.
    """
    variants = VARIANTS.get(architecture())
    if variants is None:
        raise BuildError(f"there are no kernels for {architecture()} processors")
    output = output or library_path()
    compiler, marker = find_compiler(), fingerprint()
    common, variant_files = sorted(SOURCES.glob("*.cpp")), sorted((SOURCES / "variant").glob("*.cpp"))
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[tuple[Variant | None, Path, list[str]]] = []
        for source in common:
            jobs.append((None, source, [f'-DGEMCUT_FINGERPRINT="{marker}"']))
        for variant in variants:
            for source in variant_files:
                jobs.append((variant, source, [*variant.flags, f"-DGEMCUT_VARIANT={variant.name}"]))
        objects = [Path(folder) / f"{i}.o" for i in range(len(jobs))]
        commands = [
            [*compiler, *_FLAGS, *flags, f"-I{SOURCES}", "-c", str(source), "-o", str(target)]
            for (_, source, flags), target in zip(jobs, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            failures = list(threads.map(_run, commands))
        left_out = _judge(jobs, failures, report)
        kept = [str(o) for (variant, _, _), o in zip(jobs, objects, strict=True) if variant not in left_out]
        if len(left_out) == len(variants):
            raise BuildError("no instruction set could be compiled; the compiler's messages are above")
        # Beside its place, so that the move stays within one file system and nobody ever sees half a library.
        unfinished = output.with_name(f".{output.name}.{os.getpid()}")
        try:
            failure = _run([*compiler, "-shared", "-pthread", *_link_flags(), *kept, "-o", str(unfinished)])
            if failure is not None:
                raise BuildError(f"linking failed: {failure}")
            os.replace(unfinished, output)
        finally:
            unfinished.unlink(missing_ok=True)
    report(f"built {output} for {', '.join(v.name for v in variants if v not in left_out)}")
    return output


def _judge(
    jobs: Iterable[tuple[Variant | None, Path, list[str]]],
    failures: Iterable[str | None],
    report: Callable[[str], None],
) -> set[Variant]:
    """The variants that did not compile, each reported once. Raises BuildError for a common file."""
    left_out: set[Variant] = set()
    for (variant, source, _), failure in zip(jobs, failures, strict=True):
        if failure is None:
            continue
        if variant is None:
            raise BuildError(f"{source.name} did not compile: {failure}")
        if variant not in left_out:
            report(f"leaving out {variant.name}: {source.name} did not compile: {failure}")
        left_out.add(variant)
    return left_out


def _link_flags() -> list[str]:
    return ["-Wl,--as-needed", "-Wl,-z,noexecstack"] if sys.platform.startswith("linux") else []


def _run(command: list[str]) -> str | None:
    """Run a compiler; None, or what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    return None if done.returncode == 0 else (done.stderr.strip() or f"exit status {done.returncode}")


if __name__ == "__main__":
    try:
        build()
    except BuildError as error:
        sys.exit(f"error: {error}")
