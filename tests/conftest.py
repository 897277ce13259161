"""Fixtures the whole suite shares."""

from __future__ import annotations

import os

# Quiet and offline, before any library reads these.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a person has chosen for the command line must not change what tests see.
os.environ["XDG_CONFIG_HOME"] = os.devnull

# Workers of pytest-xdist share the processors, and so do the commands that their tests start.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, PROCESSORS // WORKERS)))

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

import read_once  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        read_once.install(patch)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch.cuda.is_available() is false here")
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # keywords hold folders' names, too: a clone named gpu
            item.add_marker(skip)
