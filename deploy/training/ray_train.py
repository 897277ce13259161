"""Many controllers on the GPUs of a Ray cluster, one process a node.

    pip install 'gemcut[train,ray]'
    RAY_USAGE_STATS_ENABLED=0 python deploy/training/ray_train.py RUN.toml DIR --nodes 4 --gpus 8

RUN.toml and DIR, the folder of the run, must be at the same path on every node. The first node's process is the coordinator. Where one process fails,
all end and this program exits with 1; started again, the run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any


def environment(coordinator: str, process: int, processes: int) -> dict[str, str]:
    """What tells one process of a run where the coordinator is and which process it is."""
    return {
        "GEMCUT_COORDINATOR": coordinator,
        "GEMCUT_PROCESSES": str(processes),
        "GEMCUT_PROCESS": str(process),
    }


def command(run: str, out: str) -> list[str]:
    """The program of each process."""
    return [sys.executable, "-m", "gemcut", "train", "run", run, out, "--resume"]


class Node:
    """One node's place in the run: lives where Ray has put it."""

    def address(self) -> str:
        """This node's address and a port that is free now."""
        import socket

        import ray

        with socket.socket() as found:
            found.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{found.getsockname()[1]}"

    def run(self, run: str, out: str, variables: dict[str, str]) -> int:
        """Start the process and wait for it; its exit status."""
        import os

        return subprocess.run(command(run, out), env={**os.environ, **variables}, check=False).returncode


def main() -> int:
    """Place one process on each node, start them together, and end them all when one fails."""
    import ray

    parser = argparse.ArgumentParser(description="Drive a training run on a Ray cluster.")
    parser.add_argument("run", help="the run's TOML file, at this path on every node")
    parser.add_argument("out", help="the folder of the run, which every node sees at this path")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each node")
    given = parser.parse_args()
    ray.init(address="auto")
    bundles = [{"CPU": 1, "GPU": given.gpus} for _ in range(given.nodes)]
    group = ray.util.placement_group(bundles, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
    nodes: list[Any] = [
        ray.remote(num_cpus=1, num_gpus=given.gpus)(Node)
        .options(scheduling_strategy=strategy(placement_group=group, placement_group_bundle_index=i))
        .remote()
        for i in range(given.nodes)
    ]
    coordinator = ray.get(nodes[0].address.remote())
    waiting = [
        node.run.remote(given.run, given.out, environment(coordinator, i, given.nodes)) for i, node in enumerate(nodes)
    ]
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1)
        if ray.get(done[0]) != 0:
            for node in nodes:  # the others would wait in a collective for ever
                ray.kill(node)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
