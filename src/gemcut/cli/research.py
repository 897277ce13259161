"""``gemcut next``, ``embed`` and ``probe``: what a model thinks, for research."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from gemcut.cli import output
from gemcut.cli.files import read_text_file
from gemcut.cli.options import MODEL_HELP, Debug, LoadOptions, check_utf8, flag, need_model, option, with_options
from gemcut.errors import ParameterError

Model = Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help=MODEL_HELP)]
Text = Annotated[str | None, typer.Argument(metavar="TEXT", help="The text; or --file.", show_default=False)]
File = Annotated[Path | None, option("A text file, UTF-8, in the place of TEXT.", "--file", metavar="FILE")]
#: Texts that are embedded together; between two such groups lines are written.
_TOGETHER = 64


@with_options
def next_(
    text: Text = None,
    *,
    file: File = None,
    top: Annotated[int, option("How many tokens. Else 10.", "--top", metavar="N")] = 10,
    as_json: Annotated[bool, flag("One JSON object.", "--json")] = False,
    model: Model = None,
    debug: Debug = False,
    load: LoadOptions,
) -> None:
    """The likeliest next tokens of a text, with their probabilities.

    Nothing is drawn, and no penalty or temperature is applied.
    """
    name, text = need_model(model, "--model NAME"), _text(text, file)
    _positive(top, "--top")
    gemma = load.load(name)
    from gemcut.uses.probe import next_tokens

    found = next_tokens(gemma, gemma.encode(text), top=top)
    rows = [{"id": i, "token": gemma.tokenizer.decode([i]), "logprob": logprob} for i, logprob in found]
    if as_json:
        output.print_json({"text": text, "next": rows})
        return
    for i, logprob in found:
        print(f"{math.exp(logprob):8.4%}  {i:>6}  {gemma.tokenizer.decode([i])!r}")


@with_options
def embed(
    text: Text = None,
    *,
    file: Annotated[Path | None, option("JSON lines, each with a text.", "--file", metavar="FILE")] = None,
    out: Annotated[Path | None, option("Where to, .jsonl or .npy. Else here.", "--out", metavar="FILE")] = None,
    normalize: Annotated[bool, flag("Vectors of length 1.", "--normalize")] = False,
    model: Model = None,
    debug: Debug = False,
    load: LoadOptions,
) -> None:
    """Vectors of texts: the mean of the last hidden states, <bos> left out.

    --file has a JSON object a line with a "text"; the output has the same
    lines with an "embedding" beside it, or the vectors alone as .npy. No
    model of this family was trained to make them.
    """
    name = need_model(model, "--model NAME")
    if (text is None) == (file is None):
        raise ParameterError("give a text, or --file with JSON lines")
    if out is not None and out.suffix not in (".jsonl", ".npy"):
        raise ParameterError(f"--out is {out}; expected a name that ends in .jsonl or .npy")
    if text is not None:
        check_utf8(text, "the text")
    rows = [{"text": text}] if file is None else _rows(file)
    gemma = load.load(name)
    import numpy as np

    def vectors() -> Iterator[Any]:
        for start in range(0, len(rows), _TOGETHER):
            found = gemma.embed([row["text"] for row in rows[start : start + _TOGETHER]]).numpy()
            norms = np.linalg.norm(found, axis=1, keepdims=True)
            yield from found / norms if normalize else found

    def lines() -> Iterator[str]:
        for row, vector in zip(rows, vectors(), strict=True):
            yield json.dumps({**row, "embedding": [float(x) for x in vector]}, ensure_ascii=False)

    if out is None:
        for line in lines():
            print(line, flush=True)
    elif out.suffix == ".npy":
        found = np.stack(list(vectors()))
        _write(out, lambda part: np.save(part, found, allow_pickle=False))
        output.note(f"{out}: {len(found)} vectors of {found.shape[1]}")
    else:
        _write(out, lambda part: part.writelines(f"{line}\n".encode() for line in lines()))
        output.note(f"{out}: {len(rows)} lines")


@with_options
def probe(
    text: Text = None,
    *,
    file: File = None,
    out: Annotated[Path, option("The .npz file to write.", "--out", metavar="FILE")],
    top: Annotated[int, option("Tokens kept at each place. Else 5.", "--top", metavar="N")] = 5,
    no_hidden: Annotated[bool, flag("Leave the hidden states out.", "--no-hidden")] = False,
    model: Model = None,
    debug: Debug = False,
    load: LoadOptions,
) -> None:
    """Hidden states and the logit lens of a text, by layer, as .npz.

    The lens reads what each layer gives with the final norm and the head.
    The file has ids, hidden, top_ids, top_logprobs and target_logprobs.
    """
    name, text = need_model(model, "--model NAME"), _text(text, file)
    _positive(top, "--top")
    if out.suffix != ".npz":
        raise ParameterError(f"--out is {out}; expected a name that ends in .npz")
    gemma = load.load(name)
    import numpy as np

    from gemcut.uses.probe import probe as run

    found = run(gemma, gemma.encode(text), top=top, hidden=not no_hidden)
    _write(out, lambda part: np.savez(part, allow_pickle=False, **found.arrays()))
    for layer, ids in enumerate(found.top_ids[:, -1]):
        words = "  ".join(repr(gemma.tokenizer.decode([int(i)])) for i in ids)
        print(output.safe(f"{layer:>3}  {words}"))
    shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in found.arrays().items())
    output.note(f"{out}: {shapes}")


def _text(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise ParameterError("give a text, or --file FILE")
    if file is not None:
        return read_text_file(file)
    assert text is not None
    check_utf8(text, "the text")
    if not text:
        raise ParameterError("the text is empty")
    return text


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_text_file(path).split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = line
        if row is None:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"]:
            raise ParameterError(f'{path}, line {number}: expected a JSON object with a "text" that is not empty')
        rows.append(row)
    return rows


def _positive(value: int, name: str) -> None:
    if value < 1:
        raise ParameterError(f"{name} is {value}; expected at least 1")


def _write(path: Path, write: Any) -> None:
    """A file under its name once it is whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
