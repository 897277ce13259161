"""How much memory and time ``gemcut quantize`` and cutting while loading take on layers of full width.

Writes a random bf16 checkpoint in shards (the family member's true width and vocabulary, a few layers), cuts it in a
process of its own, and prints that process's peak memory: all of it, and the part that is not file pages, which the
system can take back. The speed is compared with cutting the same matrices in memory, without any file.

    python benchmarks/quantize_memory.py --model gemma-2-27b --layers 2 --to nf4 --folder /somewhere/with/space
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from gemcut.checkpoint.names import expected_shapes, to_hf
from gemcut.checkpoint.shard import ShardWriter
from gemcut.config import FAMILY, GemmaConfig
from gemcut.quantization.spec import Quantization
from gemcut.quantization.stream import quantize_tensor

GB = 10**9


def write_checkpoint(folder: Path, config: GemmaConfig, shard_bytes: int) -> int:
    """A random checkpoint; returns its bytes. One stretch of random numbers is used again and again."""
    stretch = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in expected_shapes(config).items():
        size = 2 * torch.Size(shape).numel()
        if held and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    weight_map = {}
    shapes = expected_shapes(config)
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        with ShardWriter(folder / file, 300 * len(names) + 300) as writer:
            for name in names:
                count = torch.Size(shapes[name]).numel()
                tensor = stretch.repeat(-(-count // stretch.numel()))[:count].view(shapes[name])
                writer.add(to_hf(name), tensor)
                weight_map[to_hf(name)] = file
            writer.finish()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "torch_dtype": "bfloat16"}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


class Watch(threading.Thread):
    """Peak memory of a process, and of its part that is no file's."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.private = pid, 0, 0

    def run(self) -> None:
        """Sample until the process ends."""
        while True:
            try:
                fields = dict(
                    line.split(":", 1)
                    for line in Path(f"/proc/{self.pid}/status").read_text().splitlines()
                    if ":" in line
                )
                self.peak = max(self.peak, 1024 * int(fields["VmHWM"].split()[0]))
                self.private = max(self.private, 1024 * int(fields["RssAnon"].split()[0]))
            except (OSError, KeyError):
                return
            time.sleep(0.02)


def arithmetic(config: GemmaConfig, spec: Quantization) -> float:
    """Bytes of bf16 a second that are cut in memory."""
    weight = torch.randn(4096, config.hidden_size).mul_(0.02).bfloat16()
    quantize_tensor("warm", weight, spec)
    started, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < 3:
        quantize_tensor("weight", weight, spec)
        done += weight.nbytes
    return done / seconds


_LOAD = """
import sys, torch
from pathlib import Path
from gemcut.checkpoint.resolve import resolve
from gemcut.loading import load_network
from gemcut.quantization.spec import Quantization
status = lambda: {k: v for k, v in (l.split(":", 1) for l in Path("/proc/self/status").read_text().splitlines())}
before = int(status()["VmRSS"].split()[0])
model = load_network(resolve(sys.argv[1]), dtype=torch.bfloat16, device=torch.device("cpu"),
                     quantization=Quantization(sys.argv[2]))
size = sum(w.nbytes for m in model.modules() for w in getattr(m, "weights", ()))
size += sum(p.nbytes for p in model.parameters())
print(before * 1024, size)
"""


def load(source: Path, kind: str, largest: int) -> None:
    """Peak memory of a process that loads ``source`` and cuts it on the way."""
    command = [sys.executable, "-c", _LOAD, str(source), kind]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch = Watch(process.pid)
    watch.start()
    printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit("loading failed")
    watch.join()
    before, size = map(int, printed.split())
    print(f"cut while loading: {time.perf_counter() - started:.1f} s with start")
    print(
        f"  peak memory {watch.peak / GB:.2f} GB, of it not pages of files {watch.private / GB:.2f} GB; interpreter "
        f"and torch {before / GB:.2f} GB, the cut network {size / GB:.2f} GB, largest tensor {largest / GB:.2f} GB"
    )
    print(f"  above network and interpreter: {(watch.peak - size - before) / GB:.2f} GB")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-2-27b", choices=FAMILY)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--to", default="nf4", choices=("nf4", "fp4", "int8"))
    parser.add_argument(
        "--folder", type=Path, default=None, help="where there is space; a temporary folder if not given"
    )
    args = parser.parse_args()
    whole = FAMILY[args.model]
    config = dataclasses.replace(whole, num_hidden_layers=args.layers, layer_types=whole.layer_types[: args.layers])
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        source, out = Path(temporary, "source"), Path(temporary, "out")
        source.mkdir()
        size = write_checkpoint(source, config, 5 * GB)
        print(f"{args.model}, {args.layers} layers of full width: {size / GB:.2f} GB in bf16")
        command = [sys.executable, "-m", "gemcut", "quantize", str(source), str(out), "--to", args.to, "--json"]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        watch = Watch(process.pid)
        watch.start()
        if process.wait():
            raise SystemExit("gemcut quantize failed")
        seconds = time.perf_counter() - started
        watch.join()
        print(f"peak memory: {watch.peak / GB:.2f} GB, of it not pages of files: {watch.private / GB:.2f} GB")
        embedding = config.vocab_size * config.hidden_size * 2
        print(f"  largest tensor, the embedding: {embedding / GB:.2f} GB")
        linears = size - embedding
        rate = arithmetic(config, Quantization(args.to))
        print(f"time: {seconds:.1f} s with start; {size / seconds / GB:.2f} GB/s of bf16")
        print(f"cutting alone, in memory: {rate / GB:.2f} GB/s, so {linears / rate:.1f} s for these linear layers")
        load(source, args.to, embedding)
        started = time.perf_counter()
        target = Path(temporary, "copy")
        for file in sorted(out.glob("*.safetensors")):
            shutil.copyfile(file, target)
        print(f"copying the result, file to file: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
