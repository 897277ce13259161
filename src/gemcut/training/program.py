"""What a compiled program says of itself: memory of a chip, and what its collectives move in one step.

XLA's cost analysis counts the body of a loop once and kernels hardly at all, so nothing here uses it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_NUMBER = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_GROUPS_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_GROUPS_LIST = re.compile(r"replica_groups=\{\{([\d,]*)\}")

#: Computations of a module by name: (is it the entry, its lines).
Bodies = dict[str, tuple[bool, list[str]]]


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip. ``arguments`` stay between steps; ``peak`` is the most at once."""

    arguments: int
    temporary: int
    code: int
    peak: int

    @classmethod
    def of(cls, compiled: Any) -> Memory:
        """From a compiled program's own analysis."""
        found = compiled.memory_analysis()
        arguments, temporary = int(found.argument_size_in_bytes), int(found.temp_size_in_bytes)
        fresh = max(0, int(found.output_size_in_bytes) - int(found.alias_size_in_bytes))
        code = int(found.generated_code_size_in_bytes)
        # Older jaxlibs say no peak; then everything at once is the safe answer.
        peak = int(getattr(found, "peak_memory_in_bytes", 0)) or arguments + temporary + fresh
        return cls(arguments, temporary, code, peak)

    @property
    def needed(self) -> int:
        """What a chip must have: state, temporaries and code are allocated side by side."""
        return self.arguments + self.temporary + self.code


@dataclass(frozen=True)
class Collective:
    """One collective of a program: bytes of one call on one chip, of the larger of what goes in and comes out."""

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and shape of each
    nbytes: int
    times: int  # calls in one step: a loop's body counts as often as it runs
    chips: int  # that take part together; 0 where the text does not say


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind: how many stand in the program, calls a step, bytes a step and chip."""

    count: int
    calls: int
    nbytes: int


def collectives(hlo: str) -> list[Collective]:
    """Every collective of a compiled module's text.

    On TPUs a reduce-scatter is a computation named all-reduce-scatter, an all-reduce and a slice: counted as such.
    """
    bodies = _computations(hlo)
    runs = _runs(bodies)
    found: list[Collective] = []
    for name, (_, lines) in bodies.items():
        scattered = "all-reduce-scatter" in name
        for line in lines:
            one = _collective(line, scattered)
            if one is not None and runs[name]:
                kind, arrays, chips = one
                nbytes = sum(_nbytes(*array) for array in arrays)
                if kind == "reduce-scatter" and not scattered:
                    nbytes *= max(1, chips)
                found.append(Collective(kind, arrays, nbytes, runs[name], chips))
    return found


def traffic(found: list[Collective]) -> dict[str, Traffic]:
    """By kind, in the order of ``KINDS``; kinds that are absent have zeros."""
    by_kind = {kind: [one for one in found if one.kind == kind] for kind in KINDS}
    return {
        kind: Traffic(len(ones), sum(one.times for one in ones), sum(one.nbytes * one.times for one in ones))
        for kind, ones in by_kind.items()
    }


def largest(found: list[Collective], kind: str | None = None) -> Collective | None:
    """The collective whose one call moves most."""
    return max((one for one in found if kind in (None, one.kind)), key=lambda one: one.nbytes, default=None)


def scattered_sizes(found: list[Collective]) -> Counter[int]:
    """How often an array of so many elements goes into a reduce-scatter, counted once a place in the program."""
    sizes: Counter[int] = Counter()
    for one in found:
        if one.kind == "reduce-scatter":
            for _, shape in one.arrays:
                sizes[math.prod(shape)] += 1
    return sizes


def _computations(hlo: str) -> Bodies:
    """name: (is it the entry, its lines)"""
    bodies: Bodies = {}
    lines: list[str] | None = None
    for line in hlo.splitlines():
        if lines is None:
            if head := _COMPUTATION.match(line):
                lines = []
                bodies[head[2]] = (bool(head[1]), lines)
        elif line.rstrip() == "}" or line.startswith("}, execution_thread"):
            lines = None  # a kernel's metadata may spread over lines that begin with a brace, too
        else:
            lines.append(line)
    return bodies


def _runs(bodies: Bodies) -> dict[str, int]:
    """How often each computation runs in one call of the entry. A loop of unknown length counts once."""
    edges: dict[str, list[tuple[str, int]]] = {}
    for name, (_, lines) in bodies.items():
        edges[name] = [edge for line in lines for edge in _calls(line, bodies) if edge[0] in bodies]
    runs = dict.fromkeys(bodies, 0)
    # Text lists a computation before its callers, so callers are met first from the end.
    for name in reversed(_ordered(edges)):
        if bodies[name][0]:
            runs[name] += 1
        for callee, times in edges[name]:
            runs[callee] += runs[name] * times
    return runs


def _calls(line: str, bodies: Bodies) -> Iterator[tuple[str, int]]:
    """(computation, how often) of what an instruction calls."""
    if "=%" not in line and "omputation" not in line:
        return
    names = _CALLED.findall(line)
    times = _trips(line, bodies) if " while(" in line else 1
    for name in names:
        yield name, times
    for group in _BRANCHES.findall(line):
        for name in group.split(","):
            yield name.strip().lstrip("%"), 1


def _trips(line: str, bodies: Bodies) -> int:
    """How often a loop runs. TPU programs do not say; a scan counts from 0 to the one number of its condition."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = _CONDITION.search(line)
    _, lines = bodies.get(condition[1], (False, [])) if condition else (False, [])
    numbers = {int(found[1]) for text in lines if (found := _NUMBER.search(text))}
    return max(1, *numbers) if len(numbers) == 1 else 1


def _ordered(edges: dict[str, list[tuple[str, int]]]) -> list[str]:
    """Callees before callers."""
    done: dict[str, None] = {}
    for root in edges:
        stack: list[tuple[str, bool]] = [(root, False)]
        while stack:
            name, finished = stack.pop()
            if finished:
                done[name] = None
            elif name not in done:
                stack.append((name, True))
                stack += [(callee, False) for callee, _ in edges[name] if callee not in done]
    return list(done)


def _collective(line: str, scattered: bool) -> tuple[str, tuple[tuple[str, tuple[int, ...]], ...], int] | None:
    hit = _INSTRUCTION.match(line)
    if hit is None:
        return None
    opcode = hit[3]
    kind = opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    arrays = [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", hit[2]))
    ]
    if opcode.endswith("-start") and kind != "all-reduce":
        # (operands, results, contexts): the second half of the arrays are results
        arrays = [array for array in arrays if array != ("u32", ())]
        arrays = arrays[len(arrays) // 2 :]
    if scattered and kind == "all-reduce":
        kind = "reduce-scatter"
    rest = hit[4]
    iota, listed = _GROUPS_IOTA.search(rest), _GROUPS_LIST.search(rest)
    chips = int(iota[2]) if iota else len(listed[1].split(",")) if listed and listed[1] else 0
    return kind, tuple(arrays), chips


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    found = re.fullmatch(r"[a-z]+(\d+)(e\d+m\d+\w*)?", dtype)
    bits = _BITS.get(dtype) or (int(found[1]) if found else 32)
    return math.prod(shape) * bits // 8
