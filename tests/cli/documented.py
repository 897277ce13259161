"""What README.md, docs/ and ``--help`` tell people to type, taken out of them, and what stands in for what is not here.

A command that is written into a document tomorrow is found by itself: it is run, or ``REASONS`` says why it cannot be.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import typer

import support
from gemcut.cli.main import app

#: Stand for Gemma 2 checkpoints, which are gated: the real 270M takes their place, and its own name's.
MODELS = re.compile(r"(google/gemma-[\w.-]+|gemma-[23]-\w+(-it|-pt)?|(2b|9b|27b)(-it)?)")
#: A model that another command of the document made.
MADE = ("run-1/model",)
#: Files that commands name, and what stands in for them.
FILES = {
    "guard.toml": '[[judge]]\nkind = "lexicon"\npath = "words.txt"\npolicy = "harassment"\n',
    "words.txt": "a word that nobody says\n",
    "librarian.toml": 'system = "You are a librarian."\n',
    "key": "0123456789abcdef" * 3 + "\n",
}
#: Commands that are run with the names they have: they read no weights, and know these shapes by heart.
BY_NAME = ("plan",)
#: What is typed but cannot be run here, by how it begins, and why not.
REASONS = {
    "make ": "sets up an environment; .ci/run does it in a new clone",
    "pip install": "changes the environment that the tests run in",
    "python -m pip": "changes the environment that the tests run in",
    "python3 -m venv": "sets up an environment",
    "python -m venv": "sets up an environment",
    "source ": "enters an environment",
    ". ": "enters an environment",
    "git clone": "needs the network",
    "cd ": "moves a shell",
    "export ": "sets a variable of a shell",
    "hf auth": "needs an account",
    "huggingface-cli": "needs an account",
    "python benchmarks/": "measures for many minutes",
    "gemcut serve": "runs until it is stopped; tests/server/test_readme.py types it",
    "gemcut write": "its answers are long; tests/uses/test_write.py gives it few tokens",
    "gemcut summarize": "needs a file of the reader's; tests/uses/test_summarize.py gives it one",
    "gemcut ask": "needs a folder of documents; tests/uses/test_ask.py gives it one",
    "gemcut tutor": "asks a person; tests/uses/test_tutor.py answers",
    "gemcut convert": "writes large files; tests/checkpoint/test_gguf_write.py reads them",
    "gemcut embed": "needs JSON lines of the reader's; tests/uses/test_probe.py gives it some",
    "gemcut probe": "writes a file; tests/uses/test_probe.py reads it",
    "gemcut list": "shows what its reader keeps; tests/test_storage.py keeps something",
    "gemcut batch": "needs a file of requests; tests/uses/test_batch.py gives it one",
    "gemcut safety": "needs texts of two kinds; tests/data/test_documents.py trains on some",
    "gemcut data": "needs a recipe; tests/data/test_documents.py runs the one of docs/data.md",
    "gemcut score": "takes half a minute; tests/evaluation/test_texts.py scores texts",
    "gemcut eval": "needs sets of benchmarks; tests/cli/test_eval.py runs these commands",
    "gemcut card gemma-3-270m --runs": "needs saved evaluations; see tests/evaluation/test_model_card.py",
    "gemcut train": "takes minutes; tests/training/test_documents.py runs these commands",
    "python -m gemcut.evaluation.lm_eval": "needs a benchmark's set; tests/evaluation/test_lm_eval.py asks the adapter",
    "GEMCUT_MODEL=": "needs Ray",
    "gemcut bench model": "measures for a minute; tests/uses/test_speed.py asks for little",
    "gemcut bench serve": "needs a server; tests/bench/test_real_server.py gives it one",
    "python -m gemcut.kernels.cpu.build": "builds the library that other tests are running",
}
#: In a command: something that only its reader has.
NOT_HERE = re.compile(r"https?://|--device[ =]cuda|\.\.\.|…|<[a-z]+>|\b(COMMAND|MODEL|OUT|NAME|FILE|TEXT)\b")
_FENCE = re.compile(r"^ *```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^ *```", re.MULTILINE | re.DOTALL)
_SHELL = ("", "sh", "bash", "shell", "console", "text")


@dataclass(frozen=True)
class Command:
    """One line for a shell, and the document it stands in."""

    document: str
    line: str

    @property
    def reason(self) -> str | None:
        """Why it is not run here; None: it is."""
        found = next((why for start, why in REASONS.items() if self.line.startswith(start)), None)
        if found is None and NOT_HERE.search(self.line):
            found = "names something that only a reader has"
        return found

    def __str__(self) -> str:
        return f"{self.document}: {self.line}"


def shape(line: str) -> str:
    """A command without what makes no difference to the way it goes: models and the name of what it makes."""
    words = [word for word in shlex.split(line.replace("|", " | ")) if not MODELS.fullmatch(word)]
    if "quantize" in words:
        del words[words.index("quantize") + 1]
    return " ".join(words)


def documents() -> list[Path]:
    """Every document that a user reads."""
    return [support.ROOT / "README.md", *sorted((support.ROOT / "docs").rglob("*.md"))]


def commands() -> list[Command]:
    """Every command of the documents and of ``--help``, each once."""
    found = [Command(path.name, line) for path in documents() for line in shell_lines(path.read_text("utf-8"))]
    found += [Command(f"--help of {name}", line) for name, text in _help_texts() for line in _examples(text)]
    return list({shape(command.line): command for command in reversed(found)}.values())[::-1]


def shell_lines(text: str) -> list[str]:
    """The commands of a Markdown text: those in fences for a shell, and those of three words or more in a sentence."""
    lines = []
    for fence in _FENCE.finditer(text):
        if fence["language"] in _SHELL:
            joined = re.sub(r"\\\n\s*", "", fence["text"])
            lines += [_without_comment(line.strip().removeprefix("$ ")) for line in joined.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))
    lines += [code for code in inline if re.match(r"(\.venv/bin/)?gemcut +\S+ +\S", code)]
    lines = [part.strip() for line in lines for part in line.split("&&")]
    return [line for line in lines if re.match(r"[\w./]+( |$)", line) and _is_command(line)]


def snippets() -> list[tuple[str, list[str]]]:
    """(a document's name, its Python snippets in order) for each document that has some."""
    found = [
        (path.name, [f["text"] for f in _FENCE.finditer(path.read_text("utf-8")) if f["language"] in ("python", "py")])
        for path in documents()
    ]
    # A client's code needs a server: tests/server/test_readme.py runs OpenAI's with one; the others' are no dependency.
    client = re.compile(r"^from (openai|langchain_openai|llama_index\b)", re.MULTILINE)
    found = [(name, [code for code in codes if not client.search(code)]) for name, codes in found]
    return [(name, codes) for name, codes in found if codes]


def split(line: str, source: Path) -> tuple[list[str], str | None]:
    """(arguments of ``gemcut``, the file that is its standard input): the real 270M at ``source`` for every model."""
    feeder, _, rest = line.rpartition("|")
    before, _, stdin = rest.partition(" < ")
    words = shlex.split(before)
    arguments = words[words.index("gemcut") + 1 :] if "gemcut" in words else words[1:]
    if feeder:
        stdin = shlex.split(feeder)[-1]
    if arguments[0] not in BY_NAME:
        arguments = [str(source) if MODELS.fullmatch(word) or word in MADE else word for word in arguments]
    return arguments, stdin.strip() or None


def _help_texts() -> list[tuple[str, str]]:
    group = typer.main.get_command(app)
    named = [("gemcut", group), *getattr(group, "commands", {}).items()]
    return [(name, f"{command.help or ''}\n{getattr(command, 'epilog', '') or ''}") for name, command in named]


def _examples(text: str) -> list[str]:
    """Commands in a help text: what is coloured as one, and what an epilog says to try."""
    text = text.replace("\\[", "[")
    marked = re.findall(r"\[(?:cyan|bold|green)\]((?:\.venv/bin/)?gemcut .*?)\[/", text, re.DOTALL)
    tried = [part for line in re.findall(r"Try first: (.*)", text) for part in line.split("&&")]
    lines = [" ".join(line.split()) for line in [*marked, *tried]]
    return [line for line in lines if _is_command(line)]


def _is_command(line: str) -> bool:
    return "gemcut " in f"{line} " or any(line.startswith(start) for start in REASONS)


def _without_comment(line: str) -> str:
    """``line`` up to a comment, which begins at a # outside of quotes."""
    quote = ""
    for i, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and (i == 0 or line[i - 1].isspace()):
            return line[:i].rstrip()
    return line
