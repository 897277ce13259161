"""What the HTTP server costs: CPU of its own for a request and for a streamed token, with an engine that costs nothing.

    python benchmarks/serving_http.py

The engine is a thread that gives every request a token of a real text at each step, through the real detokenizer; the
clients are another process, which only reads. CPU is what the two threads of the server used (`time.thread_time`), not
wall time, so that a busy machine changes little. A step waits until the one before it is on the sockets: each token is
a chunk of its own, as with a real engine.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn
from serving_http_client import TEXT

from gemcut.checkpoint.resolve import resolve
from gemcut.config import GemmaConfig
from gemcut.engine import EngineConfig
from gemcut.engine.request import Sequence as Living
from gemcut.engine.request import TokenEvent
from gemcut.gemma import Gemma
from gemcut.model import Model
from gemcut.server import run
from gemcut.server.app import App
from gemcut.server.logs import Log
from gemcut.server.state import ServerSettings, ServerState
from gemcut.text import Tokenizer

CLIENT = str(Path(__file__).with_name("serving_http_client.py"))
#: A network that is never run; it gives the engine its sizes.
SHAPE = {
    "model_type": "gemma2", "vocab_size": 262_144, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8,
    "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "query_pre_attn_scalar": 8,
    "sliding_window": 64, "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "rope_theta": 10000.0,
}  # fmt: skip


class FreeLoop:
    """An EngineLoop whose network costs nothing: each step gives every living request its next token."""

    def __init__(self, gemma: Gemma, tokens: Sequence[int]) -> None:
        self.engine = gemma.loop.engine
        self._tokens = list(tokens)
        self._inbox: queue.SimpleQueue[list[Living] | None] = queue.SimpleQueue()
        self._listener: Callable[[Sequence[TokenEvent]], None] = lambda events: None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.seconds = 0.0  # CPU of this thread: detokenizing, events, the wake-up
        self.steps = self.events = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def prepare(self, request: Any) -> Living:
        return self.engine.prepare(request)

    def listen(self, listener: Callable[[Sequence[TokenEvent]], None] | None) -> None:
        self._listener = listener or self._listener

    def start(self, sequences: Sequence[Living]) -> None:
        self._inbox.put(list(sequences))

    def cancel(self, sequence: Living) -> bool:
        sequence.unwanted = True
        return not sequence.finished

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _work(self) -> None:
        living: list[Living] = []
        delivered = threading.Event()
        while True:
            while not living or not self._inbox.empty():
                message = self._inbox.get()
                if message is None:
                    return
                living += message
            started = time.thread_time()
            texts = [self._text(sequence) for sequence in living]
            self.seconds += time.thread_time() - started
            events = [self._event(*each) for each in zip(living, texts, strict=True)]
            living = [sequence for sequence in living if not sequence.finished]
            started = time.thread_time()
            self._listener(events)
            self.seconds += time.thread_time() - started
            self.steps += 1
            self.events += len(events)
            delivered.clear()
            assert self.loop is not None
            self.loop.call_soon_threadsafe(self._behind, delivered, 3)
            delivered.wait()

    def _behind(self, delivered: threading.Event, turns: int) -> None:
        """Set ``delivered`` some turns of the event loop later: the tasks that were woken have written by then."""
        if turns and self.loop is not None:
            self.loop.call_soon(self._behind, delivered, turns - 1)
        else:
            delivered.set()

    def _text(self, sequence: Living) -> str:
        """The text of its next token."""
        sink = sequence.sink
        return "" if sink is None else sink.push(self._tokens[len(sequence.events) % len(self._tokens)])

    def _event(self, sequence: Living, text: str) -> TokenEvent:
        """What the engine does with it, at its own cost."""
        now = time.perf_counter()
        sequence.started = sequence.started or now
        sequence.first_token = sequence.first_token or now
        count = len(sequence.events)
        last = count + 1 >= sequence.request.params.max_new_tokens or sequence.unwanted
        token = self._tokens[count % len(self._tokens)]
        event = TokenEvent(sequence.id, token, text, finish_reason="length" if last else None)
        if last:
            sequence.ended = now
        sequence.add(event)
        return event


def new_gemma(tokenizer: Tokenizer) -> Gemma:
    """A model whose loop is free."""
    with torch.device("cpu"):
        model = Model(GemmaConfig.from_dict(SHAPE), dtype=torch.float32)
    gemma = Gemma(model, tokenizer, torch.device("cpu"), engine=EngineConfig(sequences=1))
    gemma.loop = FreeLoop(gemma, tokenizer.encode(TEXT, add_bos=False))  # type: ignore[assignment]
    return gemma


class Host:
    """The server in a thread, and the CPU time of that thread."""

    def __init__(self, gemma: Gemma) -> None:
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        state = ServerState(ServerSettings(names=("free",), max_requests=100_000), log=Log(nowhere))
        state.gemma = gemma
        self.free: FreeLoop = gemma.loop  # type: ignore[assignment]
        listener = run.open_port("127.0.0.1", 0)
        self.port: int = listener.getsockname()[1]
        self.server = run.Server(run.config_of(App(state)), state)
        self.state = state
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        while self.server._loop is None:
            time.sleep(0.01)
        self.free.loop = self.server._loop

    def cpu(self) -> float:
        """CPU seconds of the server's thread up to now."""
        found: queue.SimpleQueue[float] = queue.SimpleQueue()
        assert self.server._loop is not None
        self.server._loop.call_soon_threadsafe(lambda: found.put(time.thread_time()))
        return found.get()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.free.close()


class Plain:
    """The floor: the same chunks by a plain ASGI application under uvicorn, with one wake-up a step."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.waiting = tokens, []  # type: tuple[int, list[asyncio.Future[None]]]
        self.chunk = b"data: " + b"x" * 240 + b'"delta":{"content"\n\n'
        self.whole = b'{"x":{"x":{"x":"' + b"x" * 600 + b'"}}}'
        listener = run.open_port("127.0.0.1", 0)
        self.port: int = listener.getsockname()[1]
        self.server = uvicorn.Server(
            uvicorn.Config(self, http="httptools", ws="none", lifespan="off", log_config=None, access_log=False)
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread.start()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.loop = asyncio.get_running_loop()
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if b'"stream": false' in body:
            head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.whole))]
            await send({"type": "http.response.start", "status": 200, "headers": head})
            await send({"type": "http.response.body", "body": self.whole})
            return
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for _ in range(self.tokens):
            future = self.loop.create_future()
            self.waiting.append(future)
            await future
            await send({"type": "http.response.body", "body": self.chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    def _step(self, done: Callable[[float], None], turns: int) -> None:
        if turns == 3:
            waiting, self.waiting = self.waiting, []
            for future in waiting:
                future.set_result(None)
        if turns:
            self.loop.call_soon(self._step, done, turns - 1)  # type: ignore[union-attr]
        else:
            done(time.thread_time())

    def measure(self, connections: int) -> float:
        """µs of the server's thread a chunk, once all connections stream."""
        words = [str(value) for value in (self.port, connections, 1, self.tokens, 1)]
        clients = subprocess.Popen([sys.executable, CLIENT, *words], stdout=subprocess.PIPE)
        while len(self.waiting) < connections:
            time.sleep(0.01)
        times: queue.SimpleQueue[float] = queue.SimpleQueue()
        assert self.loop is not None
        found = []
        for _ in range(self.tokens):
            self.loop.call_soon_threadsafe(self._step, times.put, 3)
            found.append(times.get())
        clients.wait()
        assert clients.stdout is not None
        clients.stdout.close()
        return (found[-1] - found[0]) / (self.tokens - 1) / connections * 1e6

    def request(self, requests: int) -> float:
        """µs of the server's thread a JSON request on 16 connections."""
        words = [str(value) for value in (self.port, 16, requests // 16, 1, 0)]
        before = self.cpu()
        subprocess.run([sys.executable, CLIENT, *words], capture_output=True, check=True)
        return (self.cpu() - before) / (requests // 16 * 16) * 1e6

    def cpu(self) -> float:
        """CPU seconds of the server's thread up to now."""
        found: queue.SimpleQueue[float] = queue.SimpleQueue()
        assert self.loop is not None
        self.loop.call_soon_threadsafe(lambda: found.put(time.thread_time()))
        return found.get()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()


def load(host: Host, connections: int, requests: int, tokens: int, stream: bool) -> dict[str, float]:
    """Run the clients; what it cost."""
    free = host.free
    before, engine, steps, events = host.cpu(), free.seconds, free.steps, free.events
    words = [str(value) for value in (host.port, connections, requests, tokens, int(stream))]
    done = subprocess.run([sys.executable, CLIENT, *words], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    found |= {"server": host.cpu() - before, "engine": free.seconds - engine}
    found |= {"steps": free.steps - steps, "events": free.events - events}
    return found


def without_text(gemma: Gemma) -> Callable[[], None]:
    """Let the template and the tokenizer cost nothing; what is returned undoes it."""
    ids = gemma.chat_ids
    kept = ids([{"role": "user", "content": TEXT}], _options())
    gemma.chat_ids = lambda messages, options: kept  # type: ignore[method-assign]

    def undo() -> None:
        gemma.chat_ids = ids  # type: ignore[method-assign]

    return undo


def _options() -> Any:
    from gemcut.text import ChatOptions

    return ChatOptions()


def show(name: str, values: list[float], unit: str) -> None:
    middle = statistics.median(values)
    spread = f"{min(values):,.1f} to {max(values):,.1f}"
    print(f"{name:<66} {middle:>10,.1f} {unit:<12} ({spread})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connections", default="1,64,192", help="streaming clients at one time")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each stream")
    parser.add_argument("--requests", type=int, default=2000, help="JSON requests on 16 connections, in all")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--model", default="gemma-3-270m", help="whose tokenizer is used")
    options = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("uvicorn", "httptools", "msgspec")}
    try:
        versions["uvloop"] = importlib.metadata.version("uvloop")
    except importlib.metadata.PackageNotFoundError:
        versions["uvloop"] = "none"
    print(f"device: {_processor()}; Python {platform.python_version()}; {versions}")
    print(f"{options.repetitions} repetitions; median (least to most); µs of CPU of one core")
    tokenizer = resolve(options.model, weights=True).tokenizer()
    tokenizer.prepare()  # as the server's start does
    host = Host(new_gemma(tokenizer))
    plain = Plain(options.tokens)
    load(host, 4, 20, 4, False)  # warms up
    load(host, 8, 1, 50, True)
    for connections in (int(part) for part in options.connections.split(",")):
        floor, ours = [], []
        for _ in range(options.repetitions):  # in turns
            floor.append(plain.measure(connections))
            ours.append(streams(host, connections, options.tokens))
        title = f"{connections} streams"
        show(f"{title}: a chunk of plain ASGI on uvicorn, nothing else", floor, "µs")
        show(f"{title}: a chunk, from the engine's event to the socket", [sum(one) for one in ours], "µs")
        show("  of it in the engine's thread: detokenizer, wake-up", [one[1] for one in ours], "µs")
        show("  of it above plain ASGI", [sum(one) - low for one, low in zip(ours, floor, strict=True)], "µs")
        show("  chunks a second of the server's thread", [1e6 / one[0] for one in ours], "chunks/s")
    for bare in (False, True):
        undo = without_text(host.state.gemma) if bare and host.state.gemma is not None else lambda: None
        floor, runs = [], []
        for _ in range(options.repetitions):  # in turns
            floor.append(plain.request(options.requests))
            runs.append(load(host, 16, options.requests // 16, 1, False))
        undo()
        show("a JSON request of plain ASGI on uvicorn, nothing else", floor, "µs")
        name = "a JSON request of one token" + (", without template and tokenizer" if bare else ", all of it")
        count = options.requests // 16 * 16
        show(name, [(one["server"] + one["engine"]) / count * 1e6 for one in runs], "µs")
    host.close()
    plain.close()


def streams(host: Host, connections: int, tokens: int) -> tuple[float, float]:
    """µs a chunk of (the server's thread, the engine's thread): long streams less short ones, so that what a request
    costs falls out."""
    long, short = (load(host, connections, 1, count, True) for count in (tokens, tokens // 4))
    chunks = long["chunks"] - short["chunks"]
    assert chunks > 0.9 * connections * (tokens - tokens // 4), (long, short)  # a token is a chunk of its own
    return tuple((long[name] - short[name]) / chunks * 1e6 for name in ("server", "engine"))  # type: ignore[return-value]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
