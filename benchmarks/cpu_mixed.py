"""Steps of many users on a CPU: 8 answers together, a prompt's chunk, both in one step. The 2B shape, random weights.

    python benchmarks/cpu_mixed.py --layers 4 --formats nf4,int8,bf16 --peer

Milliseconds a step, median and smallest. With ``--layers`` there are fewer layers, which makes the head's part larger.
``--peer`` runs transformers' decode step of as many answers beside it, on the same bf16 weights, in turns.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time

import torch
from cpu_inference import CPU, OURS, network, random_tensors
from options import names_of

from gemcut.config import FAMILY
from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.model import Model

USERS, CONTEXT = 8, 64


class Steps:
    """One engine whose steps are timed, each kind after the state it needs was made."""

    def __init__(self, model: Model, chunk: int) -> None:
        self.model, self.chunk = model, chunk
        self.engine = Engine(model, CPU, EngineConfig(max_context=1024, sequences=USERS + 1))
        self.chance = torch.Generator().manual_seed(1)

    def _submit(self, length: int, new: int) -> None:
        ids = torch.randint(10, self.model.config.vocab_size, (length,), generator=self.chance).tolist()
        params = SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True)
        self.engine.submit(Request(prompt_ids=tuple(ids), params=params))

    def _timed(self) -> float:
        start = time.perf_counter()
        self.engine.step()
        return 1000 * (time.perf_counter() - start)

    def round(self) -> dict[str, float]:
        """Each kind of step once."""
        self._submit(self.chunk, 1)
        found = {"chunk": self._timed()}
        for _ in range(USERS):
            self._submit(CONTEXT, 100)
        while any(sequence.output_length == 0 for sequence in self.engine._sequences.values()):
            self.engine.step()
        found["answers"] = self._timed()
        self._submit(self.chunk, 1)
        found["both"] = self._timed()
        self.engine.reset()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", type=names_of("format", OURS), default=list(OURS))
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()
    config = FAMILY["gemma-2-2b"]
    config = config.replace(num_hidden_layers=options.layers, layer_types=config.layer_types[: options.layers])
    tensors = random_tensors(config)
    threads = torch.get_num_threads()
    print(f"{platform.processor() or platform.machine()}, {threads} threads, torch {torch.__version__}")
    print(f"{options.layers} layers, {USERS} answers, a chunk of {options.chunk}; ms a step, median (smallest)")
    for name in options.formats:
        model = network(config, tensors, OURS[name])
        steps, peer = Steps(model, options.chunk), None
        if options.peer and name == "bf16":
            from transformers_peer import as_transformers, transformers_seconds

            peer = as_transformers(model)
        found: dict[str, list[float]] = {}
        for repetition in range(options.repeat + 1):
            row = steps.round()
            if peer is not None:
                prompts = torch.randint(10, config.vocab_size, (USERS, CONTEXT)).tolist()
                row["transformers, answers"] = 500 * transformers_seconds(peer, prompts, 2)[1]
            for kind, value in row.items() if repetition else ():
                found.setdefault(kind, []).append(value)
        print(f"{name}: {', '.join(f'{k} {statistics.median(v):.0f} ({min(v):.0f})' for k, v in found.items())}")
        del model, steps, peer
        gc.collect()


if __name__ == "__main__":
    main()
