"""What a training run shows: a line every so often, and under it on a terminal a bar with the time left."""

from __future__ import annotations

import json
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gemcut.cli import output

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from gemcut.training.trainer import Trainer


class TrainProgress:
    """Context manager; called with each line of metrics."""

    def __init__(self, trainer: Trainer, as_json: bool, *, silent: bool = False) -> None:
        self._trainer, self._json, self._silent = trainer, as_json, silent
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> TrainProgress:
        run, trainer = self._trainer.file.run, self._trainer
        if self._silent:
            return self
        if not self._json:
            tokens = run.batch * run.micro_batches * run.length
            print(
                f"{output.count(trainer.parameters())} weights, {run.steps:,} steps of {tokens:,} tokens, "
                f"{trainer.devices}; the first step compiles",
                flush=True,
            )
        if output.is_terminal(sys.stdout) and not self._json:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self._bar = Progress(*columns, console=Console(), transient=True)
            self._bar.start()
        return self

    def __call__(self, line: dict[str, Any]) -> None:
        if self._silent:
            return
        if self._json:
            print(json.dumps(line), flush=True)
            return
        if self._bar is None:
            print(shown(line), flush=True)
            return
        if self._task is None:  # steps of an earlier start are no part of this one's speed
            self._task = self._bar.add_task("", total=self._trainer.file.run.steps, completed=line["step"])
        self._bar.console.print(shown(line), markup=False, highlight=False)
        self._bar.update(self._task, completed=line["step"])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def shown(line: dict[str, Any]) -> str:
    """A line of metrics for people."""
    parts = [f"step {line['step']:>6,}", f"loss {line['loss']:.4f}"]
    if "divergence" in line:
        parts.append(f"divergence {line['divergence']:.4f}")
    parts += [f"gradient {line['gradient_norm']:.2f}", f"rate {line['rate']:.2e}"]
    if "tokens_per_second" in line:
        parts.append(f"{line['tokens_per_second']:,.0f} tok/s")
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%}")
    if "memory_gib" in line:
        parts.append(f"{line['memory_gib']:.1f} GiB")
    text = "  ".join(parts)
    for name, loss in line.get("held_out", {}).items():
        text += f"\n            held out, {output.safe(name)}: {loss:.4f}"
    if "sample" in line:
        text += f"\n            sample: {output.safe(' '.join(line['sample'].split()))}"
    return text
