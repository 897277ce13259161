"""lm-evaluation-harness on gemcut's engine and on transformers: the same tasks, the same weights, both sets of scores.

    python benchmarks/lm_eval_agreement.py --limit 500 --out results.json [--device cuda] [--tasks piqa,boolq]

Weights: the bundled Gemma 3 270M (Q4_K_M expanded), in float32 on both sides. Data: --data, or GEMCUT_BENCHMARKS.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from gemcut.evaluation import DataFolder
from gemcut.evaluation.lm_eval import GemcutLM
from gemcut.evaluation.lm_eval_tasks import TASKS, write_tasks
from real_weights import their_gemma3
from support import gguf_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--shots", type=int, help="of ARC-c; else 25")
    parser.add_argument("--data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        write_tasks(DataFolder.find(options.data), Path(scratch))
        manager = TaskManager(include_path=scratch, include_defaults=False)
        path = gguf_path()
        ours = GemcutLM(
            str(path), dtype="float32", device=options.device, max_length=4096, max_batch_size=16, progress=False
        )
        theirs = HFLM(
            pretrained=their_gemma3().to(options.device),
            tokenizer=AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name),
            batch_size=2 if options.device == "cpu" else 64,
            max_length=4096,
            device=options.device,
        )
        for task in options.tasks.split(","):
            found[task] = compare(task, ours, theirs, manager, options)
            print(task, json.dumps({k: v for k, v in found[task].items() if k != "differ"}), flush=True)
            options.out.write_text(json.dumps(found, indent=1))


def compare(task: str, ours: GemcutLM, theirs: HFLM, manager: TaskManager, options: argparse.Namespace) -> Any:
    results, samples, seconds = [], [], []
    for model in (ours, theirs):
        started = time.perf_counter()
        run = lm_eval.simple_evaluate(
            model=model,
            tasks=[f"local_{task}"],
            limit=options.limit,
            num_fewshot=options.shots if task == "arc_challenge" else None,
            task_manager=manager,
            bootstrap_iters=0,
        )
        seconds.append(time.perf_counter() - started)
        results.append(run["results"][f"local_{task}"])
        samples.append(run["samples"][f"local_{task}"])
    differ, most = [], 0.0
    for one, other in zip(*samples, strict=True):
        assert one["arguments"] == other["arguments"]
        numbers = [[float(reply[0][0]) for reply in each["resps"]] for each in (one, other)]
        most = max(most, *(abs(a - b) for a, b in zip(*numbers, strict=True)))
        if any(one.get(metric) != other.get(metric) for metric in ("acc", "acc_norm")):
            differ.append({"doc": one["doc_id"], "ours": numbers[0], "theirs": numbers[1]})
    metrics = [name for name in ("acc,none", "acc_norm,none") if name in results[0]]
    return {
        "items": len(samples[0]),
        "ours": {name: results[0][name] for name in metrics},
        "theirs": {name: results[1][name] for name in metrics},
        "largest_difference_of_a_log_likelihood": most,
        "items_scored_differently": len(differ),
        "differ": differ,
        "seconds_ours": round(seconds[0], 1),
        "seconds_theirs": round(seconds[1], 1),
    }


if __name__ == "__main__":
    main()
