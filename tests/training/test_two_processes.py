"""Two processes of four pretend devices each, over gloo: one batch, one sum, one network gathered by both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

_PROGRAM = """
import numpy as np
from gemcut.training.driver import start
driver = start()
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from gemcut.config import FAMILY
from gemcut.training.parameters import build
from gemcut.training.placing import gathered, place
assert (len(jax.devices()), len(jax.local_devices())) == (8, 4)
mesh = Mesh(np.array(jax.devices()), ("data",))
rows = NamedSharding(mesh, P("data"))
batch = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
placed = driver.put(batch[driver.rows(16)], rows)
total = float(jax.jit(lambda x: (x * x).sum())(placed))
base = FAMILY["gemma-2-2b"]
config = base.replace(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=4, layer_types=base.layer_types[:2])
from gemcut.training.export import hugging_face_shapes
stored = {n: np.random.default_rng(i).standard_normal(s, np.float32)
    for i, (n, s) in enumerate(hugging_face_shapes(config).items())}
split = {"embed": "data"}
tree = place(config, stored.__getitem__, build(config, lambda w: NamedSharding(mesh, P(*map(split.get, w.leaf_axes)))))
same = all(np.array_equal(v, stored[n]) for n, v in gathered(config, tree))
print()  # gloo writes to the same stream
print(driver.kind, driver.process, driver.leads, total, same)
"""


def test_both_processes_see_the_same() -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "GEMCUT_COORDINATOR": f"127.0.0.1:{port}",
        "GEMCUT_PROCESSES": "2",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            env={**shared, "GEMCUT_PROCESS": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        ended = [process.communicate(timeout=90) for process in started]
    finally:
        for process in started:
            process.kill()
    total = float(sum(n * n for n in range(48)))
    for i, (out, err) in enumerate(ended):
        assert out.splitlines()[-1].split() == ["controllers", str(i), str(i == 0), str(total), "True"], err[-3000:]
