"""Run by tests in a process of its own, with pretend CPU devices: two steps on a mesh, told as JSON.

usage: pretend_devices.py R,D,M [FOLDER R,D,M]   With FOLDER, orbax saves the state, restores it on the second
mesh, and both make the next step.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gemcut.config import GemmaConfig
from gemcut.training.driver import start

CONFIG = GemmaConfig.from_dict(
    {
        "model_type": "gemma2",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 4,
        "sliding_window": 5,
        "max_position_embeddings": 64,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    }
)


def main() -> None:
    driver = start()
    import jax
    import jax.numpy as jnp

    from gemcut.training.fit_step import sharded_network
    from gemcut.training.optimizer import OptimizerConfig
    from gemcut.training.placed import PlacedStep
    from gemcut.training.sharding import Shardings, host_mesh
    from gemcut.training.step import Step
    from gemcut.training.topology import parse_mesh

    def on(text: str) -> PlacedStep:
        own = Shardings(CONFIG, host_mesh(parse_mesh(text)))
        network = replace(sharded_network(CONFIG, own, "xla", "full"), compute_dtype=jnp.float32)
        return PlacedStep(Step(network, OptimizerConfig(rate=1e-2, warmup=0), steps=10, rows=32, hold=own.hold), own)

    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 64, (2, 8, 12)).astype(np.int32)
    segments = np.where(np.arange(12) < 7, 1, 2).astype(np.int32) + np.zeros((2, 8, 1), np.int32)
    positions = np.where(np.arange(12) < 7, np.arange(12), np.arange(12) - 7).astype(np.int32) + 0 * segments
    rows = driver.rows(8)

    def batch(step: PlacedStep) -> dict[str, Any]:
        named = (("tokens", tokens), ("segments", segments), ("positions", positions))
        return {name: driver.put(np.ascontiguousarray(array[:, rows]), step.rows) for name, array in named}

    first = on(sys.argv[1])
    own = first.shardings
    state = first.fresh(0)
    losses = []
    for _ in range(2):
        state, metrics = first.run(state, batch(first))
        losses.append(float(metrics["loss"]))
    told: dict[str, Any] = {"devices": jax.device_count(), "losses": losses}
    leaves = jax.tree_util.tree_leaves_with_path(state)
    told["on_fewer_devices"] = on_fewer(state, own.mesh.size)
    told["whole"] = sorted(
        jax.tree_util.keystr(path)
        for path, leaf in leaves
        if leaf.ndim > 1 and leaf.size > 64 and leaf.sharding.is_fully_replicated
    )
    total = jax.jit(partial(jax.tree.map, lambda x: jnp.abs(x.astype(jnp.float32)).sum()), out_shardings=own.whole)
    sums = jax.tree_util.tree_leaves_with_path(total(state))
    told["sums"] = {jax.tree_util.keystr(path): float(leaf) for path, leaf in sums}
    if len(sys.argv) > 2:
        import orbax.checkpoint as ocp

        other, folder = on(sys.argv[3]), Path(sys.argv[2]).absolute() / "state"
        with ocp.StandardCheckpointer() as saver:
            saver.save(folder, state)
            saver.wait_until_finished()
            back = saver.restore(folder, other.state)
        told["on_fewer_devices"] += on_fewer(back, own.mesh.size)
        pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True))
        told["equal"] = driver.processes > 1 or all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
        told["moved"] = sum(a.sharding != b.sharding for a, b in pairs)
        told["next"] = float(first.run(state, batch(first))[1]["loss"])
        told["next_elsewhere"] = float(other.run(back, batch(other))[1]["loss"])
    if driver.leads:
        print(f"\n{json.dumps(told)}")


def on_fewer(state: Any, devices: int) -> list[str]:
    """The arrays that do not lie on all devices."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [jax.tree_util.keystr(path) for path, leaf in leaves if len(leaf.sharding.device_set) != devices]


main()
