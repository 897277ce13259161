"""``gemcut bench model``: how fast a model is on this machine."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gemcut.cli import output
from gemcut.cli.options import MODEL_HELP, Debug, LoadOptions, flag, need_model, option, with_options
from gemcut.errors import ParameterError

_MOST = 1 << 10


@with_options
def model(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    *,
    prompt_tokens: Annotated[int, option("Tokens of a prompt. Else 512.", "--prompt-tokens", metavar="N")] = 512,
    output_tokens: Annotated[int, option("Tokens of an answer. Else 64.", "--output-tokens", metavar="N")] = 64,
    batch: Annotated[str, option("Requests at once: 1,4,16. Else 1.", "--batch", metavar="N,N,…")] = "1",
    repeat: Annotated[int, option("Repetitions, after one that does not count. Else 3.", "--repeat", metavar="N")] = 3,
    as_json: Annotated[bool, flag("One JSON object with every repetition.", "--json")] = False,
    debug: Debug = False,
    load: LoadOptions,
) -> None:
    """Measure how fast a model reads prompts and writes answers here.

    Medians of tokens a second, with the least and the most. What the memory
    allows is the speed at which it can be read, measured before and after
    each round, over the bytes of the weights: one answer alone cannot be faster.
    """
    name = need_model(name, "gemcut bench model MODEL")
    try:
        batches = [int(part) for part in batch.split(",")]
    except ValueError:
        batches = [0]
    if not all(1 <= each <= _MOST for each in batches):
        raise ParameterError(f"--batch is {batch!r}; expected numbers from 1 to {_MOST}, such as 1,4,16")
    for what, value, low in (
        ("--prompt-tokens", prompt_tokens, 1),
        ("--output-tokens", output_tokens, 2),
        ("--repeat", repeat, 1),
    ):
        if value < low:
            raise ParameterError(f"{what} is {value}; expected at least {low}")
    gemma = load.load(name)
    from gemcut.uses.speed import Speed, measure, median, read_bandwidth, weight_bytes

    drawn = output.is_terminal(sys.stderr)

    def heard(done: int, known: int) -> None:
        if drawn:
            print(f"\r{done} of {known} ", end="\n" if done == known else "", file=sys.stderr, flush=True)

    nbytes, bandwidth = weight_bytes(gemma), read_bandwidth(gemma.device)
    found = []
    for each in batches:
        found.append(
            measure(gemma, prompt=prompt_tokens, new=output_tokens, batch=each, repetitions=repeat, heard=heard)
        )
        bandwidth = max(bandwidth, read_bandwidth(gemma.device))
    limit = bandwidth / nbytes
    if as_json:
        rows = [
            {
                "batch": own.batch,
                "prefill_tokens_per_second": own.prefill,
                "first_token_seconds": own.first,
                "decode_tokens_per_second": own.decode,
            }
            for own in found
        ]
        output.print_json(
            {
                "model": repr(gemma),
                "prompt_tokens": prompt_tokens,
                "output_tokens": output_tokens,
                "weight_bytes": nbytes,
                "read_bytes_per_second": bandwidth,
                "steps_per_second_limit": limit,
                "rounds": rows,
            }
        )
        return

    def shown(values: list[float], digits: int) -> str:
        return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"

    def line(own: Speed) -> str:
        share = median(own.decode) / own.batch / limit
        return (
            f"{own.batch:>5}  {shown(own.prefill, 0):>24}  {shown(own.first, 3):>22}  {shown(own.decode, 1):>22}  "
            f"{share:>8.0%}"
        )

    print(output.safe(repr(gemma)))
    print(f"{prompt_tokens} tokens a prompt, {output_tokens} an answer; median (least–most) of {repeat}")
    reads = f"memory read at {bandwidth / 1e9:.1f} GB/s"
    print(f"weights {output.gigabytes(nbytes)}, {reads}: at most {limit:,.1f} steps a second")
    print(f"{'batch':>5}  {'prompt tok/s':>24}  {'first token, s':>22}  {'new tok/s':>22}  {'of limit':>8}")
    for own in found:
        print(line(own))
    if any(median(own.decode) / own.batch > limit for own in found):
        output.note("more than the limit: the memory was read while the machine did other work; measure once more")
