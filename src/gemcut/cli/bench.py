"""``gemcut bench``: measure what a server does under load."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gemcut
from gemcut.cli import output
from gemcut.cli.files import read_bounded
from gemcut.cli.interrupt import cancelled_by_ctrl_c
from gemcut.cli.options import Debug, flag, option
from gemcut.errors import ParameterError, RequestError

if TYPE_CHECKING:
    from gemcut.bench.client import Asker, Outcome
    from gemcut.bench.figures import Limits
    from gemcut.bench.load import Round
    from gemcut.bench.traffic import Row

app = typer.Typer(
    name="bench",
    help="Measure a model on this machine, or a server under load.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_MAX_KEY = 64 << 10
_MAX_RATES = 32


@app.callback()
def _bench() -> None:
    """A group of commands."""


@app.command()
def serve(
    *,
    url: Annotated[str, typer.Option(metavar="URL", help="The server's address.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, option("Its name in requests. Else the one of /v1/models.", metavar="NAME")] = None,
    rate: Annotated[
        str | None, option("Requests a second, one round for each; inf: all at once. Else 1.", metavar="N,N,…")
    ] = None,
    requests: Annotated[int | None, option("Requests of each round. Else 40.", metavar="N")] = None,
    prompt_tokens: Annotated[str | None, option("Tokens of the prompts. Else 16-1024.", metavar="N|FROM-TO")] = None,
    output_tokens: Annotated[str | None, option("Most tokens of the answers. Else 8-128.", metavar="N|FROM-TO")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Another one gives other requests.")] = 0,
    trace: Annotated[Path | None, option("Send the requests of this file instead.", metavar="FILE")] = None,
    write_trace: Annotated[
        Path | None, option("Write the requests of the (one) round, send nothing.", metavar="FILE")
    ] = None,
    chat: Annotated[bool, flag("Send words to /v1/chat/completions; else ids to completions.", "--chat")] = False,
    extra: Annotated[
        str | None, option("Fields for every request, such as '{\"ignore_eos\": true}'.", metavar="JSON")
    ] = None,
    warmup: Annotated[int, typer.Option(metavar="N", help="Requests before, which do not count.")] = 1,
    ttft_limit: Annotated[float | None, option("A good answer begins within so many ms.", metavar="MS")] = None,
    tpot_limit: Annotated[float | None, option("A good answer takes at most so many ms a token.", metavar="MS")] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Most a request may take.")] = 600.0,
    api_key_file: Annotated[Path | None, option("A file with the API key.", metavar="FILE")] = None,
    insecure: Annotated[bool, flag("Take any TLS certificate.", "--insecure")] = False,
    json_file: Annotated[
        Path | None, option("Write all figures, and each request's.", "--json", metavar="FILE")
    ] = None,
    plot: Annotated[Path | None, option("Write a picture (needs matplotlib).", metavar="FILE.png")] = None,
    debug: Debug = False,
) -> None:
    """Send requests at random moments to an OpenAI address, and measure how it answers.

    Example: [cyan]gemcut bench serve --url http://127.0.0.1:8000 --rate 0.5,1,2[/]

    A request is sent when it is due, however many are under way (an open loop).
    Times count from that moment. TTFT: to the first text; TPOT: a token after it;
    ITL: between two pieces of text; e2e: to the end. Ctrl-C shows what was measured.
    """
    from gemcut.bench import traffic
    from gemcut.bench.client import Asker
    from gemcut.bench.figures import Limits
    from gemcut.bench.http import Address, Client
    from gemcut.picture import check_plot

    made = {"rate": rate, "requests": requests, "prompt-tokens": prompt_tokens, "output-tokens": output_tokens}
    if trace is not None and (given := [name for name, value in made.items() if value is not None]):
        raise ParameterError(f"--{given[0]} and --trace contradict each other: a trace has its own requests; drop one")
    rates = _rates("1" if rate is None else rate)
    prompt = _bounds("--prompt-tokens", "16-1024" if prompt_tokens is None else prompt_tokens)
    new = _bounds("--output-tokens", "8-128" if output_tokens is None else output_tokens)
    count = 40 if requests is None else requests
    _check("--requests", count, 1, traffic.MAX_REQUESTS)
    _check("--warmup", warmup, 0, 1000)
    for name, value in (("--timeout", timeout), ("--ttft-limit", ttft_limit), ("--tpot-limit", tpot_limit)):
        if value is not None and not 0 < value < 1e9:
            raise ParameterError(f"{name} is {value:g}; expected a number above 0")
    if trace is not None and write_trace is not None:
        raise ParameterError("--trace and --write-trace contradict each other: a trace is read, or written")
    if trace is not None and chat:
        raise ParameterError("--chat sends words, and a trace has token ids; leave one of the two out")
    plans: list[tuple[float | None, list[Row]]]
    if trace is not None:
        plans = [(None, read := traffic.read_trace(trace))]
        lengths, answers = [len(row.prompt) for row in read], [row.new for row in read]
        prompt, new = (min(lengths), max(lengths)), (min(answers), max(answers))  # for the requests before
    else:
        plans = [(each, traffic.make_trace(each, count, prompt, new, seed, i)) for i, each in enumerate(rates)]
    if write_trace is not None:
        if len(plans) > 1:
            raise ParameterError(f"--write-trace writes one round; --rate names {len(plans)}")
        _write(write_trace, lambda path: traffic.write_trace(path, plans[0][1]))
        return
    if plot is not None:
        check_plot(plot)
    address = Address.parse(url)
    client = Client(address, _key(api_key_file), insecure=insecure)
    limits = Limits(*(None if limit is None else limit / 1000 for limit in (ttft_limit, tpot_limit)))
    asker = Asker(client, model or "", "chat" if chat else "completions", _extra(extra), timeout)
    warm = traffic.make_trace(math.inf, warmup, prompt, new, seed, -1)
    asker, rounds = _measure(asker, str(address), warm, plans)
    _show(str(address), asker.model, rounds, limits)
    if json_file is not None:
        report = _report(str(address), asker, seed, rounds, limits)
        _write(json_file, lambda path: path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"))
    if plot is not None and any(found.outcomes for found in rounds):
        from gemcut.bench.figures import summary
        from gemcut.bench.plot import plot as draw

        measured = [summary(found, limits) for found in rounds if found.outcomes]
        draw(plot, measured, f"{asker.model} at {address}")
    if rounds and rounds[-1].cut:
        raise KeyboardInterrupt
    every = [outcome for found in rounds for outcome in found.outcomes]
    if all(outcome.error for outcome in every):
        raise RequestError(f"no request to {address} went well; the last one: {every[-1].message}")


def _measure(
    asker: Asker, address: str, warm: list[Row], plans: list[tuple[float | None, list[Row]]]
) -> tuple[Asker, list[Round]]:
    """Run the rounds; those that Ctrl-C left out are missing. Raises RequestError where the server answers nothing."""
    import asyncio
    import dataclasses

    from gemcut.bench.client import served_model, timer
    from gemcut.bench.http import BrokenAnswerError, ConnectionFailedError
    from gemcut.bench.load import send_round

    async def begin(asker: Asker) -> Asker:
        try:
            if not asker.model:
                asker = dataclasses.replace(asker, model=await served_model(asker.client, min(30, asker.timeout)))
        except ConnectionFailedError as error:
            raise RequestError(
                f"no connection to {address}: {error}; start the server, or name it with --url"
            ) from None
        except (BrokenAnswerError, ValueError) as error:
            raise RequestError(f"{address} is no OpenAI server: {error}") from None
        except TimeoutError:
            raise RequestError(f"{address} does not answer /v1/models") from None
        for row in warm:
            outcome = await asker.ask(row, timer())
            if outcome.error == "no connection":
                raise RequestError(f"no connection to {address}: {outcome.message}; is it the right --url?")
            if outcome.error:
                raise RequestError(f"the first request to {address} failed: {outcome.message}")
        return asker

    async def run(asker: Asker) -> tuple[Asker, list[Round]]:
        rounds: list[Round] = []
        with cancelled_by_ctrl_c():
            asker = await begin(asker)
            for rate, rows in plans:
                with _Progress(rate, len(rows)) as bar:
                    rounds.append(await send_round(asker, rows, rate, bar))
                if rounds[-1].cut:
                    break
        asker.client.close()
        return asker, rounds

    try:
        return asyncio.run(run(asker))
    except asyncio.CancelledError:  # before the first round
        raise KeyboardInterrupt from None


class _Progress:
    """How far a round is, on a terminal's standard error."""

    def __init__(self, rate: float | None, planned: int) -> None:
        self._name = "trace" if rate is None else f"rate {rate:g}"
        self._planned, self._done, self._failed = planned, 0, 0
        self._shown = output.is_terminal(sys.stderr)

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, outcome: Outcome) -> None:
        self._done += 1
        self._failed += bool(outcome.error)
        if self._shown:
            failed = f", {self._failed} failed" if self._failed else ""
            print(f"\r\x1b[K{self._name}: {self._done} of {self._planned}{failed}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _show(address: str, model: str, rounds: list[Round], limits: Limits) -> None:
    """The table, and what to know about it."""
    from rich.table import Table
    from rich.text import Text

    from gemcut.bench.figures import SHARES, summary

    found = [summary(each, limits) for each in rounds]
    table = Table(title=Text(f"{model} at {address}"), title_justify="left", title_style="bold", box=None)
    table.add_column("requests a second")
    for each in found:
        name = "trace" if each["rate"] is None else "all at once" if each["rate"] == math.inf else f"{each['rate']:g}"
        table.add_column(name, justify="right")

    def row(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    row("whole answers", [f"{each['good']} of {each['planned']}" for each in found])
    row("answers a second", [_number(each["requests_per_second"]) for each in found])
    if limits.ttft is not None or limits.tpot is not None:
        row("good ones a second", [_number(each["goodput"]) for each in found])
    row("output tokens a second", [_number(each["output_tokens_per_second"]) for each in found])
    row("prompt tokens a second", [_number(each["prompt_tokens_per_second"]) for each in found])
    row("under way at once, most", [str(each["most_at_once"]) for each in found])
    for key, name in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("itl_ms", "ITL"), ("e2e_ms", "e2e")):
        for share in SHARES:
            row(f"{name} {share}, ms", [_number(each[key][share]) for each in found])
    output.console(width=None if output.is_terminal(sys.stdout) else 200).print(table)
    for each, one in zip(found, rounds, strict=True):
        _remark(each, one)


def _remark(found: dict[str, Any], one: Round) -> None:
    where = "the trace" if found["rate"] is None else f"rate {found['rate']:g}"
    for kind, count in found["errors"].items():
        example = next(outcome.message for outcome in one.outcomes if outcome.error == kind)
        print(output.safe(f"{where}: {count} × {kind}: {example}"))
    if found["cut"]:
        print(f"{where}: stopped; {found['planned'] - found['ended']} of {found['planned']} requests had not ended")
    if found["client_late_ms"] > 50:
        print(f"{where}: this program sent requests up to {found['client_late_ms']:.0f} ms late; the machine is busy")
    if found["cached_tokens"]:
        share = found["cached_tokens"] / max(1, found["prompt_tokens"])
        print(f"{where}: the server had {share:.0%} of the prompts' tokens in its cache; take another --seed")


def _report(address: str, asker: Asker, seed: int, rounds: list[Round], limits: Limits) -> dict[str, Any]:
    from gemcut.bench.figures import as_json, finite, summary

    return {
        "gemcut": gemcut.__version__,
        "url": address,
        "model": asker.model,
        "endpoint": asker.endpoint,
        "extra": dict(asker.extra),
        "seed": seed,
        "ttft_limit_ms": None if limits.ttft is None else 1000 * limits.ttft,
        "tpot_limit_ms": None if limits.tpot is None else 1000 * limits.tpot,
        "rounds": [
            finite({**summary(each, limits), "requests": [as_json(outcome) for outcome in each.outcomes]})
            for each in rounds
        ],
    }


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not 0 < len(rates) <= _MAX_RATES or not all(rate == math.inf or 1e-3 <= rate <= 1e6 for rate in rates):
        raise ParameterError(f"--rate is {text!r}; expected numbers from 0.001 to 1,000,000 or inf, such as 0.5,1,2")
    return rates


def _bounds(name: str, text: str) -> tuple[int, int]:
    from gemcut.bench.traffic import MAX_TOKENS

    least, dash, most = text.partition("-")
    try:
        found = (int(least), int(most if dash else least))
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1] <= MAX_TOKENS:
        raise ParameterError(f"{name} is {text!r}; expected a number such as 128, or two such as 16-1024")
    return found


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ParameterError(f"{name} is {value}; expected {low} to {high:,}")


def _extra(text: str | None) -> dict[str, Any]:
    from gemcut.files import UnreadableError, parse_json

    if text is None:
        return {}
    try:
        found = parse_json(text)
    except UnreadableError as error:
        raise ParameterError(f"--extra {error}; expected a JSON object") from None
    if not isinstance(found, dict):
        raise ParameterError('--extra is no JSON object; expected one such as {"ignore_eos": true}')
    taken = sorted({"stream", "stream_options", "prompt", "messages", "model"} & set(found))
    if taken:
        raise ParameterError(f"--extra sets {', '.join(taken)}, which the measurement needs as it is")
    return found


def _key(path: Path | None) -> str:
    if path is None:
        return ""
    lines = read_bounded(path, _MAX_KEY).decode("utf-8", "replace").split("\n")
    key = next((line.strip() for line in lines if line.strip() and not line.startswith("#")), "")
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ParameterError(f"{path} holds no API key; expected one in its first line")
    return key


def _write(path: Path, write: Any) -> None:
    try:
        write(path)
    except OSError as error:
        raise ParameterError(f"cannot write {path}: {error.strerror or error}") from None
