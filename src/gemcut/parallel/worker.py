"""A worker: the process of one rank beside the leader's. It computes what it is told, until it is told to end.

It ends at once when the leader is gone, however that one went: a thread watches a pipe whose other end the leader
holds. (Linux's parent-death signal would not do: it comes when the thread that started the process ends, and a model
may be loaded in a thread.)
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gemcut.parallel.messages import CACHE, END, FAILED, HEAD, LOADED, LOST, READY, STEP, Job, batch_of, receive, send

_LOOK_AGAIN = 0.5  # seconds


def main(fd: int, life: int, parent: int) -> None:
    """Follow the leader, process ``parent``, through the socket ``fd``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the leader decides what it ends
    threading.Thread(target=_end_with, args=(life, parent), daemon=True).start()
    connection = Connection(fd)
    from gemcut.parallel.communicator import PeerLostError

    try:
        _, job = receive(connection)
        _follow(connection, Job(**job))
    except (EOFError, OSError):
        os._exit(1)
    except PeerLostError as error:
        _tell(connection, LOST, str(error))
    except BaseException as error:
        _tell(connection, FAILED, describe(error))
    os._exit(0)  # no destructor waits for a rank that is gone


def describe(error: BaseException) -> str:
    """One line of an exception."""
    import torch

    from gemcut.errors import GemcutError

    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        return "its memory ran out: give a smaller kv_memory or max_batch_tokens, or use more devices"
    text = " ".join(str(error).split())
    return text if isinstance(error, GemcutError) else f"{type(error).__name__}: {text}"


def _end_with(life: int, parent: int) -> None:
    while not select.select([life], [], [], _LOOK_AGAIN)[0] and os.getppid() == parent:
        pass
    os._exit(1)


def _tell(connection: Connection, kind: str, text: str) -> None:
    try:
        send(connection, kind, text)
    except OSError:
        os._exit(1)


def _follow(connection: Connection, job: Job) -> None:
    import torch

    from gemcut.checkpoint.source import Source
    from gemcut.loading import load_network
    from gemcut.parallel.communicator import connect
    from gemcut.parallel.shape import Share
    from gemcut.parallel.split import Split
    from gemcut.placement.devices import free_memory
    from gemcut.quantization.spec import Quantization

    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # the context is made now, and its failure is this rank's
    source = Source(job.kind, Path(job.path), job.path)  # type: ignore[arg-type]
    config = source.config()
    send(connection, READY)
    communicator = connect(job.backend, Path(job.folder), job.rank, job.size, device)
    communicator.verify(device)
    model = load_network(
        source,
        dtype=getattr(torch, job.dtype),
        device=device,
        quantization=None if job.quantization is None else Quantization(**job.quantization),
        attention=job.attention,
        kernels=job.kernels,
        split=Split(config, Share(job.rank, job.size), communicator),
    )
    send(connection, LOADED, free_memory(device) or 0)
    follower = _Follower(model, device)
    with torch.inference_mode():
        while (message := receive(connection))[0] != END:
            follower.do(*message)


class _Follower:
    """Does what the leader says, in its order."""

    def __init__(self, model: Any, device: Any) -> None:
        self._model, self._device = model, device
        self._cache: Any = None

    def do(self, kind: str, *values: Any) -> None:
        import torch

        from gemcut.engine.cache import CacheShape, PagedCache
        from gemcut.engine.paged import PagedKeyValues
        from gemcut.engine.tensors import indices

        model, device = self._model, self._device
        if kind == CACHE:
            self._cache = PagedCache(model.config, CacheShape(*values), model.dtype, device)
        elif kind == STEP:
            ids, positions, spans, tables, wanted = batch_of(values)
            kv = PagedKeyValues(model.config, self._cache, tables, spans)
            every = None if wanted == list(range(len(ids))) else indices(wanted, device)
            model(torch.tensor(ids, device=device), torch.tensor(positions, device=device), kv, every)
        elif kind == HEAD:
            rows, width, best = values
            hidden = torch.empty((rows, width), dtype=model.dtype, device=device)
            model.embed.part.communicator.broadcast(hidden)
            if best:
                model.embed.part.best(hidden, model.embed.product, model.softcap)
            else:
                model.embed.logits(hidden)
        else:
            raise AssertionError(f"message {kind!r}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
