"""A model's own card: what is known of it from its files, its data report, its training record and the runs of it.

Nothing is claimed without a measurement behind it: where there is none, the card says NOT_MEASURED.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemcut.checkpoint.licence import GEMMA_NOTICE
from gemcut.checkpoint.source import Source
from gemcut.citation import bibtex
from gemcut.errors import DataError
from gemcut.evaluation.figures import compare
from gemcut.evaluation.log import NAME, RunLog, read_log
from gemcut.evaluation.registry import CARD, all_rows
from gemcut.evaluation.results import RowResult, score_run
from gemcut.evaluation.row import ScoreOptions
from gemcut.files import UnreadableError, read_json

FORMAT = 1
NOT_MEASURED = "not measured"
TRAINING = "training.json"
#: What a training record may say; all of it may be missing.
_TRAINING_KEYS: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "hardware": (str,),
    "devices": (int,),
    "watts": (int, float),
    "seconds": (int, float),
    "tokens": (int,),
    "parameters": (int,),
    "software": (dict,),
    "pue": (int, float),
}


@dataclass
class Runs:
    """Runs of a folder: those of the model that the card is of, and those of others."""

    own: list[tuple[RunLog, dict[str, RowResult]]] = field(default_factory=list)
    others: list[tuple[RunLog, dict[str, RowResult]]] = field(default_factory=list)
    reports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def read_runs(folder: Path, name: str) -> Runs:
    """Every run and every report (memorization, canaries) below a folder.

    Args:
        name: of the model, as its source has it.

    Raises:
        DataError: there is none, one is damaged, or its answers are of another recipe than this gemcut's.
    """
    found = Runs()
    for path in sorted(folder.rglob(NAME)):
        log = read_log(path.parent)
        own = Path(str(log.run["model"]["name"])).name == Path(name).name
        (found.own if own else found.others).append((log, score_run(log, ScoreOptions(), again=False)))
    for path in sorted(folder.rglob("*.json")):
        try:
            kind = found_report(path)
        except (OSError, UnreadableError):
            continue
        if kind is not None and Path(str(kind["model"]["name"])).name == Path(name).name:
            found.reports.setdefault(kind["kind"], []).append(kind)
    if not (found.own or found.others or found.reports):
        raise DataError(f"{folder} holds no run of gemcut eval; gemcut eval run --out writes one")
    return found


def found_report(path: Path) -> dict[str, Any] | None:
    """The report in a file; None where it is something else. Raises OSError and UnreadableError."""
    data = read_json(path)
    good = isinstance(data, dict) and data.get("kind") in ("memorization", "canaries")
    return data if good and isinstance(data.get("model"), dict) and "name" in data["model"] else None


def read_training(folder: Path) -> dict[str, Any]:
    """``training.json`` of a folder: hardware, devices, watts of each, seconds, tokens, parameters, software.

    Raises DataError where it is missing, or a value is of another kind.
    """
    path = folder / TRAINING
    try:
        data = read_json(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except UnreadableError as error:
        raise DataError(f"{path} {error}") from None
    if not isinstance(data, dict) or data.get("version") != FORMAT:
        raise DataError(f"{path} is no record of a training run of version {FORMAT}")
    for key, kinds in _TRAINING_KEYS.items():
        value = data.get(key)
        wrong = value is not None and (isinstance(value, bool) or not isinstance(value, kinds))
        if wrong or (isinstance(value, int | float) and not 0 <= value < math.inf):
            named: dict[type, str] = {str: "a text", dict: "an object"}
            words = named.get(kinds[0], "a number of at least 0")
            raise DataError(f"{path}: {key} is {value!r}; expected {words}")
    return data


def training_estimates(record: Mapping[str, Any]) -> dict[str, float]:
    """What follows by arithmetic: ``flops`` = 6 · parameters · tokens; ``energy_kwh`` = devices · watts · hours · PUE.

    Only what all its numbers are there for. The energy is that of the devices at the stated power, not measured.
    """
    found: dict[str, float] = {}
    if record.get("parameters") and record.get("tokens"):
        found["flops"] = 6.0 * record["parameters"] * record["tokens"]
    if record.get("seconds"):
        if record.get("devices") and record.get("watts"):
            power = record["devices"] * record["watts"] * record.get("pue", 1.0)
            found["energy_kwh"] = power * record["seconds"] / 3.6e6
        if "flops" in found:
            found["flops_per_second"] = found["flops"] / record["seconds"]
    return found


def make_card(
    source: Source,
    *,
    runs: Runs | None = None,
    data: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    tuned: bool = False,
) -> dict[str, Any]:
    """Everything the card says, as JSON values.

    Args:
        source: the model's files; only configuration and tokenizer are read.
        runs: see `read_runs`.
        data: the report of `gemcut data`.
        training: see `read_training`.
        tuned: whether it is instruction-tuned.
    """
    config = source.config()
    runs = runs or Runs()
    tables = {False: _table(runs, safety=False), True: _table(runs, safety=True)}
    return {
        "format": FORMAT,
        "model": {
            "name": source.name,
            "revision": source.revision,
            "architecture": config.model_type,
            "parameters": config.num_parameters(),
            "layers": config.num_hidden_layers,
            "context": config.max_position_embeddings,
            "vocabulary": config.vocab_size,
            "instruction_tuned": tuned,
        },
        # Weights that somebody trained are theirs to license.
        "licence": {"notice": None if data is not None or training is not None else GEMMA_NOTICE},
        "citation": bibtex(),
        "data": _data(data),
        "training": None if training is None else {**training, "estimates": training_estimates(training)},
        "benchmarks": tables[False],
        "safety": tables[True],
        "memorization": runs.reports.get("memorization", []),
        "canaries": runs.reports.get("canaries", []),
        "benefits": _benefits(runs),
        "metadata": metadata(source.name, tables, trained=data is not None or training is not None),
    }


def _table(runs: Runs, *, safety: bool) -> list[dict[str, Any]]:
    """One entry a run of each row; a row of Google's card without a run has one without a figure."""
    known = all_rows()
    entries = []
    names = [name for name in known if known[name].safety == safety]
    for name in names:
        row = known[name]
        card = {key: value for key, value in dataclasses.asdict(row.card).items() if value is not None}
        base = {"id": name, "title": row.title, "setting": row.setting, "card": card}
        found = [(log, results[name]) for log, results in runs.own if name in results]
        for log, result in found:
            model, figure = log.run["model"], result.figure
            span = None
            if figure is not None and figure.error is not None:
                span = [figure.value - 1.96 * figure.error, figure.value + 1.96 * figure.error]
            entries.append(
                {
                    **base,
                    "form": _form(model),
                    "ours": None if figure is None else dataclasses.asdict(figure),
                    "interval": span,
                    "others": {key: dataclasses.asdict(each) for key, each in result.figures.items()},
                    "recipe": result.log.header["recipe"],
                    "comparable": result.comparable,
                    "why": result.differences(),
                }
            )
        if not found and name in CARD:
            entries.append({**base, "form": "", "ours": None, "others": {}, "recipe": "", "why": [NOT_MEASURED]})
    return entries


def _form(model: Mapping[str, Any]) -> str:
    spec = model.get("quantization")
    form = spec.get("format") if isinstance(spec, dict) else spec
    stored = f" (from {model['stored']})" if model.get("stored") else ""
    return f"{form or model.get('dtype')}{stored}"


def _data(report: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Sources, licences, tokens, what was dropped and why, and hits of decontamination, of `gemcut data`'s report."""
    if report is None:
        return None
    dropped: dict[str, dict[str, int]] = {}
    notes: dict[str, Any] = {}
    try:
        for step in report["steps"]:
            for flow in step["sources"].values():
                for reason, count in flow["dropped"].items():
                    own = dropped.setdefault(step["name"], {})
                    own[reason] = own.get(reason, 0) + count["documents"]
            if step["notes"]:
                notes[step["name"]] = step["notes"]
        return {
            "name": report["name"],
            "recipe_sha256": report["recipe_sha256"],
            "sources": {
                name: {key: source[key] for key in ("licence", "documents_in", "documents_out", "bytes_out")}
                for name, source in report["sources"].items()
            },
            "licences": report["licences"],
            "totals": report["totals"],
            "tokens": None if report["tokens"] is None else report["tokens"]["tokens"],
            "dropped": dropped,
            "notes": notes,
            "alarms": report["alarms"],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the report of the data lacks {error}; gemcut data run writes a whole one") from None


def _benefits(runs: Runs) -> list[dict[str, Any]]:
    """Paired comparisons with other models over the items that both were asked by the same recipe."""
    found = []
    for own_log, own in runs.own:
        for other_log, other in runs.others:
            for name in own:
                if name not in other or own[name].log.header["recipe"] != other[name].log.header["recipe"]:
                    continue
                one, two = (_values(results[name]) for results in (own, other))
                if one.keys() & two.keys():
                    found.append(
                        {
                            "row": name,
                            "model": _form(own_log.run["model"]),
                            "other": f"{other_log.run['model']['name']}, {_form(other_log.run['model'])}",
                            **dataclasses.asdict(compare(two, one)),
                        }
                    )
    return found


def _values(result: RowResult) -> dict[str, float]:
    metric = result.row.metric
    return {i.id: s.values[metric] for i, s in zip(result.items, result.scores, strict=True) if metric in s.values}


def metadata(name: str, tables: Mapping[bool, Sequence[Mapping[str, Any]]], *, trained: bool = False) -> dict[str, Any]:
    """The block that the Hugging Face hub reads: library, licence, task, and the results as a model index."""
    results = []
    for entry in (*tables[False], *tables[True]):
        if entry["ours"] is not None:
            results.append(
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"name": entry["title"], "type": entry["id"]},
                    "metrics": [{"name": entry["setting"], "type": "score", "value": round(entry["ours"]["value"], 2)}],
                }
            )
    found: dict[str, Any] = {
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gemma", "gemcut"],
    }
    if not trained:
        found["license"] = "gemma"
    if results:
        found["model-index"] = [{"name": Path(name).name, "results": results}]
    return found
