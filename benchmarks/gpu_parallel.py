"""Several GPUs beside one, in one call: what a sum over the GPUs takes, then decode, prefill and many requests.

    python benchmarks/gpu_parallel.py --gpus 2 --size 27b --weights bf16,nf4
    python benchmarks/gpu_parallel.py --gpus 8 --model /models/gemma-2-27b-it
    python benchmarks/gpu_parallel.py --device cpu --gpus 2 --size tiny --quick     # tries the program out, no more

Without --model a random checkpoint of the size is written into a temporary folder first (27b: 54 GB), since each
process reads its own part of it. Every row is measured with one device and with all of them, and the ratio is of these
two medians. Sums are timed as the network calls them, one after another, from rank 0. Progress goes to stderr, tables
to stdout.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gemcut import Gemma, SamplingParams
from gemcut.checkpoint.names import expected_shapes, to_hf
from gemcut.checkpoint.write import save_folder
from gemcut.config import FAMILY, GemmaConfig
from gemcut.errors import GemcutError
from gemcut.parallel.communicator import connect

SIZES = {"2b": "gemma-2-2b", "9b": "gemma-2-9b", "27b": "gemma-2-27b"}
#: Bytes of the sums that are timed: rows of 27B in bf16 (9,216 bytes each), and a prefill chunk of 4,096 rows.
SUMS = (9_216, 73_728, 147_456, 589_824, 4_718_592, 37_748_736)
#: Prompts' tokens, new tokens.
USERS_PROMPT, USERS_NEW, MANY, MANY_PROMPT, MANY_NEW = 128, 128, 192, 512, 128


@dataclass
class Row:
    """One line of the table: tok/s of each repetition by number of devices."""

    name: str
    speeds: dict[int, list[float]] = field(default_factory=dict)

    def ratio(self, count: int) -> float:
        """How many times as fast ``count`` devices are as one."""
        return statistics.median(self.speeds[count]) / statistics.median(self.speeds[1])


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def shape(size: str, layers: int | None) -> GemmaConfig:
    """The network of a size; "tiny" is one that a CPU runs in no time."""
    if size == "tiny":
        base, tiny = FAMILY["gemma-2-2b"], {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 512}
        config = base.replace(
            **tiny, num_attention_heads=8, num_key_value_heads=4, head_dim=64, num_hidden_layers=2,
            layer_types=base.layer_types[:2],
        )  # fmt: skip
    else:
        config = FAMILY[SIZES[size]]
    count = layers or config.num_hidden_layers
    return config.replace(num_hidden_layers=count, layer_types=config.layer_types[:count])


def write_random(folder: Path, config: GemmaConfig) -> None:
    """A checkpoint in bf16 with random weights; one pool of numbers, rolled, serves all tensors."""
    pool = torch.randn(16_777_213, generator=torch.Generator().manual_seed(1)).bfloat16()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for place, (name, each) in enumerate(expected_shapes(config).items()):
            count = 1
            for number in each:
                count *= number
            if len(each) == 1:
                yield to_hf(name), torch.zeros(each, dtype=torch.bfloat16)
            else:
                values = pool.roll(-place * 7919).repeat(-(-count // len(pool)))[:count]
                yield to_hf(name), (values * each[-1] ** -0.5).view(each)

    save_folder(folder, config, tensors(), None, 5 << 30, generation_config={}, quantization=None)


# ---- sums ------------------------------------------------------------------------------------------------------------


def time_sums(rank: int, size: int, device: str, folder: str, repetitions: int, results: object) -> None:
    """Microseconds of a sum of each size, by rank 0 put into ``results`` (a queue)."""
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    torch.set_num_threads(1)
    with torch.inference_mode():
        communicator = connect("nccl" if device == "cuda" else "gloo", Path(folder), rank, size, where)
        communicator.verify(where)
        found = []
        for nbytes in SUMS:
            x = torch.ones(nbytes // 2, dtype=torch.bfloat16, device=where)
            count = repetitions if nbytes < 1 << 20 else max(2, repetitions // 10)
            times = []
            for _ in range(4):  # the first one warms up
                _wait(where)
                started = time.perf_counter()
                for _ in range(count):
                    communicator.sum(x)
                _wait(where)
                times.append((time.perf_counter() - started) / count * 1e6)
            found.append(statistics.median(times[1:]))
    if rank == 0:
        results.put(found)  # type: ignore[attr-defined]


def sums(size: int, device: str, repetitions: int) -> list[float]:
    """Microseconds of a sum over ``size`` devices, of each of SUMS."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=time_sums, args=(rank, size, device, folder, repetitions, results), daemon=True)
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        found: list[float] = results.get(timeout=300)
        for rank in ranks:
            rank.join()
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- requests --------------------------------------------------------------------------------------------------------


def prompts(gemma: Gemma, count: int, length: int) -> list[list[int]]:
    """Random prompts that begin differently, so that none is found in the cache."""
    return torch.randint(3, gemma.config.vocab_size, (count, length)).tolist()  # type: ignore[no-any-return]


def decode(gemma: Gemma, users: int, prompt: int, new: int) -> float:
    """tok/s of ``users`` requests behind their first tokens."""
    found = gemma.complete(prompts(gemma, users, prompt), greedy(new))
    _sound(found)
    return sum(each.stats.generated_tokens - 1 for each in found) / max(each.stats.decode_seconds for each in found)


def prefill(gemma: Gemma, length: int) -> float:
    """tok/s of one prompt until its first token."""
    found = gemma.complete(prompts(gemma, 1, length), greedy(1))
    _sound(found)
    return length / found[0].stats.prefill_seconds


def many(gemma: Gemma, count: int, prompt: int, new: int) -> float:
    """New tokens a second of ``count`` requests that come at once, prompts and waiting included."""
    asked = prompts(gemma, count, prompt)
    started = time.perf_counter()
    found = gemma.complete(asked, greedy(new))
    seconds = time.perf_counter() - started
    _sound(found)
    return count * new / seconds


def greedy(new: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True)


def _sound(found: list) -> None:  # type: ignore[type-arg]
    for each in found:
        if each.error is not None:
            raise GemcutError(each.error)


def measure(gemma: Gemma, count: int, rows: dict[str, Row], options: argparse.Namespace) -> None:
    """Add each row's speeds with ``count`` devices."""
    tiny = options.quick
    new, long = (8, 64) if tiny else (USERS_NEW, 4096)
    work = {
        **{
            f"decode of {users}": partial(decode, gemma, users, USERS_PROMPT // (8 if tiny else 1), new)
            for users in options.users
        },
        f"prefill of {long:,}": lambda: prefill(gemma, long),
        f"{8 if tiny else MANY} requests": lambda: many(
            gemma, 8 if tiny else MANY, 32 if tiny else MANY_PROMPT, 8 if tiny else MANY_NEW
        ),
    }  # fmt: skip
    for name, run in work.items():
        run()  # what is compiled and allocated at first
        speeds = [run() for _ in range(options.repetitions)]
        rows.setdefault(name, Row(name)).speeds[count] = speeds
        progress(f"{count} devices, {name}: {statistics.median(speeds):,.1f} tok/s")


def compare(folder: str, weights: str, options: argparse.Namespace) -> list[Row]:
    """All rows of one format."""
    rows: dict[str, Row] = {}
    for count in (1, options.gpus):
        gemma = Gemma.load(
            folder,
            dtype="float32" if options.device == "cpu" else "bfloat16",
            device=options.device,
            gpus=count,
            quantization=None if weights == "bf16" else weights,
            max_context=min(8192, 512 if options.quick else 8192),
            max_batch_tokens=4096 if options.device == "cuda" else None,
            progress=False,
        )
        measure(gemma, count, rows, options)
        gemma.loop.close()
        if gemma.team is not None:
            gemma.team.close()
        del gemma
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return list(rows.values())


def table(weights: str, rows: list[Row], count: int) -> str:
    """A Markdown table of one format."""
    lines = [f"| {weights} | 1 device, tok/s | {count} devices, tok/s | ratio |", "|---|---|---|---|"]
    for row in rows:
        one, all_ = (statistics.median(row.speeds[each]) for each in (1, count))
        lines.append(f"| {row.name} | {one:,.1f} | {all_:,.1f} | {row.ratio(count):.2f} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options. Ends the program where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, help="how many, 2 to 8")
    parser.add_argument("--size", choices=("tiny", *SIZES), default="27b", help="shape of the random checkpoint")
    parser.add_argument("--model", help="a folder or name of a real checkpoint instead")
    parser.add_argument("--layers", type=int, help="so many layers of the shape alone")
    parser.add_argument("--weights", default="bf16,nf4", help="formats, of bf16, int8, nf4, fp4")
    parser.add_argument("--users", default="1,16,64", help="requests that decode together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="short prompts and answers: to try the program out")
    options = parser.parse_args(arguments)
    options.weights = options.weights.split(",")
    if unknown := set(options.weights) - {"bf16", "int8", "nf4", "fp4"}:
        parser.error(f"--weights has {', '.join(sorted(unknown))}; expected bf16, int8, nf4 or fp4")
    try:
        options.users = [int(each) for each in options.users.split(",")]
    except ValueError:
        parser.error(f"--users is {options.users}; expected numbers such as 1,16,64")
    if not 2 <= options.gpus <= 8 or min(options.users) < 1 or options.repetitions < 1:
        parser.error("--gpus takes 2 to 8, --users and --repetitions numbers from 1 on")
    if options.device == "cuda" and torch.cuda.device_count() < options.gpus:
        parser.error(f"--gpus is {options.gpus}, but there are {torch.cuda.device_count()} GPUs; try --device cpu")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    progress(f"sums over {options.gpus} devices")
    times = sums(options.gpus, options.device, 5 if options.quick else 200)
    print(f"| bytes | sum over {options.gpus} devices, µs |\n|---|---|")
    for nbytes, microseconds in zip(SUMS, times, strict=True):
        print(f"| {nbytes:,} | {microseconds:,.1f} |")
    with tempfile.TemporaryDirectory(prefix="gemcut-") as folder:
        name = options.model
        if name is None:
            name = str(Path(folder) / "model")
            progress(f"writing a random checkpoint of {options.size}")
            write_random(Path(name), shape(options.size, options.layers))
        for weights in options.weights:
            print("\n" + table(weights, compare(name, weights, options), options.gpus))


if __name__ == "__main__":
    try:
        main()
    except GemcutError as error:
        sys.exit(f"error: {error}")
