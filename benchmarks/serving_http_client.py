"""The clients of serving_http.py, a process of their own that only reads. It imports nothing that takes time."""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from typing import Any

TEXT = (
    "The old lighthouse keeper climbed the stairs each evening, lamp in hand, and counted the ships. Some were late; "
    "some, he thought, would never come. «Naïve», said the cook, who had seen 1,204 storms and trusted none of them. "
)


def request_bytes(**fields: Any) -> bytes:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]
    body = json.dumps({"model": "free", "messages": messages, **fields}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


def client(port: int, connections: int, requests: int, tokens: int, stream: bool) -> dict[str, float]:
    """Run in a process of its own: each connection asks one request after the other. Counts chunks and seconds."""
    data = request_bytes(max_tokens=tokens, temperature=0.7, stream=stream)
    end = b"data: [DONE]\n\n\r\n0\r\n\r\n" if stream else b"}}}"
    selector, left, chunks = selectors.DefaultSelector(), {}, 0
    for _ in range(connections):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(data)
        left[connection] = (requests, b"")
        selector.register(connection, selectors.EVENT_READ)
    started = time.perf_counter()
    while left:
        for key, _ in selector.select():
            connection = key.fileobj  # type: ignore[assignment]
            piece = connection.recv(1 << 20)
            count, tail = left[connection]
            chunks += piece.count(b'"delta":{"content"') if stream else 0
            tail = (tail + piece)[-64:]
            if not tail.endswith(end):
                left[connection] = (count, tail)
            elif count > 1:
                left[connection] = (count - 1, b"")
                connection.sendall(data)
            else:
                selector.unregister(connection)
                del left[connection]
                connection.close()
    return {"chunks": chunks, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    port, connections, requests, tokens, stream = (int(word) for word in sys.argv[1:])
    print(json.dumps(client(port, connections, requests, tokens, bool(stream))))
