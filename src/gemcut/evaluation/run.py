"""Asking a model rows' items and keeping every answer. A run that was stopped goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gemcut
from gemcut.errors import ContextLengthError, DataError, GemcutError, ParameterError
from gemcut.evaluation.asking import Asked, Asker
from gemcut.evaluation.figures import figures
from gemcut.evaluation.folder import DataFolder
from gemcut.evaluation.log import FORMAT, LogWriter, RowLog, RunLog, read_log
from gemcut.evaluation.requests import Answer
from gemcut.evaluation.row import Item, Row, ScoreOptions, Setup
from gemcut.evaluation.sandbox import sandbox_refusal
from gemcut.gemma import Gemma

#: Hears how far a row is: (row, answers that are there, of how many).
Progress = Callable[[Row, int, int], None]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How rows are run.

    Attributes:
        limit: items of each row, drawn by the seed; 0: all.
        setup: see Setup.
        fewer_shots: where prompts do not fit the context, take as many shots as do.
        scoring: see ScoreOptions; code that a model wrote is run only where it allows that.
    """

    limit: int = 0
    setup: Setup = field(default_factory=Setup)
    fewer_shots: bool = False
    scoring: ScoreOptions = field(default_factory=ScoreOptions)


def refusal(row: Row, data: DataFolder, options: RunOptions) -> GemcutError | None:
    """Why a row cannot be run here; None where it can. Asks no model."""
    if row.code and not options.scoring.allow_code:
        return ParameterError(
            f"{row.id} runs programs that the model wrote, in a sandbox; say --allow-code to allow that"
        )
    if row.code and (why := sandbox_refusal()):
        return ParameterError(f"{row.id} runs programs that the model wrote, and there is no sandbox here: {why}")
    if row.scorer and row.scorer not in options.scoring.scorers:
        return ParameterError(f"{row.id} needs a scorer of {row.scorer}: pass --scorer linear, FILE.npz or http://…")
    try:
        data.require(row.data)
    except DataError as error:
        return error
    return None


def model_description(gemma: Gemma) -> dict[str, Any]:
    """What a log says of the model: enough to know whether another run asked the same."""
    source, spec = gemma.source, gemma.model.quantization
    stored = ""
    if source is not None and source.expanded:
        stored = "+".join(f"{count} {name}" for name, count in sorted(source.expanded.items()))
    return {
        "name": source.name if source is not None else gemma.config.model_type,
        "revision": source.revision if source is not None else None,
        "parameters": gemma.config.num_parameters(),
        "dtype": str(gemma.dtype).removeprefix("torch."),
        "quantization": None if spec is None else dataclasses.asdict(spec) | {"format": spec.format},
        "stored": stored,
        "device": str(gemma.device),
        "context": gemma.engine.max_context,
    }


def choose(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """``limit`` items in their order, drawn by the seed so that a larger limit has those of a smaller one; 0: all."""
    if not 0 < limit < len(items):
        return list(items)
    drawn = sorted(items, key=lambda item: hashlib.sha256(f"{seed}\0{item.id}".encode()).digest())[:limit]
    wanted = {item.id for item in drawn}
    return [item for item in items if item.id in wanted]


def run_rows(
    gemma: Gemma,
    rows: Sequence[Row],
    data: DataFolder,
    out: Path,
    options: RunOptions,
    *,
    progress: Progress = lambda row, done, total: None,
    stopped: Callable[[], bool] = lambda: False,
    refused: Callable[[Row, GemcutError], None] | None = None,
) -> RunLog:
    """Ask all rows' items that the log in ``out`` does not have yet; the log afterwards.

    Args:
        refused: hears of rows that cannot be run, which are then left out; None: the first of them is raised, before
            anything is asked.
        stopped: asked between answers; once it says so KeyboardInterrupt is raised, and the log has all until then.

    Raises:
        DataError: ``out`` holds a run of something else, or data are missing or wrong.
        ContextLengthError: a row's prompts do not fit, and ``fewer_shots`` is not set.
    """
    if not options.limit >= 0:
        raise ParameterError(f"limit is {options.limit}; expected at least 1, or 0 for all")
    ready: list[_Plan] = []
    for row in rows:
        try:
            if (why := refusal(row, data, options)) is not None:
                raise why
            ready.append(_plan(gemma, row, data, options))
        except GemcutError as error:
            if refused is None:
                raise
            refused(row, error)
    said: dict[str, Any] = {
        "format": FORMAT,
        "gemcut": gemcut.__version__,
        "model": model_description(gemma),
        "seed": options.setup.seed,
        "limit": options.limit,
    }
    said = json.loads(json.dumps(said))  # as a log has it
    before = read_log(out) if (out / "log.jsonl").exists() else None
    if before is not None:
        _check_same(out, before.run, said)
    with LogWriter(out) as writer:
        if before is None:
            writer.add({"run": said | {"started": datetime.now(UTC).isoformat(timespec="seconds")}})
        for plan in ready:
            done = before.rows.get(plan.row.id) if before is not None else None
            _run_row(gemma, plan, writer, out, done, options, progress, stopped)
    return read_log(out)


@dataclass
class _Plan:
    """A row made ready: its items as token ids, and its line in the log."""

    row: Row
    items: list[Item]
    asked: list[Asked]
    asker: Asker
    header: dict[str, Any]


def _plan(gemma: Gemma, row: Row, data: DataFolder, options: RunOptions) -> _Plan:
    own = DataFolder(data.root)
    records = row.load(own)
    setup = replace(options.setup, shots=row.shots if options.setup.shots is None else options.setup.shots)
    asker = Asker(gemma, seed=setup.seed)
    while True:
        items = row.build(records, setup)
        if len({item.id for item in items}) != len(items):
            raise DataError(f"{row.id}: two items have the same id; expected each record once")
        chosen = choose(items, options.limit, setup.seed)
        asked = [asker.tokenize(item.request) for item in chosen]
        try:
            asker.check_lengths(asked, chosen)
            break
        except ContextLengthError as error:
            shots = setup.shots or 0
            if not options.fewer_shots or shots == 0:
                advice = f", or --fewer-shots to take fewer than {shots}" if shots else ""
                raise ContextLengthError(f"{row.id}: {error}: raise --max-context{advice}") from None
            setup = replace(setup, shots=shots - 1)
    header = {
        "row": row.id,
        "recipe": row.recipe(setup),
        "version": row.version,
        "shots": setup.shots,
        "chat": row.chat if setup.chat is None else setup.chat,
        "items": len(items),
        "expected": row.data.count,
        "asked": len(chosen),
        "data": {name: dataclasses.asdict(used) for name, used in sorted(own.used.items())},
    }
    return _Plan(row, chosen, asked, asker, header)


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise DataError where a run that is there was of something else."""
    for name in ("model", "seed", "limit"):
        if before.get(name) != now[name]:
            what = name
            if name == "model":
                what = next((f"model's {key}" for key in now[name] if before[name].get(key) != now[name][key]), name)
            raise DataError(f"{out} holds a run with another {what}; choose another --out, or remove it")


def _run_row(
    gemma: Gemma,
    plan: _Plan,
    writer: LogWriter,
    out: Path,
    before: RowLog | None,
    options: RunOptions,
    progress: Progress,
    stopped: Callable[[], bool],
) -> None:
    row, header = plan.row, plan.header
    if before is not None:
        different = [name for name in ("recipe", "shots", "data") if before.header.get(name) != header[name]]
        if different:
            raise DataError(
                f"{out} holds {row.id} with another {different[0]} ({before.header.get('recipe')}, now "
                f"{header['recipe']}); choose another --out, or remove it"
            )
        if before.done is not None:
            progress(row, len(plan.items), len(plan.items))
            return
    else:
        writer.add(header)
    known = {item.id for item in before.items} if before is not None else set()
    left = [(item, asked) for item, asked in zip(plan.items, plan.asked, strict=True) if item.id not in known]
    started, kept = time.perf_counter(), len(known)
    answers: list[Answer] = []
    progress(row, kept, len(plan.items))
    names = [f"{row.id}/{item.id}" for item, _ in left]
    for (item, _), answer in zip(left, plan.asker.answers([a for _, a in left], names, stopped), strict=False):
        answers.append(answer)
        if not row.harmful:
            writer.add_answer(row.id, item, answer)
        progress(row, kept + len(answers), len(plan.items))
    if len(answers) < len(left):
        raise KeyboardInterrupt
    if row.harmful:
        scores = row.score(plan.items, answers, options.scoring)
        found = {name: dataclasses.asdict(figure) for name, figure in figures(row, plan.items, scores).items()}
        writer.add({"row": row.id, "figures": found})
    counts = plan.asker.counts
    seconds = time.perf_counter() - started
    writer.add(
        {
            "row": row.id,
            "done": {"seconds": round(seconds, 3), "computed": counts.computed, "alone": counts.alone},
        }
    )
