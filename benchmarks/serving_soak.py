"""Many mixed requests at a server with little memory for keys and values: nothing may be lost, grow or fail.

    python benchmarks/serving_soak.py                       # 20,000 requests, Gemma 3 270M, 64 cache blocks
    python benchmarks/serving_soak.py --requests 500        # a quick look

A process of its own serves; this one asks, from ``--clients`` connections at a time. Of the requests one in ten is left
before its answer, one in twenty is malformed; a few more connections read a byte a second, or never. At the end every
block must be free, no answer may have been a 5xx, and memory must be flat from the first quarter on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

TEXT = "the sky is blue and a small river runs through old green hills where nobody has lived for a hundred years"
WORDS = TEXT.split()
MALFORMED = [
    b"{",
    b"",
    b"[]",
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": "a", "unknown": 1}',
    b'{"prompt": "a", "model": "gpt-5"}',
    b'{"prompt": "' + b"word " * 3000 + b'"}',
    b'{"prompt": [1e9]}',
    b"\xff\xfe\x00",
]


def serve(name: str, blocks: int) -> None:
    """The server's process: a cache of so many blocks of full attention, on a free port, which it prints."""
    import torch

    from gemcut import Gemma
    from gemcut.checkpoint.resolve import resolve
    from gemcut.engine.cache import bytes_per_block, shape_for_bytes
    from gemcut.placement.devices import parse_dtype
    from gemcut.server import run
    from gemcut.server.state import ServerSettings, ServerState

    context, chunk, size = 1024, 512, 16
    config = resolve(name, weights=False).config()
    dtype = parse_dtype(config.torch_dtype, torch.bfloat16)
    one = sum(bytes_per_block(config, dtype, size))
    memory = next(
        n * one // 8
        for n in range(1, 8 * 4 * blocks)
        if shape_for_bytes(config, n * one // 8, dtype=dtype, context=context, chunk=chunk, block_size=size).full_blocks
        >= blocks
    )
    gemma = Gemma.load(
        name,
        quantization="nf4" if name == "gemma-3-270m" else None,
        max_context=context,
        max_batch_tokens=chunk,
        kv_memory=memory,
        progress=False,
    )
    state = ServerState(ServerSettings(names=(name,), send_timeout=20.0))
    listener = run.open_port("127.0.0.1", 0)
    print(listener.getsockname()[1], gemma.engine.cache.shape, flush=True)
    run.serve(state, lambda report: gemma, listener)


class Client:
    """One connection after another, or one kept alive; HTTP by hand, which costs little beside the server."""

    def __init__(self, port: int, seed: int) -> None:
        self.port, self.chance = port, random.Random(seed)
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.statuses: Counter[str] = Counter()
        self.seconds: list[float] = []

    async def connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.streams is None or self.streams[1].is_closing():
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        return self.streams

    def drop(self) -> None:
        if self.streams is not None:
            self.streams[1].transport.abort()
            self.streams = None

    def body(self) -> tuple[str, bytes, bool]:
        """(path, body, whether the answer is a stream) of a good request."""
        chance = self.chance
        count = min(900, max(1, round(chance.lognormvariate(1.5, 1.0))))
        text = " ".join(chance.choice(WORDS) for _ in range(count))
        stream, kind = chance.random() < 0.4, chance.random()
        fields: dict[str, Any] = {"max_tokens": min(8, 1 + int(chance.expovariate(0.9))), "stream": stream}
        if chance.random() < 0.3:
            fields["temperature"] = 0
        if chance.random() < 0.1 and kind < 0.8:
            fields["n"] = 1 + chance.randrange(3)
            fields["temperature"] = 1
        if kind < 0.45:
            return "/v1/completions", json.dumps({"prompt": text, **fields}).encode(), stream
        if kind < 0.8:
            messages = [{"role": "user", "content": text}]
            return "/v1/chat/completions", json.dumps({"messages": messages, **fields}).encode(), stream
        if kind < 0.9:
            return "/v1/embeddings", json.dumps({"input": [text, text[: len(text) // 2] or "a"]}).encode(), False
        return "/tokenize", json.dumps({"prompt": text}).encode(), False

    async def ask(self) -> None:
        """One request: a good one, one that is left early, or a malformed one."""
        kind = self.chance.random()
        if kind < 0.05:
            path, body = self.chance.choice(["/v1/completions", "/v1/chat/completions"]), self.chance.choice(MALFORMED)
        else:
            path, body, _ = self.body()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "
        started = time.perf_counter()
        try:
            reader, writer = await self.connection()
            writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
            if kind > 0.9:
                await asyncio.sleep(self.chance.uniform(0, 0.4))
                self.drop()
                self.statuses["left"] += 1
                return
            self.statuses[str(await self.answer(reader))] += 1
            self.seconds.append(time.perf_counter() - started)
        except (OSError, asyncio.IncompleteReadError) as error:
            self.drop()
            self.statuses[type(error).__name__] += 1

    async def answer(self, reader: asyncio.StreamReader) -> int:
        """Read a whole answer; its status."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split()[1])
        if "transfer-encoding: chunked" in head:
            while (size := int(await reader.readline(), 16)) > 0:
                await reader.readexactly(size + 2)
            await reader.readline()
        else:
            length = head.partition("content-length: ")[2].split()
            await reader.readexactly(int(length[0]) if length else 0)
        if "connection: close" in head:
            self.drop()
        return status


async def odd_reader(port: int, seconds: float) -> None:
    """A client that asks for a stream and reads a byte a second, or (``seconds`` 0) never."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=16)
        body = json.dumps({"prompt": "Once upon a time", "max_tokens": 8, "stream": True}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
        writer.write(b"content-length: %d\r\n\r\n" % len(body) + body)
        try:
            for _ in range(30):
                await asyncio.sleep(1)
                if seconds:
                    await reader.read(1)
        except OSError:
            pass
        writer.transport.abort()


def megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def scrape(port: int) -> dict[str, float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    text = (await reader.read(-1)).decode()
    writer.close()
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("gemcut:")]
    return {name: float(value) for name, value in rows}


async def ready(port: int) -> None:
    """Return when requests are answered: before that they get 503, as they should."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        answer = await reader.read(-1)
        writer.close()
        if answer.startswith(b"HTTP/1.1 200"):
            return
        await asyncio.sleep(0.2)


async def soak(port: int, pid: int, options: argparse.Namespace) -> bool:
    await ready(port)
    clients = [Client(port, seed) for seed in range(options.clients)]
    odd = [asyncio.create_task(odd_reader(port, n % 2)) for n in range(options.odd)]
    left, memory, begin = options.requests, [(0, megabytes(pid))], time.perf_counter()

    async def work(client: Client) -> None:
        nonlocal left
        while left > 0 and time.perf_counter() - begin < 60 * options.minutes:
            left -= 1
            await client.ask()
            if (done := options.requests - left) % (options.requests // 40 or 1) == 0:
                memory.append((done, megabytes(pid)))

    await asyncio.gather(*map(work, clients))
    seconds, asked = time.perf_counter() - begin, options.requests - left
    for task in odd:
        task.cancel()
    for client in clients:
        client.drop()
    for _ in range(100):
        found = await scrape(port)
        running = sum(value for name, value in found.items() if name.startswith("gemcut:num_requests_"))
        used = next(value for name, value in found.items() if name.startswith("gemcut:kv_cache_usage_perc"))
        if not running and not used:
            break
        await asyncio.sleep(0.3)
    statuses: Counter[str] = sum((client.statuses for client in clients), Counter())
    times = sorted(second for client in clients for second in client.seconds)
    server = Counter[str]()
    for name, value in found.items():
        if name.startswith("gemcut:http_requests_total") and '"/ready"' not in name:
            server[name.split('status="')[1][:3]] += int(value)
    quarter = [size for done, size in memory if done >= asked // 4]
    growth = quarter[-1] - quarter[0]
    print(f"{asked:,} requests in {seconds:.0f} s, {asked / seconds:.1f} a second")
    print(f"clients saw {dict(sorted(statuses.items()))}; the server counts {dict(sorted(server.items()))}")
    print(f"seconds an answer: median {times[len(times) // 2]:.2f}, p99 {times[len(times) * 99 // 100]:.2f}")
    print(f"memory: {memory[0][1]:.0f} MB at first, {quarter[0]:.0f} after a quarter, {quarter[-1]:.0f} at the end")
    tokens = {
        n: int(v) for n, v in found.items() if "tokens_total" in n or "preemptions_total" in n or "hits_total" in n
    }
    print("tokens:", {name.partition("{")[0].removeprefix("gemcut:"): value for name, value in tokens.items()})
    print(f"at the end {running:.0f} requests run or wait, {used:.0%} of the cache is in use")
    broken = sum(count for status, count in (statuses + server).items() if status.startswith("5"))
    good = not running and not used and not broken and growth < max(20.0, 0.03 * quarter[0])
    print("good" if good else "NOT GOOD")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=10, help="end then, with fewer requests")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--odd", type=int, default=8, help="connections that read slowly or never")
    parser.add_argument("--blocks", type=int, default=64, help="cache blocks of 16 tokens")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.model, options.blocks)
        return 0
    command = [sys.executable, __file__, "--serve", "--blocks", str(options.blocks), "--model", options.model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        port, _, shape = server.stdout.readline().partition(" ")
        print(f"{platform.processor() or platform.machine()}, {shape.strip()}")
        try:
            good = asyncio.run(soak(int(port), server.pid, options))
        finally:
            server.terminate()
        code = server.wait(60)
    print(f"the server ended with {code}")
    return 0 if good and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
