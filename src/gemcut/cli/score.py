"""``gemcut score``: what a text costs a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemcut.cli import output
from gemcut.cli.options import MODEL_HELP, Debug, LoadOptions, flag, need_model, option, with_options
from gemcut.errors import ParameterError
from gemcut.files import UnreadableError, read_bounded

#: A text of this size takes days on a CPU.
MAX_BYTES = 1 << 30


@with_options
def score(
    *,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help=MODEL_HELP)] = None,
    perplexity: Annotated[Path | None, option("A text file, UTF-8.", "--perplexity", metavar="FILE")] = None,
    window: Annotated[int, option("Tokens that are seen at once. Else the context.", "--window", metavar="N")] = 0,
    stride: Annotated[int, option("New tokens in each window. Else half of it.", "--stride", metavar="N")] = 0,
    as_json: Annotated[bool, flag("One JSON object.", "--json")] = False,
    debug: Debug = False,
    load: LoadOptions,
) -> None:
    """The perplexity of a text file.

    Example: [cyan]gemcut score -m gemma-3-270m --perplexity README.md[/]

    Every token is counted once, each with at least window - stride tokens
    before it (but in the first window), and <bos> in front of each window.
    """
    name = need_model(model, "--model NAME")
    if perplexity is None:
        raise ParameterError("nothing to score: pass --perplexity FILE")
    text = read_text(perplexity)
    gemma = load.load(name)
    from gemcut.evaluation.perplexity import text_perplexity
    from gemcut.evaluation.run import model_description

    found = text_perplexity(gemma, text, window=window, stride=stride)
    if as_json:
        output.print_json(
            {
                "model": model_description(gemma),
                "file": str(perplexity),
                "perplexity": found.perplexity,
                "word_perplexity": found.word_perplexity,
                "bits_per_byte": found.bits_per_byte,
                "tokens": found.tokens,
                "words": found.words,
                "bytes": found.bytes,
                "logprob": found.logprob,
                "window": found.window,
                "stride": found.stride,
            }
        )
        return
    print(f"perplexity        {found.perplexity:.3f} a token, {found.word_perplexity:.2f} a word")
    print(f"bits a byte       {found.bits_per_byte:.4f}")
    print(f"text              {found.tokens:,} tokens, {found.words:,} words, {found.bytes:,} bytes")
    print(f"window            {found.window:,} tokens, {found.stride:,} of them new in each")


def read_text(path: Path) -> str:
    """A text file. Raises ParameterError where it cannot be read, is no UTF-8, or is empty."""
    try:
        text = read_bounded(path, MAX_BYTES).decode()
    except OSError as error:
        raise ParameterError(f"cannot read {path}: {error.strerror or error}") from None
    except UnreadableError as error:
        raise ParameterError(f"cannot read {path}: it {error}") from None
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    if not text:
        raise ParameterError(f"{path} is empty; expected a text")
    return text
