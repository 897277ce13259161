"""Small runs for the tests: a run file, texts, and a child process that trains."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

RUN = """
[run]
steps = {steps}
batch = {batch}
length = 16
micro_batches = 2
save_every = {save_every}
eval_every = 5
workers = 2
mesh = {mesh}
{run}

[model]
{model}
compute_dtype = "float32"

[model.config]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
query_pre_attn_scalar = 16
sliding_window = 8
max_position_embeddings = 32

[optimizer]
rate = 1e-2
warmup = 2

[[source]]
name = "a"
path = "a"
weight = 2
held_out = 3

[[source]]
name = "b"
path = "b"
held_out = 2
{more}
"""
WORDS = ("the", "a", "model", "trains", "reads", "writes", "counts", "tokens", "windows", "red", "blue", "one", "or")


def write_texts(folder: Path) -> None:
    """Two sources of short documents, so that a window holds several; the second is used up in a few steps."""
    draw = random.Random(0)
    for name, count in (("a", 60), ("b", 8)):
        (folder / name).mkdir()
        for i in range(count):
            words = draw.choices(WORDS, k=draw.randint(3, 40))
            (folder / name / f"{i:03d}.txt").write_text(" ".join(words) + ".\n")


def write_run(
    folder: Path,
    name: str = "run.toml",
    *,
    steps: int = 10,
    batch: int = 4,
    save_every: int = 5,
    mesh: str = "[1, 1, 1]",
    model: str = "train_tokenizer = 400",
    run: str = "",
    more: str = "",
) -> Path:
    """Write a run file beside the sources."""
    if not (folder / "a").exists():
        write_texts(folder)
    path = folder / name
    values = {"steps": steps, "batch": batch, "save_every": save_every, "mesh": mesh, "model": model}
    path.write_text(RUN.format(**values, run=run, more=more))
    return path


def command(
    *arguments: object, devices: int = 1, file_bytes: int | None = None, **variables: str
) -> subprocess.Popen[str]:
    """``gemcut train`` in a process of its own, which may write no file of more than ``file_bytes``.

    ``variables`` of the environment are its alone.
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **variables}
    program = "import resource, runpy, sys; sys.argv[0] = 'gemcut'; "
    if file_bytes is not None:
        program += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({file_bytes}, {file_bytes})); "
    program += "runpy.run_module('gemcut', run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", program, "train", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
