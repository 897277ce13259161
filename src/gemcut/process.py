"""What this process can compute with: a bounded number of threads, and not as the fork of one that has computed.

PyTorch's threads do not survive a fork: the child waits for ever for threads that it does not have. Whoever is about to
compute calls ``enter``; a child that does so after its parent had done it gets an error instead.
"""

from __future__ import annotations

import os

from gemcut.errors import ParameterError, UnsupportedError

#: As many as the kernels' own pool takes. Tens of thousands end the process: the system cannot start them.
MOST_THREADS = max(256, os.cpu_count() or 1)

_entered = False
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = _entered


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def enter() -> None:
    """Say that this process computes from now on. Raises as ``check`` and ``check_threads`` do."""
    global _entered
    check()
    import torch

    check_threads(torch.get_num_threads(), "the number of PyTorch's threads (torch.set_num_threads)")
    _entered = True


def check() -> None:
    """Raise UnsupportedError in a child that was forked from a process that had computed."""
    if _forked:
        raise UnsupportedError(
            "this process was forked from one that had loaded a model, and PyTorch's threads do not survive a fork; "
            'start workers with multiprocessing.get_context("spawn") and load the model in each of them'
        )


def check_threads(count: int, name: str) -> None:
    """Raise ParameterError where ``count`` threads, called ``name``, are none or more than could be started."""
    if not 1 <= count <= MOST_THREADS:
        raise ParameterError(f"{name} is {count}; expected from 1 to {MOST_THREADS}")
