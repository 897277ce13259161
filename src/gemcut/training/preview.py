"""What a run will learn from, before it begins: sizes, shares, and windows as text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gemcut.training.flops import flops_per_token
from gemcut.training.mixture import TOKENIZER, Mixture
from gemcut.training.runfile import RunFile, network_config


def preview(file: RunFile, windows: int) -> dict[str, Any]:
    """JSON of the run: ``model``, ``run``, ``sources`` with the first ``windows`` of each, documents apart.

    A tokenizer that the run will learn is learned here, and thrown away.
    """
    with tempfile.TemporaryDirectory() as folder:
        mixture = Mixture(file, Path(folder) / TOKENIZER)
    config = network_config(file, mixture.tokenizer.get_vocab_size())
    mixture.open(config)
    run = file.run
    rows = run.batch * run.micro_batches
    total = sum(weight for _, weight in mixture.train)
    sources = []
    for source, (stretch, weight) in zip(file.sources, mixture.train, strict=True):
        share = weight / total if total else 0.0
        shown = [_documents(stretch[i], mixture.tokenizer) for i in range(min(windows, len(stretch)))]
        sources.append(
            {
                "name": source.name,
                "windows": len(stretch),
                "share": share,
                "epochs": share * rows * run.steps / len(stretch),
                "held_out": len(mixture.held.get(source.name, ())),
                "shown": shown,
            }
        )
    tokens = rows * run.length
    return {
        "model": {
            "parameters": config.num_parameters(),
            "layers": config.num_hidden_layers,
            "vocabulary": config.vocab_size,
        },
        "run": {
            "steps": run.steps,
            "tokens_a_step": tokens,
            "tokens": tokens * run.steps,
            "flops": flops_per_token(config, run.length) * tokens * run.steps,
        },
        "sources": sources,
    }


def _documents(row: dict[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    segments = row["segments"]
    found = []
    for segment in np.unique(segments[segments > 0]).tolist():
        ids = row["tokens"][segments == segment]
        found.append({"tokens": len(ids), "text": tokenizer.decode(ids.tolist(), skip_special_tokens=False)})
    return found
