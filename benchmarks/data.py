"""Speed of the steps of data, in MB of text a second of one core, beside datatrove and datasketch in turns.

    python benchmarks/data.py --peer /path/to/venv/bin/python --megabytes 4 --repetitions 3

The text is English from the documentation of installed packages, in documents of about 2.2 kB. The peer runs in an
environment of its own (``pip install "datatrove[processing]" spacy``), since two packages install a module
``fasttext``; this script calls itself there. All times are CPU seconds of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SIZE = 2200


def english(megabytes: float) -> list[str]:
    """Documents from README and METADATA files and docstrings' prose of installed packages, in a fixed order."""
    import re

    texts: list[str] = []
    total = 0.0
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        source = path.read_text("utf-8", "replace")
        prose = "\n\n".join(part.strip() for part in re.findall(r'"""(.*?)"""', source, re.DOTALL) if len(part) > 200)
        prose = prose.encode("utf-8", "replace").decode().replace("\x00", "")
        for start in range(0, len(prose) - SIZE // 2, SIZE):
            texts.append(prose[start : start + SIZE])
            total += len(texts[-1].encode()) / 1e6
            if total >= megabytes:
                return texts
    return texts


def ours(texts: list[str], benchmarks: str | None, tokenizer: str | None) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each call works on fresh documents."""
    from gemcut.data.decontaminate import Decontaminate
    from gemcut.data.dedup import minhash
    from gemcut.data.dedup.exact import ExactDuplicates
    from gemcut.data.filters.language import Language
    from gemcut.data.filters.web import C4, FineWeb, GopherQuality, GopherRepetition
    from gemcut.data.steps import BaseStep, batches
    from gemcut.data.tokens.tokenize import DocumentTokenizer
    from gemcut.safety.lexicon import Lexicon
    from gemcut.safety.linear import Training, train
    from gemcut.safety.pii import replace
    from gemcut.text.document import Document, split_all

    def fresh() -> list[Document]:
        return [Document(str(i), "s", text) for i, text in enumerate(texts)]

    def chain(*steps: BaseStep) -> Callable[[], object]:
        def run() -> int:
            items = iter(fresh())
            for step in steps:
                items = (item for item in step(items, 0, 1) if isinstance(item, Document))
            return sum(1 for _ in items)

        return run

    def each(*steps: BaseStep) -> Callable[[], object]:
        """Every step on every document, dropped or not."""

        def run() -> None:
            for batch in batches(fresh()):
                for step in steps:
                    list(step(iter(batch), 0, 1))

        return run

    def signatures(kind: str) -> Callable[[], object]:
        def run() -> None:
            for batch in batches(fresh()):
                minhash.signatures(*minhash.shingles(batch, 5), kind)

        return run

    half = len(texts) // 2
    judge = train(texts[:half], texts[half:], "half", Training(epochs=1))
    lexicon = Lexicon([f"{word} thing" for word in ("some", "other", "every", "same")] + ["widget", "gadget"])

    def judges() -> None:
        for batch in batches(fresh()):
            judge.scores(batch, "half")
            lexicon.scores(batch)

    def exact() -> None:
        collector = ExactDuplicates().collector()
        for batch in batches(fresh()):
            collector.add(batch)

    more: dict[str, Callable[[], object]] = {"lexicon and linear judge": judges, "exact duplicates, hashes": exact}
    if benchmarks:
        step = Decontaminate(benchmarks=benchmarks)
        more["decontamination, 13- and 8-grams"] = each(step)
    if tokenizer:
        encoder = DocumentTokenizer(Path(tokenizer))
        more["tokenize"] = lambda: encoder.encode(iter(fresh()))
    four = (GopherRepetition(), GopherQuality(), C4(terminal_punctuation=False, curly=False), FineWeb())
    return {
        "split": lambda: [split_all(batch) for batch in batches(fresh())],
        "gopher-quality": each(GopherQuality()),
        "gopher-repetition": each(GopherRepetition()),
        "c4": each(C4(terminal_punctuation=False, curly=False)),
        "fineweb": each(FineWeb()),
        "four web filters, every document": each(*four),
        "four web filters, in a chain": chain(*four),
        "language": each(Language()),
        "pii": lambda: [replace(text) for text in texts],
        "minhash, rensa": signatures("rensa"),
        "minhash, numpy": signatures("numpy"),
        **more,
    }


STEPS = ("language", "gopher-repetition", "gopher-quality", "fineweb", "pii", "exact-duplicates", "near-duplicates")


def whole(texts: list[str], benchmarks: str | None, tokenizer: str | None) -> float:
    """CPU seconds of a recipe from JSONL to documents, or to shards where there is a tokenizer; its children's too."""
    from gemcut.data.recipe import read_recipe
    from gemcut.data.run import run_recipe

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = (json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))
        (folder / "a.jsonl").write_text("".join(lines), encoding="utf-8")
        text = '[[source]]\nname = "a"\nreader = "jsonl"\npaths = ["a.jsonl"]\n'
        text += "".join(f'[[step]]\nuse = "{step}"\n' for step in STEPS)
        text += '[[step]]\nuse = "c4"\nterminal_punctuation = false\ncurly = false\n'
        if benchmarks:
            text += f'[[step]]\nuse = "decontaminate"\nbenchmarks = "{Path(benchmarks).resolve()}"\n'
        if tokenizer:
            text += f'[tokens]\ntokenizer = "{Path(tokenizer).resolve()}"\n'
        (folder / "recipe.toml").write_text(text, encoding="utf-8")
        start = sum(os.times()[:4])
        run_recipe(read_recipe(folder / "recipe.toml"), folder / "out")
        return sum(os.times()[:4]) - start


def whole_speed(texts: list[str], benchmarks: str | None, tokenizer: str | None) -> float:
    """MB a CPU second of the recipe. What it takes whatever the size (indices, the tokenizer) falls out."""
    few = texts[: len(texts) // 4]
    size = sum(len(text.encode()) for text in texts[len(few) :]) / 1e6
    return size / (whole(texts, benchmarks, tokenizer) - whole(few, benchmarks, tokenizer))


def peers(texts: list[str]) -> dict[str, Callable[[], object]]:
    """The same of datatrove, each filter on every document."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.formatters import PIIFormatter

    documents = [Document(text=text, id=str(i)) for i, text in enumerate(texts)]
    four = [
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]
    pii = PIIFormatter()

    def each(*filters: object) -> Callable[[], object]:
        def run() -> None:
            for document in documents:
                for step in filters:
                    step.filter(Document(text=document.text, id=document.id))  # type: ignore[attr-defined]

        return run

    return {
        "gopher-repetition": each(four[0]),
        "gopher-quality": each(four[1]),
        "c4": each(four[2]),
        "fineweb": each(four[3]),
        "four web filters, every document": each(*four),
        "pii": lambda: [pii.format(text) for text in texts],
    }


def measure(what: dict[str, Callable[[], object]], megabytes: float, only: list[str]) -> dict[str, float]:
    """MB a CPU second of each."""
    found = {}
    for name, call in what.items():
        if only and name not in only:
            continue
        start = time.process_time()
        call()
        found[name] = megabytes / (time.process_time() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="Python of an environment with datatrove")
    parser.add_argument("--megabytes", type=float, default=4)
    parser.add_argument("--peer-megabytes", type=float, default=0.4, help="of the same text, for the slow peer")
    parser.add_argument("--benchmarks", help="folder of benchmark sets, for decontamination")
    parser.add_argument("--tokenizer", help="a tokenizer.json, for tokenizing")
    parser.add_argument("--html", help="a folder of HTML pages")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--serve-peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_peer:
        texts = json.loads(Path(options.serve_peer).read_text())
        what = peers(texts)
        for call in list(what.values())[:1]:
            call()  # loads the tokenizer
        size = sum(len(text.encode()) for text in texts) / 1e6
        print(json.dumps(measure(what, size, [])))
        return
    from gemcut.data.readers.html import extract

    texts = english(options.megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    what = ours(texts, options.benchmarks, options.tokenizer)
    if options.html:
        pages = [path.read_bytes() for path in sorted(Path(options.html).rglob("*.html"))[:400]]
        speeds = []
        for _ in range(options.repetitions + 1):  # the first loads the library
            start = time.process_time()
            for page in pages:
                extract(page)
            speeds.append(sum(map(len, pages)) / 1e6 / (time.process_time() - start))
        print(f"{f'html, {len(pages)} pages':36} {statistics.median(speeds[1:]):8.1f} MB/s")
    for call in what.values():
        call()  # tables, models, caches
    found: dict[str, list[float]] = {}
    beside: dict[str, list[float]] = {}
    for _ in range(options.repetitions):
        for name, speed in measure(what, size, []).items():
            found.setdefault(name, []).append(speed)
        if options.peer:
            few = texts[: max(1, round(len(texts) * options.peer_megabytes / size))]
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                file.write(json.dumps(few))
                file.flush()
                command = [options.peer, __file__, "--serve-peer", file.name]
                answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for name, speed in json.loads(answer.splitlines()[-1]).items():
                beside.setdefault(name, []).append(speed)
    for title, own in (("to documents", None), ("to shards", options.tokenizer)):
        if title == "to documents" or own:
            name = f"the whole chain from JSONL {title}"
            found[name] = [whole_speed(texts, options.benchmarks, own) for _ in range(options.repetitions)]
    print(f"{len(texts):,} documents, {size:.1f} MB; median of {options.repetitions}, Python {sys.version.split()[0]}")
    for name, speeds in found.items():
        peer = f"   datatrove {statistics.median(beside[name]):6.2f}" if name in beside else ""
        print(f"{name:36} {statistics.median(speeds):8.1f} MB/s{peer}")


if __name__ == "__main__":
    main()
