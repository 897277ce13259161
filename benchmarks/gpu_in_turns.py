"""Two versions of gemcut in turns on one GPU: is this tree as fast as another one?

    git worktree add ../before COMMIT
    python benchmarks/gpu_in_turns.py ../before --sizes 2b,27b --weights nf4,bf16 --rounds 7

Each version runs in a process of its own, holds its own copy of the network, and waits while the other is measured.
Every round measures A (the other tree), then B (this tree), so that both meet the same clocks and the same drift of the
card. The networks have random weights. Prefill and decode are those of gpu_inference.py of the version's own tree.
The table shows medians with smallest and largest, the ratio of the medians B/A, and the smallest and largest ratio of
one round. Progress goes to stderr, the table to stdout.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = 8 << 30  # bytes of keys and values an engine may hold: 64 sequences of 27B's shape with some 300 tokens


def work(tree: Path) -> None:
    """The measured process: reads a command a line from stdin, answers a line of JSON on stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what the libraries print is not an answer
    sys.path[0] = str(tree / "benchmarks")
    sys.path.insert(1, str(tree / "src"))
    import gc

    import torch
    from gpu_inference import GREEDY, SAMPLED, request, together
    from gpu_network import build

    import gemcut
    from gemcut.engine import Engine, EngineConfig

    assert Path(gemcut.__file__).is_relative_to(tree), gemcut.__file__

    def measured(engine: Engine, kind: str, length: int, new: int) -> float:
        if kind == "prefill":
            return request(engine, length, 1)[1]
        if kind == "users":
            return together(engine, length, 128, new)
        return request(engine, length, new, SAMPLED if kind == "sampled" else GREEDY)[0]

    engine = model = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "load":
            engine = model = None
            gc.collect()
            torch.cuda.empty_cache()
            device = torch.device("cuda", torch.cuda.current_device())
            model, _ = build(command["size"], command["weights"], command["layers"])
            config = EngineConfig(max_batch_tokens=4096, max_context=8192, kv_memory=CACHE)
            engine = Engine(model, device, config)
            answer: object = engine.runner.graph_refusal or "graphs"
        elif command["do"] == "warm":
            for _ in range(3):  # compiles; captures, at a short prompt's second time; replays
                measured(engine, command["kind"], command["length"], 8)
            answer = None
        else:
            answer = measured(engine, command["kind"], command["length"], command["new"])
        print(json.dumps(answer), file=answers, flush=True)


class Version:
    """One tree's process."""

    def __init__(self, tree: Path) -> None:
        command = [sys.executable, __file__, "--work", str(tree)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def answer(self) -> object:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("gpu_in_turns: a version's process ended; its traceback is above")
        return json.loads(line)

    def call(self, **command: object) -> object:
        self.ask(**command)
        return self.answer()


def both(versions: tuple[Version, Version], **command: object) -> list[object]:
    """The answers of both, which work at the same time."""
    for version in versions:
        version.ask(**command)
    return [version.answer() for version in versions]


def summary(speeds: list[float]) -> str:
    digits = 1 if statistics.median(speeds) < 1000 else 0
    middle, low, high = (f"{v:,.{digits}f}" for v in (statistics.median(speeds), min(speeds), max(speeds)))
    return f"{middle} ({low}–{high})"


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the tree of the version to compare with, A")
    parser.add_argument("--sizes", type=names, default=["2b", "9b", "27b"], help="of 2b, 9b, 27b")
    parser.add_argument(
        "--weights", type=names, default=["nf4", "nf4-head8", "int8", "bf16"], help="of the four formats"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--layers", type=int, help="fewer layers than the size has")
    parser.add_argument(
        "--measure",
        type=names,
        default=["decode:128", "sampled:128", "prefill:512"],
        help="decode:CONTEXT, sampled:CONTEXT, prefill:LENGTH, users:COUNT (together, after 128 tokens each)",
    )
    options = parser.parse_args()
    import torch

    trees = (options.other.resolve(), HERE.parent)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"A = {trees[0].name}, B = {trees[1].name}; {options.rounds} rounds A B; answers of {options.new} tokens\n")
    print("| size | weights | tok/s of | A, median (min–max) | B, median (min–max) | B/A | of a round |")
    print("|---|---|---|---|---|---|---|", flush=True)
    versions = (Version(trees[0]), Version(trees[1]))
    for size in options.sizes:
        for weights in options.weights:
            print(
                size,
                weights,
                both(versions, do="load", size=size, weights=weights, layers=options.layers),
                file=sys.stderr,
            )
            for what in options.measure:
                kind, _, length = what.partition(":")
                job = {"kind": kind, "length": int(length)}
                both(versions, do="warm", **job)
                speeds: list[list[float]] = [[], []]
                for _ in range(options.rounds):
                    for values, version in zip(speeds, versions, strict=True):
                        values.append(float(str(version.call(do="measure", new=options.new, **job))))
                rounds = [b / a for a, b in zip(*speeds, strict=True)]
                ratio = statistics.median(speeds[1]) / statistics.median(speeds[0])
                cells = [size, weights, what, summary(speeds[0]), summary(speeds[1]), f"{ratio:.3f}"]
                print("| " + " | ".join([*cells, f"{min(rounds):.3f}–{max(rounds):.3f}"]) + " |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]))
    else:
        main()
