"""``gemcut safety calibrate`` and ``policies``: thresholds of judges, and the policies there are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemcut.cli import output
from gemcut.cli.options import Debug, flag, option
from gemcut.errors import ParameterError

if TYPE_CHECKING:
    from gemcut.safety.guard import Guard

GuardPath = Annotated[Path, typer.Argument(metavar="GUARD", help="A guard file, in TOML.", show_default=False)]
AsJson = Annotated[bool, flag("One JSON object.", "--json")]


def load_guard(path: Path, model: str | None = None) -> Guard:
    """The guard of a file; ``model`` for a judge that is the model itself. Raises ParameterError."""
    from gemcut.safety.guard_file import GuardFile

    file = GuardFile.read(path)
    if not file.needs_model:
        return file.build()
    if model is None:
        raise ParameterError(f"{path} has a judge of kind self, which is the guarded model: name it with --model")
    from gemcut.cli.options import LoadOptions

    return file.build(LoadOptions().load(model))


def calibrate(
    guard: GuardPath,
    labelled: Annotated[Path, typer.Argument(metavar="LABELLED", help="Labelled texts.", show_default=False)],
    *,
    xstest: Annotated[
        Path | None, option("XSTest's CSV: what the guard refuses though it is safe.", "--xstest", metavar="FILE")
    ] = None,
    most_false: Annotated[
        float, option("Most of the harmless texts that may be flagged. Else 0.05.", "--most-false", metavar="SHARE")
    ] = 0.05,
    model: Annotated[
        str | None, option("The model, for a judge of kind self.", "--model", "-m", metavar="NAME")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fit thresholds on your own labelled texts, and say how good they are.

    LABELLED is JSON lines: {"text": "…", "labels": {"hate": true}}, and
    "prompt" where the text is an answer. Half of the texts choose each
    threshold, the other half measures F1, recall and false positives, with
    95 % intervals. What to put into the guard file is printed at the end.
    """
    from gemcut.safety.calibrate import Labelled, fit, read_labelled, read_xstest, wilson

    if not 0 <= most_false <= 1:
        raise ParameterError(f"--most-false is {most_false:g}; expected a share from 0 to 1")
    prompts = read_xstest(xstest) if xstest is not None else None
    judges = load_guard(guard, model)
    names = tuple(dict.fromkeys((*judges.file.input, *judges.file.output)))
    texts = read_labelled(labelled, names)
    wanted = [name for name in names if any(name in text.labels for text in texts)]
    scores: dict[str, dict[str, float]] = {}

    def score(text: Labelled, policy: str) -> float:
        key = f"{text.prompt!r} {text.text}"
        if key not in scores:
            scores[key] = judges.scores(text.text, wanted, prompt=text.prompt)
        return scores[key][policy]

    fits = [
        fit(name, texts, lambda text, name=name: score(text, name), most_false=most_false)  # type: ignore[misc]
        for name in wanted
    ]
    report: dict[str, object] = {"policies": [dataclasses.asdict(each) for each in fits]}
    lines = []
    for each in fits:
        lines.append(
            f"{each.policy:<20} threshold {each.threshold:.4f}   F1 {_rate(each.f1, each.f1_interval)}   "
            f"recall {_rate(each.recall, each.recall_interval)}   "
            f"false positives {_rate(each.false_positives, each.false_positives_interval)}   of {each.texts:,} texts"
        )
    if prompts is not None:
        levels = {each.policy: each.threshold for each in fits}
        for name, some in zip(("over-refusal", "refused contrasts"), prompts, strict=True):
            hits = 0
            for prompt in some:
                found = judges.scores(prompt, wanted)
                hits += any(found[policy] >= levels[policy] for policy in wanted)
            report[f"xstest {name}"] = {"share": hits / len(some), "interval": wilson(hits, len(some)), "of": len(some)}
            lines.append(f"XSTest {name}: {_rate(hits / len(some), wilson(hits, len(some)))} of {len(some)} prompts")
    if as_json:
        output.print_json(report)
        return
    print(output.safe("\n".join(lines)))
    print("\n[thresholds]")
    for each in fits:
        print(f"{each.policy} = {each.threshold:.6g}")


def policies(*, as_json: AsJson = False, debug: Debug = False) -> None:
    """The policies there are, and which part of the Prohibited Use Policy each belongs to."""
    from gemcut.safety.policies import USE_POLICY, builtin_policies

    found = builtin_policies()
    if as_json:
        output.print_json([dataclasses.asdict(policy) for policy in found.values()])
        return
    for policy in found.values():
        print(f"{policy.name:<20} {policy.heading}\n    {policy.definition}")
    print(f"\nGemma's Prohibited Use Policy: {USE_POLICY}")


def _rate(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"
