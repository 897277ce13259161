"""Looking at samples: what was asked, what came, what was taken for the answer; in a terminal or as one page."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemcut.errors import ParameterError
from gemcut.evaluation.requests import Answer, Choices, Letters, Pair, Request, Rolling
from gemcut.evaluation.results import RowResult
from gemcut.evaluation.tables import shown

KINDS = ("all", "right", "wrong", "failed")


@dataclass(frozen=True)
class Sample:
    """One item as people see it. ``kind``: "right", "wrong" or "failed" (no answer could be extracted)."""

    row: str
    id: str
    kind: str
    prompt: str
    answer: str
    extracted: str
    target: str


def samples(results: Mapping[str, RowResult], kind: str = "all") -> Iterator[Sample]:
    """Samples of one kind, row by row. Raises ParameterError for an unknown kind."""
    if kind not in KINDS:
        raise ParameterError(f"--show is {kind!r}; expected one of {', '.join(KINDS)}")
    for name, result in results.items():
        metric = result.row.metric
        for item, answer, score in zip(result.items, result.log.answers, result.scores, strict=True):
            value = score.values.get(metric, next(iter(score.values.values()), 0.0))
            own = "failed" if score.failed else "right" if value >= 1 else "wrong"
            if kind in ("all", own):
                target = json.dumps(item.target, ensure_ascii=False)
                yield Sample(
                    name, item.id, own, prompt_of(item.request), said(item.request, answer), score.extracted, target
                )


def prompt_of(request: Request) -> str:
    """The whole prompt as text."""
    if isinstance(request, Rolling):
        return request.text
    if isinstance(request, Pair):
        return "\n".join(request.texts)
    if request.dialogue:
        return "\n".join(f"[{turn.role}] {turn.content}" for turn in request.dialogue)
    return request.prefix + (request.context or (" / ".join(request.contexts) if isinstance(request, Choices) else ""))


def said(request: Request, answer: Answer) -> str:
    """What came: texts, or each choice with its log-probability."""
    if answer.texts:
        return "\n---\n".join(answer.texts)
    names: Sequence[str] = ("",) * len(answer.logprobs)
    if isinstance(request, Choices):
        names = request.contexts or request.continuations
    elif isinstance(request, Letters):
        names = request.letters
    elif isinstance(request, Pair):
        names = request.texts
    return "\n".join(f"{value:10.3f}  {name.strip()}" for value, name in zip(answer.logprobs, names, strict=True))


def page(title: str, results: Mapping[str, RowResult], kind: str, most: int) -> str:
    """One HTML page without any outside resource: figures, and up to ``most`` samples a row, folded."""
    parts = [_HEAD.format(title=html.escape(title))]
    parts.append("<table><tr><th>row</th><th>result</th><th>items</th><th>not extracted</th><th>recipe</th></tr>")
    for name, result in results.items():
        cells = (
            name,
            shown(result.figure),
            f"{len(result.items):,}",
            f"{result.failed:,}",
            result.log.header["recipe"],
        )
        parts.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    parts.append("</table>")
    count: dict[str, int] = {}
    for sample in samples(results, kind):
        count[sample.row] = count.get(sample.row, 0) + 1
        if count[sample.row] <= most:
            parts.append(_sample(sample))
    hidden = {name: number - most for name, number in count.items() if number > most}
    if hidden:
        left = ", ".join(f"{name}: {number:,}" for name, number in hidden.items())
        parts.append(f"<p>Samples not on this page: {html.escape(left)}.</p>")
    return "\n".join([*parts, "</main></body></html>\n"])


def _sample(sample: Sample) -> str:
    fields = (
        ("prompt", sample.prompt),
        ("answer", sample.answer),
        ("taken", sample.extracted),
        ("right", sample.target),
    )
    body = "".join(f"<h3>{name}</h3><pre>{html.escape(text)}</pre>" for name, text in fields)
    head = html.escape(f"{sample.row} {sample.id}")
    return f'<details class="{sample.kind}"><summary>{head} <b>{sample.kind}</b></summary>{body}</details>'


def as_json(sample: Sample) -> dict[str, Any]:
    """A sample for ``--json``."""
    return {name: getattr(sample, name) for name in ("row", "id", "kind", "prompt", "answer", "extracted", "target")}


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }}
table {{ border-collapse: collapse }} td, th {{ border: 1px solid #8886; padding: .3rem .6rem; text-align: left }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .6rem }}
details {{ border-left: .3rem solid; padding: .3rem .8rem; margin: .5rem 0 }}
h3 {{ font-size: 1em; margin: .5rem 0 0 }}
.right {{ border-color: #2a7 }} .wrong {{ border-color: #c33 }} .failed {{ border-color: #d90 }}
</style></head><body><main><h1>{title}</h1>
"""
