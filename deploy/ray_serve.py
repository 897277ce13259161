"""gemcut under Ray Serve: several replicas of one model behind Ray's proxy, as many as there is work for.

    pip install 'gemcut[serve]' 'ray[serve]'
    GEMCUT_MODEL=2b-it RAY_USAGE_STATS_ENABLED=0 serve run deploy.ray_serve:app

Each replica is a whole server in a process of its own; requests go to the one with the fewest. Ray's proxy listens at
127.0.0.1:8000; keys, hosts and origins are checked here, behind it. `REPLICAS` is most of them ("2" or "1-4").
"""

from __future__ import annotations

import os

from ray import serve

from gemcut.gemma import Gemma
from gemcut.server.app import App
from gemcut.server.auth import HostGate, KeyGate
from gemcut.server.keys import read_keys
from gemcut.server.state import ServerSettings, ServerState

MODEL = os.environ["GEMCUT_MODEL"]
KEYS = os.environ.get("GEMCUT_API_KEY_FILE")
LEAST, _, MOST = os.environ.get("REPLICAS", "1").partition("-")


def build() -> App:
    """One replica's application, with its own model."""
    state = ServerState(ServerSettings(names=(MODEL,)))
    state.gates = [HostGate(loopback=KEYS is None), KeyGate(read_keys(KEYS) if KEYS else None)]
    state.gemma = Gemma.load(MODEL, progress=False)
    return App(state)


@serve.deployment(
    autoscaling_config={
        "min_replicas": int(LEAST),
        "max_replicas": int(MOST or LEAST),
        "target_ongoing_requests": 16,  # answers computed together; more of them are another replica's
    },
    max_ongoing_requests=64,
    graceful_shutdown_timeout_s=30,
)
@serve.ingress(build)
class Replica:
    """What Ray starts, watches and ends."""


app = Replica.bind()
