"""What a run did, from the counts of its parts: ``report.json``, and a page for people."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gemcut.data.packages import Package
from gemcut.data.parts import Part, divide
from gemcut.data.plots import svg
from gemcut.data.recipe import Recipe
from gemcut.data.run import READ, stages
from gemcut.data.steps import Flow
from gemcut.data.store import AtomicFile, read_json, write_json
from gemcut.data.tokens.reader import INDEX
from gemcut.errors import DataError

VERSION = 1
_EXAMPLES = 3


def write_report(recipe: Recipe, out: Path) -> dict[str, Any]:
    """The report of a finished run, also as ``out/report.json`` and ``out/report.html``.

    It holds no times and no paths of the machine: equal runs give equal bytes.
    """
    report = make_report(recipe, divide(recipe), out)
    write_json(out / "report.json", report)
    with AtomicFile(out / "report.html") as file:
        file.write(page(report).encode())
    return report


def read_report(out: Path) -> dict[str, Any]:
    """The report of the run in ``out``. Raises DataError where there is none."""
    path = out / "report.json"
    if not path.is_file():
        raise DataError(f"there is no report at {path}; `gemcut data run` writes it when a run is finished")
    report = read_json(path)
    if not isinstance(report, dict) or report.get("version") != VERSION:
        raise DataError(f"{path} is no report of this version of gemcut")
    return report


def make_report(recipe: Recipe, parts: Iterable[Part], out: Path) -> dict[str, Any]:
    """The counts of all parts added up, with alarms, licences and hashes."""
    chain = stages(recipe)
    parts = list(parts)
    flows: dict[str, dict[str, Flow]] = {name: {} for name in (READ, *(spec.name for spec in recipe.steps))}
    notes: dict[str, dict[str, int]] = {}
    examples: dict[str, dict[str, list[str]]] = {}
    licences: dict[str, int] = {}
    for stage in chain:
        for part in parts:
            counts = read_json(out / "work" / f"stage-{stage.number}" / f"{part.number:05d}.json")
            for licence, size in counts["licences"].items():
                licences[licence] = licences.get(licence, 0) + size
            for step, flow in counts["flows"].items():
                flows[step].setdefault(part.source, Flow()).merge(Flow.from_dict(flow))
            for step, some in counts["notes"].items():
                for name, count in some.items():
                    notes.setdefault(step, {})[name] = notes.setdefault(step, {}).get(name, 0) + count
            for step, reasons in counts["examples"].items():
                for reason, ids in reasons.items():
                    known = examples.setdefault(step, {}).setdefault(reason, [])
                    known += [f"{part.source}/{id}" for id in ids[: _EXAMPLES - len(known)]]
        if stage.closing is not None:
            decided = read_json(out / "work" / f"stage-{stage.number}" / "decision" / "decided.json")
            notes.setdefault(decided["step"], {}).update(decided["notes"])
    names = list(flows)
    sources = {source.name: _source(recipe, source.name, parts, flows, names) for source in recipe.sources}
    reasons = {spec.name: spec.reason for spec in recipe.steps if spec.reason}
    return {
        "version": VERSION,
        "name": recipe.name,
        "recipe_sha256": recipe.digest,
        "seed": recipe.seed,
        "sources": sources,
        "steps": [
            {
                "name": name,
                "sources": {source: flow.as_dict() for source, flow in sorted(flows[name].items())},
                "notes": dict(sorted(notes.get(name, {}).items())),
                "examples": examples.get(name, {}),
                "reason": reasons.get(name, ""),
            }
            for name in names
        ],
        "totals": {
            key: sum(source[key] for source in sources.values())
            for key in ("documents_in", "bytes_in", "documents_out", "bytes_out")
        },
        "licences": {name or "not stated": size for name, size in sorted(licences.items())},
        "alarms": [*_alarms(flows, sources), *(f"{spec.name}: {a}" for spec in recipe.steps if (a := spec.step.alarm))],
        "tokens": _tokens(out),
        "documents": {path.name: _sha256(path) for path in sorted((out / "documents").glob("*.jsonl.zst"))},
    }


def _tokens(out: Path) -> dict[str, Any] | None:
    """What the index of the shards says, None where the recipe makes none."""
    path = out / "tokens" / INDEX
    return read_json(path) if path.exists() else None


def _source(
    recipe: Recipe, name: str, parts: list[Part], flows: Mapping[str, Mapping[str, Flow]], names: list[str]
) -> dict[str, Any]:
    spec = recipe.source(name)
    files = [file for part in parts if part.source == name for file in part.files]
    seen = [flows[step][name] for step in names if name in flows[step]]
    return {
        "licence": spec.licence,
        "reader": spec.reader_name,
        "reason": spec.reason,
        "package": _package(spec.package),
        "files": len(files),
        "file_bytes": sum(file.size for file in files),
        "documents_in": seen[0].taken.documents,
        "bytes_in": seen[0].taken.bytes,
        "documents_out": seen[-1].kept.documents,
        "bytes_out": seen[-1].kept.bytes,
    }


def _package(package: Package | None) -> dict[str, str] | None:
    """What was fetched, by name, version and hash."""
    record = package.record() if package is not None else None
    return None if record is None else {key: record[key] for key in ("package", "version", "sha256")}


def _alarms(flows: Mapping[str, Mapping[str, Flow]], sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a person should look at: steps that drop more than half of a source, sources that give nothing."""
    out = []
    for step, by_source in flows.items():
        for source, flow in sorted(by_source.items()):
            gone = flow.taken.documents - flow.kept.documents
            if 2 * gone > flow.taken.documents:
                worst = max(flow.dropped, key=lambda reason: flow.dropped[reason].documents)
                out.append(
                    f"{step} dropped {gone:,} of {flow.taken.documents:,} documents of {source} "
                    f"({gone / flow.taken.documents:.0%}), most for: {worst}"
                )
    out += [f"source {name} gave no document" for name, source in sources.items() if not source["documents_in"]]
    return out


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.2rem .8rem .2rem 0;text-align:right}
td:first-child,th:first-child{text-align:left}.alarm{color:#a00}svg text{font-size:12px}"""


def page(report: Mapping[str, Any]) -> str:
    """The report as one HTML page that needs nothing from anywhere."""
    title = f"{report['name']}: what became of the documents"
    alarms = "".join(f"<li class=alarm>{html.escape(alarm)}</li>" for alarm in report["alarms"]) or "<li>none</li>"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
        f"<p>Recipe SHA-256 <code>{report['recipe_sha256']}</code>, seed {report['seed']}.</p>",
        f"<h2>Alarms</h2><ul>{alarms}</ul>",
        "<h2>Sources</h2>",
        svg(report),
        _table(
            ("source", "licence", "files", "documents read", "kept", "MB read", "MB kept"),
            [
                (name, s["licence"] or "not stated", s["files"], s["documents_in"], s["documents_out"], *_megabytes(s))
                for name, s in report["sources"].items()
            ],
        ),
        *_token_table(report["tokens"]),
        "<h2>Licences</h2>",
        _table(("licence", "MB kept"), [(name, f"{size / 1e6:,.2f}") for name, size in report["licences"].items()]),
        *_package_table(report["sources"]),
        "<h2>Steps</h2>",
    ]
    for step in report["steps"]:
        parts.append(f"<h3>{html.escape(step['name'])}</h3>")
        if step["reason"]:
            parts.append(f"<p>{html.escape(step['reason'])}</p>")
        rows = []
        for source, flow in step["sources"].items():
            for reason, count in flow["dropped"].items():
                share = count["documents"] / flow["documents_in"] if flow["documents_in"] else 0
                rows.append((source, reason, count["documents"], f"{share:.1%}", f"{count['bytes'] / 1e6:,.2f}"))
        kept = sum(flow["documents_out"] for flow in step["sources"].values())
        parts.append(f"<p>{kept:,} documents kept.</p>")
        if rows:
            parts.append(_table(("source", "reason", "dropped", "of its documents", "MB"), rows))
        if step["notes"]:
            parts.append(_table(("counted", "times"), list(step["notes"].items())))
    return "\n".join(parts) + "\n"


def _package_table(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = {name: source["package"] for name, source in sources.items() if source["package"]}
    if not found:
        return []
    rows = [(name, p["package"], p["version"], p["sha256"][:16]) for name, p in found.items()]
    return ["<h2>Packages</h2>", _table(("source", "package", "version", "SHA-256"), rows)]


def _token_table(tokens: Mapping[str, Any] | None) -> list[str]:
    if tokens is None:
        return []
    rows = [(name, c["there"], c["written"], c["documents"]) for name, c in tokens["tokens_by_source"].items()]
    return [
        f"<h2>Tokens</h2><p>{tokens['tokens']:,} tokens in {len(tokens['shards'])} shards.</p>",
        _table(("source", "tokens there", "tokens written", "documents written"), rows),
    ]


def _megabytes(source: Mapping[str, Any]) -> tuple[str, str]:
    return f"{source['bytes_in'] / 1e6:,.2f}", f"{source['bytes_out'] / 1e6:,.2f}"


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    def cell(value: Any) -> str:
        return html.escape(f"{value:,}" if isinstance(value, int) else str(value))

    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
