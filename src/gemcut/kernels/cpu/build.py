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


def record_path(library: Path) -> Path:
    """Where the size and digest of ``library`` stand, by which a damaged one is known before it is loaded."""
    return library.with_name(f"{library.name}.sha256")


def record(data: bytes) -> str:
    """What stands there for a library of these bytes."""
    return f"{hashlib.sha256(data).hexdigest()} {len(data)}\n"


def damage(library: Path) -> str | None:
    """None where the file is what ``build`` made, else what is wrong with it. The file is read, never loaded."""
    note = record_path(library)
    try:
        data = library.read_bytes()
        if not note.exists():  # built before there were records
            return None if _is_whole_elf(data) else f"{library.name} is incomplete"
        expected = note.read_text(encoding="ascii")
    except (OSError, ValueError):
        return f"{library.name} or {note.name} beside it cannot be read"
    digest, _, size = expected.strip().partition(" ")
    if size != str(len(data)):
        return f"{library.name} has {len(data):,} bytes, not the {size} that were built"
    if digest != hashlib.sha256(data).hexdigest():
        return f"{library.name} is not the file that was built"
    return None


def _is_whole_elf(data: bytes) -> bool:
    """Whether these are a 64-bit ELF file up to its end, which is where linkers put the table of sections."""

    def number(start: int, size: int) -> int:
        return int.from_bytes(data[start : start + size], "little")

    return data[:5] == b"\x7fELF\x02" and 0 < number(40, 8) <= len(data) - number(58, 2) * number(60, 2)


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
    """Compile everything, side by side, and move the library to ``output`` (None: library_path()) and its record
    beside it.

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
        unfinished_record = record_path(unfinished)
        try:
            failure = _run([*compiler, "-shared", "-pthread", *_link_flags(), *kept, "-o", str(unfinished)])
            if failure is not None:
                raise BuildError(f"linking failed: {failure}")
            unfinished_record.write_text(record(unfinished.read_bytes()), encoding="ascii")
            os.replace(unfinished, output)  # between the two moves the library counts as damaged, and is not loaded
            os.replace(unfinished_record, record_path(output))
        finally:
            unfinished.unlink(missing_ok=True)
            unfinished_record.unlink(missing_ok=True)
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
