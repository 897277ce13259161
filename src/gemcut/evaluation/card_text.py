"""A model card as Markdown, from what `gemcut.evaluation.model_card` gathered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gemcut.errors import DataError
from gemcut.evaluation.model_card import NOT_MEASURED
from gemcut.evaluation.tables import FOOTNOTE, markdown

TERMS = "https://ai.google.dev/gemma/terms"
PROHIBITED = "https://ai.google.dev/gemma/prohibited_use_policy"
TOOLKIT = "https://ai.google.dev/responsible"


def card_text(card: Mapping[str, Any]) -> str:
    """The whole card, its metadata block first."""
    sections = (_model, _inputs, _usage, _citation, _data, _implementation, _benchmarks, _safety, _limits, _benefits)
    lines = ["---", *_yaml(card["metadata"]), "---", "", f"# {_plain(card['model']['name'])}"]
    for section in sections:
        lines += ["", *section(card)]
    return "\n".join(lines) + "\n"


def check_metadata(text: str) -> None:
    """Read a card's metadata block as the hub's library does, on this machine alone.

    Raises DataError where the library cannot read it. (The hub itself checks once more when a card is uploaded.)
    """
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(text).data
    except ValueError as error:
        raise DataError(f"the card's metadata are not valid: {error}") from None
    for name in ("language", "library_name", "pipeline_tag"):
        if not data.get(name):
            raise DataError(f"the card's metadata have no {name}")


def _yaml(data: Mapping[str, Any]) -> list[str]:
    """Metadata as YAML: each value in JSON's form, which is YAML too."""
    return [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items()]


def _plain(text: Any) -> str:
    """A text of somebody else's on one line, that cannot be taken for markup."""
    flat = " ".join(str(text).split())
    return flat.translate({ord(c): f"\\{c}" for c in "\\`*_[]<>#|"})


def _model(card: Mapping[str, Any]) -> list[str]:
    model, licence = card["model"], card["licence"]
    kind = "instruction-tuned" if model["instruction_tuned"] else "pre-trained"
    revision = f", revision {_plain(model['revision'])}" if model["revision"] else ""
    lines = [
        "## Model information",
        "",
        f"A {kind} decoder-only language model of the architecture {_plain(model['architecture'])}: "
        f"{model['parameters']:,} parameters, {model['layers']} layers, a context of {model['context']:,} tokens, "
        f"a vocabulary of {model['vocabulary']:,}{revision}.",
        "",
    ]
    if licence["notice"] is not None:
        lines += [f"**Authors**: Google. **Terms of use**: [Gemma terms]({TERMS}). {licence['notice']}"]
    else:
        lines += ["**Authors**: whoever trained it on the data below. **Terms of use**: theirs to state."]
    return lines


def _inputs(card: Mapping[str, Any]) -> list[str]:
    form = (
        "a dialogue in its chat format, or a text" if card["model"]["instruction_tuned"] else "a text to be continued"
    )
    return [
        "## Inputs and outputs",
        "",
        f"- **Input**: {form}; up to {card['model']['context']:,} tokens with the answer. It begins with one `<bos>`.",
        "- **Output**: text that goes on from it.",
    ]


def usage(name: str, *, tuned: bool) -> str:
    """Python that loads the model and uses it."""
    call = (
        'gemma.chat([{"role": "user", "content": "Write a hello world program"}], max_new_tokens=32)'
        if tuned
        else 'gemma.generate("The capital of France is", max_new_tokens=8, temperature=0)'
    )
    return f"from gemcut import Gemma\n\ngemma = Gemma.load({name!r})\nprint({call})\n"


def _usage(card: Mapping[str, Any]) -> list[str]:
    code = usage(card["model"]["name"], tuned=card["model"]["instruction_tuned"])
    return ["## Usage", "", "```python", code.rstrip("\n"), "```"]


def _citation(card: Mapping[str, Any]) -> list[str]:
    return ["## Citation", "", "```bibtex", card["citation"].rstrip("\n"), "```"]


def _data(card: Mapping[str, Any]) -> list[str]:
    data, lines = card["data"], ["## Training data", ""]
    if data is None:
        return [*lines, f"No report of the training data was given: {NOT_MEASURED}."]
    totals = data["totals"]
    tokens = NOT_MEASURED if data["tokens"] is None else f"{data['tokens']:,}"
    lines += [
        f"Recipe {_plain(data['name'])} (SHA-256 `{data['recipe_sha256'][:12]}`): {totals['documents_out']:,} of "
        f"{totals['documents_in']:,} documents were kept. Tokens: {tokens}.",
        "",
    ]
    rows = [["source", "licence", "documents read", "kept", "MB kept"]]
    for name, source in data["sources"].items():
        counts = [f"{source[key]:,}" for key in ("documents_in", "documents_out")]
        rows.append(
            [_plain(name), _plain(source["licence"] or "not stated"), *counts, f"{source['bytes_out'] / 1e6:,.2f}"]
        )
    lines += [*markdown(rows), "", "### Filters", ""]
    rows = [["step", "reason", "documents dropped"]]
    rows += [
        [_plain(step), _plain(reason), f"{count:,}"]
        for step, reasons in data["dropped"].items()
        for reason, count in reasons.items()
    ]
    lines += markdown(rows) if len(rows) > 1 else ["Nothing was dropped."]
    if data["notes"]:
        rows = [["step", "counted", "times"]]
        rows += [[_plain(s), _plain(key), f"{value}"] for s, own in data["notes"].items() for key, value in own.items()]
        lines += ["", "### Counts of the steps (decontamination among them)", "", *markdown(rows)]
    lines += [""] + [f"- Alarm: {_plain(alarm)}" for alarm in data["alarms"]]
    return lines


def _implementation(card: Mapping[str, Any]) -> list[str]:
    record, lines = card["training"], ["## Hardware and software", ""]
    if record is None:
        return [*lines, f"No record of the training was given: {NOT_MEASURED}."]
    said = record["estimates"]
    software = record.get("software") or {}

    def number(value: Any, unit: str = "") -> str:
        return NOT_MEASURED if value is None else f"{value:,.4g}{unit}"

    return [
        *lines,
        f"- Hardware: {_plain(record.get('hardware') or NOT_MEASURED)}, devices: {number(record.get('devices'))}",
        f"- Software: {', '.join(f'{_plain(k)} {_plain(v)}' for k, v in software.items()) or NOT_MEASURED}",
        f"- Tokens: {number(record.get('tokens'))}; time: {number(record.get('seconds'), ' s')}",
        f"- Compute: {number(said.get('flops'), ' FLOPs')} (6 x parameters x tokens, an estimate)",
        f"- Energy: {number(said.get('energy_kwh'), ' kWh')} (devices x stated power x time, an estimate)",
    ]


def _results(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [["benchmark", "metric", "form", "ours", "95 % interval", "n", "Google 9B", "Google 27B", "recipe"]]
    for entry in entries:
        figure, span = entry["ours"], entry.get("interval")
        nine, large = (next((v for k, v in entry["card"].items() if k.endswith(size)), "") for size in ("9b", "27b"))
        if figure is None:
            ours, count = NOT_MEASURED, ""
        else:
            error = "" if figure["error"] is None else f" ± {figure['error']:.2f}"
            ours, count = f"{figure['value']:.2f}{error}", f"{figure['count']:,}"
        interval = "" if span is None else f"{span[0]:.2f} to {span[1]:.2f}"
        cells = [entry["title"], entry["setting"], entry["form"], ours, interval, count, nine, large, entry["recipe"]]
        rows.append([str(cell) for cell in cells])
    lines = markdown(rows)
    notes = [(e["title"], e["why"]) for e in entries if e["ours"] is not None and e["why"]]
    if notes:
        lines += ["", "How these differ from what Google measured:", ""]
        lines += [f"- {title}: {' '.join(why)}" for title, why in dict(notes).items()]
    return lines


def _benchmarks(card: Mapping[str, Any]) -> list[str]:
    return ["## Evaluation", "", "± is one standard error.", "", *_results(card["benchmarks"]), "", FOOTNOTE]


def _safety(card: Mapping[str, Any]) -> list[str]:
    lines = ["## Ethics and safety", "", *_results(card["safety"])]
    gaps = [
        f"- {entry['title']} ({entry['form']}), {name}: {figure['value']:.2f}"
        for entry in card["safety"]
        for name, figure in entry["others"].items()
        if name.startswith(("gap", "bias"))
    ]
    if gaps:
        lines += ["", "Gaps between groups, and bias scores:", "", *gaps]
    lines += ["", "### Memorization", ""]
    for report in card["memorization"]:
        own = report["corpus"]
        exact = own["exact"]
        lines.append(
            f"- {own['samples']:,} documents: {100 * exact['share']:.3f} % given back word for word "
            f"(95 %: {100 * exact['low']:.3f} to {100 * exact['high']:.3f}), "
            f"{100 * own['approximate']['share']:.3f} % approximately; personal data of high severity: "
            f"{own['personal_data']['high']['in_the_document']}"
        )
    for report in card["canaries"]:
        said = ", ".join(f"{e['mean_exposure']:.1f} bits at {times}" for times, e in report["by_times"].items())
        lines.append(f"- Exposure of canaries by repetitions: {said}")
    if not card["memorization"] and not card["canaries"]:
        lines.append(f"Memorization: {NOT_MEASURED}.")
    lines += ["", "### Content safety and large-scale harm", ""]
    lines.append(f"Human evaluation of content safety, red-teaming and dangerous capabilities: {NOT_MEASURED}.")
    return lines


def _limits(card: Mapping[str, Any]) -> list[str]:
    def measured(*names: str) -> str:
        entries = [e for e in card["safety"] if e["id"] in names and e["ours"] is not None]
        return "measured above" if entries else NOT_MEASURED

    memory = "measured above" if card["memorization"] else NOT_MEASURED
    return [
        "## Usage and limitations",
        "",
        "**Intended use**: generating and continuing text, summaries, questions and answers, and research on language "
        "models. Whether it is fit for a use of yours is for you to measure.",
        "",
        "**Limitations**: it can state what is false with the same ease as what is true "
        f"(truthfulness: {measured('truthfulqa')}). It was made for English text; other languages: {NOT_MEASURED}.",
        "",
        "**Risks, and what there is against them**:",
        "",
        f"- Stereotypes: {measured('bbq_ambig', 'bbq_disambig', 'crows_pairs', 'winobias_1_2')}. Measure again "
        "after every change of the weights.",
        f"- Harmful text: {measured('real_toxicity', 'toxigen', 'bold')}. Put a judge before and behind the model; see "
        f"the [toolkit]({TOOLKIT}).",
        f"- Misuse: what is forbidden stands in the [prohibited use policy]({PROHIBITED}).",
        f"- Privacy: memorization is {memory}.",
    ]


def _benefits(card: Mapping[str, Any]) -> list[str]:
    lines = ["## Benefits", ""]
    if not card["benefits"]:
        return [*lines, f"Comparison with other models: {NOT_MEASURED}."]
    rows = [["row", "form", "other model", "items", "ours", "other", "difference, 95 %", "McNemar p"]]
    for each in card["benefits"]:
        span = f"{100 * each['low']:+.2f} to {100 * each['high']:+.2f}"
        p = "" if each["p"] is None else f"{each['p']:.3g}"
        values = [f"{100 * each[key]:.2f}" for key in ("second", "first")]
        rows.append([each["row"], each["model"], _plain(each["other"]), f"{each['count']:,}", *values, span, p])
    return [*lines, "The same items, by the same recipe:", "", *markdown(rows)]
