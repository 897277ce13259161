"""Six tasks of lm-evaluation-harness that read local files: HellaSwag, PIQA, ARC-e, ARC-c, WinoGrande, BoolQ.

The harness's own tasks fetch their data from the hub. `write_tasks` writes the data at hand as JSON lines, and a whole
task file for each set, with the prompts, choices and metrics that the harness's own task has.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.evaluation.folder import DataFolder
from gemcut.evaluation.row import Records
from gemcut.evaluation.rows import commonsense

PREFIX = "local_"


@dataclass(frozen=True)
class _Task:
    """Where a task's records come from, and its file's keys."""

    load: Callable[[DataFolder], Records]
    text: str
    target: str
    choices: str
    metrics: tuple[str, ...] = ("acc", "acc_norm")
    shots: int = 0
    change: Callable[[dict[str, Any]], dict[str, Any]] = dict


def _partial(record: dict[str, Any]) -> dict[str, Any]:
    """WinoGrande's partial scoring: the harness takes the contexts for choices and the common rest for the target."""
    before, _, after = record["sentence"].partition("_")
    return {
        "contexts": [before + option for option in record["options"]],
        "rest": after.strip(),
        "label": record["label"],
    }


TASKS: dict[str, _Task] = {
    "hellaswag": _Task(commonsense.load_hellaswag, "{{context}}", "label", "endings"),
    "piqa": _Task(commonsense.load_piqa, "Question: {{goal}}\nAnswer:", "label", "{{[sol1, sol2]}}"),
    "arc_easy": _Task(commonsense.load_arc_easy, "Question: {{question}}\nAnswer:", "label", "choices"),
    "arc_challenge": _Task(
        commonsense.load_arc_challenge, "Question: {{question}}\nAnswer:", "label", "choices", shots=25
    ),
    "winogrande": _Task(commonsense.load_winogrande, "label", "rest", "contexts", ("acc",), change=_partial),
    "boolq": _Task(
        commonsense.load_boolq,
        "{{passage}}\nQuestion: {{question}}?\nAnswer:",
        "label",
        '["no", "yes"]',
        ("acc",),
        change=lambda record: {**record, "label": int(record["answer"])},
    ),
}


def write_tasks(data: DataFolder, folder: Path) -> list[str]:
    """Write ``folder``/NAME.yaml and .jsonl for each set; the tasks' names, ``local_`` before the set's.

    Args:
        data: the benchmark sets.
        folder: is made where it is not there; ``lm_eval --include_path`` takes it.

    Raises:
        DataError: a set is missing or not in its form.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    names = []
    for name, task in TASKS.items():
        records = task.load(data)
        files = {"test": str(_write(folder / f"{name}.jsonl", [task.change(each) for each in records.records]))}
        if task.shots:
            shots = [task.change(each) for each in records.shots[""]]
            files["train"] = str(_write(folder / f"{name}.train.jsonl", shots))
        form: dict[str, Any] = {
            "task": f"{PREFIX}{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": task.text,
            "doc_to_target": task.target,
            "doc_to_choice": task.choices if task.choices[0] != "[" else json.loads(task.choices),
            "num_fewshot": task.shots,
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in task.metrics
            ],
            "metadata": {"version": 1.0},
        }
        if task.shots:
            form |= {"training_split": "train", "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
        # JSON is YAML, and needs no writer of its own.
        (folder / f"{name}.yaml").write_text(json.dumps(form, indent=2, ensure_ascii=False) + "\n", "utf-8")
        names.append(form["task"])
    return names


def _write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), "utf-8")
    return path
