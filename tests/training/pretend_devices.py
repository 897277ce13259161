"""Run by tests in a process of its own, with pretend CPU devices: two steps on a mesh, told as JSON.

usage: pretend_devices.py R,D,M [FOLDER R,D,M]   With FOLDER, orbax saves the state and restores it on the second mesh.
"""

from __future__ import annotations

import dataclasses
import json
import sys
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
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from gemcut.training.fit_step import sharded_network
    from gemcut.training.optimizer import OptimizerConfig
    from gemcut.training.sharding import BATCH, Shardings, host_mesh
    from gemcut.training.step import Step
    from gemcut.training.topology import parse_mesh

    shape = parse_mesh(sys.argv[1])
    mesh = host_mesh(shape)
    own = Shardings(CONFIG, mesh)
    network = sharded_network(CONFIG, own, "xla", "full")
    network = dataclasses.replace(network, compute_dtype=jnp.float32)
    step = Step(network, OptimizerConfig(rate=1e-2, warmup=0), steps=10, hold=own.hold)
    keep = own.like(jax.eval_shape(step.fresh, jax.random.key(0)))
    state = jax.jit(step.fresh, out_shardings=keep)(jax.random.key(0))
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 64, (2, 8, 12)).astype(np.int32)
    segments = np.where(np.arange(12) < 7, 1, 2).astype(np.int32) + np.zeros((2, 8, 1), np.int32)
    positions = np.where(np.arange(12) < 7, np.arange(12), np.arange(12) - 7).astype(np.int32) + 0 * segments
    place = NamedSharding(mesh, P(None, BATCH, None))
    rows = driver.rows(8)
    run = jax.jit(step, donate_argnums=0, out_shardings=(keep, own.whole))
    losses = []
    for _ in range(2):
        batch = {
            name: driver.put(np.ascontiguousarray(array[:, rows]), place)
            for name, array in (("tokens", tokens), ("segments", segments), ("positions", positions))
        }
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"]))
    told: dict[str, Any] = {"devices": jax.device_count(), "losses": losses}
    leaves = jax.tree_util.tree_leaves_with_path(state)
    told["on_fewer_devices"] = [
        jax.tree_util.keystr(path) for path, leaf in leaves if len(leaf.sharding.device_set) != mesh.size
    ]
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

        other = Shardings(CONFIG, host_mesh(parse_mesh(sys.argv[3])))
        wanted = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state, other.like(state)
        )
        with ocp.StandardCheckpointer() as saver:
            saver.save(Path(sys.argv[2]).absolute() / "state", state)
            saver.wait_until_finished()
            back = saver.restore(Path(sys.argv[2]).absolute() / "state", wanted)
        pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True))
        told["equal"] = all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
        told["moved"] = sum(a.sharding != b.sharding for a, b in pairs)
    if driver.leads:
        print(f"\n{json.dumps(told)}")


main()
