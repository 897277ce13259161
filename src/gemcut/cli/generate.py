"""``gemcut generate``: continue a text."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcut.cli import output
from gemcut.cli.interrupt import import_torch
from gemcut.cli.options import (
    MODEL_HELP,
    TOKEN_BYTES,
    Debug,
    LoadOptions,
    SamplingOptions,
    Schema,
    WatermarkKey,
    flag,
    need_model,
    with_options,
)
from gemcut.errors import ParameterError
from gemcut.files import UnreadableError, read_bounded

if TYPE_CHECKING:
    from gemcut.engine.grammar import Grammar
    from gemcut.engine.results import Completion
    from gemcut.gemma import Gemma
    from gemcut.sampling_defaults import ResolvedSampling

#: The largest context of a Gemma 2 or 3 is 131,072 tokens, and their longest token has 48 bytes of text: whatever is
#: longer fits no context, so reading on is in vain.
MAX_PROMPT_BYTES = 131_072 * TOKEN_BYTES
# Bytes of standard input that are read before the model is looked at, whose context then says how much more is.
_FIRST_BYTES = 1 << 18


@with_options
def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; - or nothing reads standard input.")
    ] = None,
    *,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help=MODEL_HELP)] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", metavar="PATH", help="Read the prompt from it.")] = None,
    show_prompt: Annotated[bool, flag("Print the prompt before the answer.", "--show-prompt")] = False,
    stats: Annotated[bool, flag("Times and tokens at the end, on standard error.", "--stats")] = False,
    as_json: Annotated[bool, flag("One JSON object at the end, no streaming.", "--json")] = False,
    logprobs: Annotated[
        int | None, typer.Option(metavar="N", help="With --json: log-probabilities, and the N likeliest others.")
    ] = None,
    schema: Schema = None,
    watermark_key: WatermarkKey = None,
    debug: Debug = False,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """Continue a text, as raw text without a chat format.

    Example: [cyan]gemcut generate -m gemma-3-270m -t 0 "The sky is"[/]

    The prompt may also be a file or piped; one newline at its end is dropped.
    """
    name = need_model(model, "--model NAME")
    if logprobs is not None and not as_json:
        raise ParameterError("--logprobs shows its numbers in JSON alone; add --json")
    text = read_prompt(prompt, file, partial(load.most_bytes, name))
    fields, levels = sampling.fields(logprobs=logprobs, grammar=read_schema(schema)), sampling.levels()
    mark = read_mark(watermark_key)
    gemma = load.load(name)
    gemma.sampling_levels[:0] = levels
    ids = gemma.encode(text)
    used = gemma.resolve_sampling(len(ids), fields | mark)
    with gemma.stream_ids(ids, used.params) as stream:
        if as_json:
            completion = stream.result.checked()
            output.print_json(answer_report(gemma, completion, used, text if show_prompt else None))
        else:
            tidy = output.safe if output.is_terminal(sys.stdout) else str  # a pipe gets the text as it is
            if show_prompt:
                sys.stdout.write(output.styled(tidy(text), "prompt", sys.stdout))
                sys.stdout.flush()
            output.write_pieces(stream, tidy, begun=show_prompt)
            completion = stream.result
            note_closed(completion, used)
    if stats:
        output.print_stats(gemma, completion, used)


def read_mark(path: Path | None) -> dict[str, Any]:
    """The field of SamplingParams for the key in a file; {} for none. Raises ParameterError."""
    if path is None:
        return {}
    from gemcut.safety.watermark import Watermark

    return {"watermark": Watermark.read(path)}


def read_schema(path: Path | None) -> Grammar | None:
    """The grammar of a file with a JSON schema. Raises ParameterError that names the file."""
    if path is None:
        return None
    import_torch()
    from gemcut.engine.grammar import MAX_BYTES, Grammar

    try:
        return Grammar.json_schema(decode(read_bounded(path, MAX_BYTES), str(path)))
    except OSError as error:
        raise ParameterError(f"cannot read {path}: {error.strerror or error}") from None
    except UnreadableError as error:
        raise ParameterError(f"cannot read {path}: it {error}") from None
    except ParameterError as error:
        raise ParameterError(f"--schema {path}: {error}") from None


def note_closed(completion: Completion, used: ResolvedSampling) -> None:
    """Say that an answer under a schema could have been longer."""
    if used.params.grammar is not None and completion.finish_reason == "length":
        output.note(
            f"note: after {used.params.max_new_tokens} tokens the answer was closed; --max-new-tokens gives it more"
        )


def read_prompt(argument: str | None, file: Path | None, most_bytes: Callable[[], int]) -> str:
    """The prompt from where it was given: the argument, a file, or standard input (see `read_stdin`).

    Raises ParameterError where there are two, none, nothing in it, or bytes that are not UTF-8.
    """
    if argument not in (None, "-") and file is not None:
        raise ParameterError("the prompt was given twice, as an argument and as --file; drop one")
    if file is not None and str(file) != "-":
        try:
            text = decode(read_bounded(file, MAX_PROMPT_BYTES), str(file))
        except OSError as error:
            raise ParameterError(f"cannot read {file}: {error.strerror or error}") from None
        except UnreadableError as error:
            raise ParameterError(f"cannot read {file}: it {error}") from None
    elif argument is None or argument == "-":
        if argument is None and file is None and output.is_terminal(sys.stdin):
            raise ParameterError('no prompt: give it as an argument ("The sky is"), with --file PATH, or pipe it in')
        text = decode(read_stdin(most_bytes), "standard input")
    else:
        text = decode(os.fsencode(argument), "the prompt argument", trim=False)
    if not text.strip():
        raise ParameterError("the prompt is empty; give some text to continue")
    return text


def read_stdin(most_bytes: Callable[[], int]) -> bytes:
    """All of standard input, a pipe that may never end; of a long one at most as much as the model's context can hold.

    ``most_bytes`` gives that number, and is called for a long input alone. Raises ParameterError where there is more,
    or it is closed.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise ParameterError('standard input is closed; give the prompt as an argument ("The sky is") or pipe it in')
    data = sys.stdin.buffer.read(_FIRST_BYTES)
    if len(data) < _FIRST_BYTES:
        return data
    limit = min(most_bytes(), MAX_PROMPT_BYTES)
    data += sys.stdin.buffer.read(max(0, limit + 1 - len(data)))
    if len(data) > limit:
        raise ParameterError(
            f"standard input has more than {limit:,} bytes, more than {limit // TOKEN_BYTES:,} tokens of context can "
            "hold; give less"
        )
    return data


def decode(data: bytes, where: str, *, trim: bool = True) -> str:
    """UTF-8 text without a byte order mark and, where ``trim``, without the newline that ends every file."""
    try:
        text = data.decode("utf-8").removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    except UnicodeDecodeError as error:
        raise ParameterError(
            f"{where} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert it first"
        ) from None
    return text.removesuffix("\n").removesuffix("\r") if trim and text.endswith("\n") else text


def answer_report(
    gemma: Gemma, completion: Completion, used: ResolvedSampling, prompt: str | None = None
) -> dict[str, Any]:
    """One answer for --json: its text, how it ended, what it was sampled with, and times."""
    report: dict[str, Any] = {
        "model": gemma.source.name if gemma.source is not None else None,
        "device": str(gemma.device),
        "dtype": str(gemma.dtype).removeprefix("torch."),
        "text": completion.text,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "sampling": used.report(),
        "timings": output.timings(gemma, completion),
    }
    if completion.refusal is not None:
        report["refusal"] = completion.refusal
    if completion.moderation is not None:
        report["moderation"] = completion.moderation
    if prompt is not None:
        report["prompt"] = prompt
    if completion.logprobs is not None:
        token = gemma.tokenizer.token_name
        report["logprobs"] = [
            {
                "token": token(entry.token_id),
                "token_id": entry.token_id,
                "logprob": entry.logprob,
                "top": [{"token": token(i), "token_id": i, "logprob": value} for i, value in entry.top],
            }
            for entry in completion.logprobs
        ]
    return report
