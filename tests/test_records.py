"""benchmarks/README.md and the files it names: commands that exist, files that exist, the form of a result."""

from __future__ import annotations

import argparse
import datetime
import re
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import support

BENCHMARKS = support.ROOT / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").iterdir())
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
MAKEFILE = (support.ROOT / "Makefile").read_text(encoding="utf-8")
DEVICES = re.findall(r"^\| ([a-z0-9-]+) \| .* \|$", README.split("## Files of results")[1], flags=re.MULTILINE)
NAME = re.compile(rf"(?P<date>\d{{4}}-\d\d-\d\d)-(?P<device>{'|'.join(DEVICES)})-(?P<topic>[a-z0-9]+(-[a-z0-9]+)*)\.md")
CLAIMS = [line for line in README.splitlines() if line.startswith("| ") and re.search(r"\| `(make|python) ", line)]


class Parsed(BaseException):
    """A benchmark has read its options and would begin now."""


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts ``python benchmarks/NAME.py …`` as far as its options; SystemExit where it does not take them."""
    python, script, *options = shlex.split(command)
    assert python == "python"
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        original(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with pytest.raises(Parsed):
        runpy.run_path(str(support.ROOT / script), run_name="__main__")


def recipe(target: str) -> str:
    """What ``make target`` runs, variables put in, as one text."""
    found = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    assert found is not None, f"the Makefile has no {target}"
    text = found[1].replace("\\\n", " ")
    values = dict(re.findall(r"^(\w+) *[?:]?= *(.*)$", MAKEFILE, flags=re.MULTILINE))
    for _ in range(3):  # a variable may name another
        text = re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], text)
    return text


def commands() -> list[str]:
    """Every command of the page and of the files of results, each once."""
    found = re.findall(r"`((?:make|python) [^`]+)`", README)
    for path in [BENCHMARKS / "README.md", *RESULTS]:
        for block in re.findall(r"^```\n(.*?)^```$", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE):
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            found += [line.partition("  #")[0].strip() for line in lines]
    return sorted({line for line in found if not line.startswith(("make test", "make demo"))})


@pytest.mark.parametrize("command", commands())
def test_a_command_is_taken(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if command.startswith("make "):
        for line in recipe(command.split()[1]).splitlines():
            _, python, script = line.partition("python benchmarks/")
            assert python, line
            parse(python + script, monkeypatch)
    else:
        parse(command, monkeypatch)


def test_a_wrong_option_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        parse("python benchmarks/gpu_inference.py --sizes 27b", monkeypatch)
    with pytest.raises(SystemExit):
        parse("python benchmarks/gpu_kernels.py --formats nf4,nf5", monkeypatch)


def test_there_are_claims() -> None:
    assert len(CLAIMS) >= 15
    for line in CLAIMS:
        claim, command, figure, where, peer = (cell.strip() for cell in line.strip("|").split("|"))
        assert claim, line
        assert figure, line
        assert peer, line
        assert re.fullmatch(r"`[^`]+`", command), line
        assert re.fullmatch(r"\[\d{4}-\d\d-\d\d, [\w ]+\]\([^)]+\)", where), line


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_the_form_of_a_result(path: Path) -> None:
    """A day, a device that the page explains, a topic; lines that fit; a first line that says when."""
    match = NAME.fullmatch(path.name)
    assert match is not None, (
        f"{path.name} is not DATE-DEVICE-TOPIC.md with a device of benchmarks/README.md: {DEVICES}"
    )
    datetime.date.fromisoformat(match["date"])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(f"# {match['date']}, ")
    long = [i for i, line in enumerate(lines, 1) if len(line) > 120]
    assert not long, f"lines over 120 characters: {long}"
    assert f"(results/{path.name})" in README, f"benchmarks/README.md does not name {path.name}: add it there"


def test_the_newest_result_counts() -> None:
    """A claim's link shows the date of its file, and there is no newer file of that device and topic."""
    newest: dict[tuple[str, str], str] = {}
    for path in RESULTS:
        match = NAME.fullmatch(path.name)
        assert match is not None
        newest[match["device"], match["topic"]] = path.name  # sorted by date
    for line in CLAIMS:
        shown, linked = re.findall(r"\[(\d{4}-\d\d-\d\d), [^\]]*\]\(([^)]+)\)", line)[0]
        match = NAME.fullmatch(Path(linked).name)
        if match is not None:  # quality stands in docs/
            assert shown == match["date"], line
            assert newest[match["device"], match["topic"]] == Path(linked).name, line
