"""What the leading process and its workers tell each other, and how a worker is started.

Messages are values of Python's own kinds through an unnamed socket that the two alone hold. Between two processes of
one program on one Python, ``marshal`` is the quickest form of them; nothing that comes from elsewhere is read with it.
"""

from __future__ import annotations

import marshal
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gemcut
from gemcut.engine.cache import Tables
from gemcut.model.key_values import Span

#: Kinds of messages to a worker.
CACHE, STEP, HEAD, END = "cache", "step", "head", "end"
#: Kinds of messages from a worker.
READY, LOADED, FAILED, LOST = "ready", "loaded", "failed", "lost"


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know; of Python's own kinds.

    Attributes:
        rank: the worker's, from 1; the leader is 0.
        size: how many ranks there are.
        backend: "gloo" or "nccl".
        folder: where the ranks meet.
        device: the rank's, "cpu" or "cuda:N".
        kind: of the checkpoint, "folder" or "gguf".
        path: where it is.
        dtype: compute dtype, "bfloat16" or "float32".
        quantization: fields of the Quantization that the weights are cut to; None: as they are.
        attention: an attention implementation's name, or "auto".
        kernels: "auto" or "plain".
        threads: CPU threads to compute with.
    """

    rank: int
    size: int
    backend: str
    folder: str
    device: str
    kind: str
    path: str
    dtype: str
    quantization: dict[str, Any] | None
    attention: str
    kernels: str
    threads: int


def send(connection: Connection, kind: str, *values: Any) -> None:
    """Send a message. Raises OSError where nobody is at the other end."""
    connection.send_bytes(marshal.dumps((kind, *values)))


def receive(connection: Connection) -> tuple[Any, ...]:
    """Wait for a message. Raises EOFError or OSError where nobody is at the other end."""
    message: tuple[Any, ...] = marshal.loads(connection.recv_bytes())
    return message


def batch_message(
    ids: list[int], positions: list[int], spans: Sequence[Span], tables: Sequence[Tables], wanted: list[int]
) -> tuple[Any, ...]:
    """A batch as values that can be sent."""
    return (
        ids,
        positions,
        [(span.start, span.length, span.context_length) for span in spans],
        [(each.full, each.sliding, each.first_sliding) for each in tables],
        wanted,
    )


def batch_of(values: tuple[Any, ...]) -> tuple[list[int], list[int], list[Span], list[Tables], list[int]]:
    """The batch that ``batch_message`` was given."""
    ids, positions, spans, tables, wanted = values
    return ids, positions, [Span(*span) for span in spans], [Tables(*each) for each in tables], wanted


@dataclass(eq=False)
class Worker:
    """A worker as the leader sees it; ``life`` is a pipe's end whose closing tells the worker to go."""

    rank: int
    device: str
    process: subprocess.Popen[bytes]
    connection: Connection
    life: int


def start(job: Job) -> Worker:
    """Start the process of a rank. Neither the program's main module nor its arguments are run again there."""
    ours, theirs = socket.socketpair()
    life, held = os.pipe()
    source = str(Path(gemcut.__file__).resolve().parents[1])
    paths = [source, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(job.threads)}
    try:
        process = subprocess.Popen(
            # -P: no folder that the program happens to be in is searched for modules
            [sys.executable, "-P", "-m", "gemcut.parallel.worker", str(theirs.fileno()), str(life), str(os.getpid())],
            pass_fds=(theirs.fileno(), life),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
        )
    except BaseException:
        os.close(held)
        raise
    finally:
        theirs.close()
        os.close(life)
    connection = Connection(ours.detach())
    send(connection, "job", asdict(job))
    return Worker(job.rank, job.device, process, connection, held)
