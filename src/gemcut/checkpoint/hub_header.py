"""The headers of a hub repository's GGUF files, without their weights.

What a plan, a description or a tokenizer needs stands in the first megabytes of a file of many gigabytes. They are
fetched by range and kept in a temporary file as long as the whole, with a hole where the weights would be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gemcut.checkpoint.gguf_header import GgufTensor, is_header_whole, read_header
from gemcut.errors import CheckpointError

#: Bytes asked for first, and then as many again as there are. Gemma's vocabulary takes 4 to 15 MB.
_FIRST = 8 << 20
#: A header is refused that does not end within so many.
_MOST = 256 << 20


def fetch_headers(url: Callable[[str], str], headers: dict[str, str], files: Sequence[str], to: Path) -> None:
    """Make each of ``files`` in the folder ``to``: its header and, as a hole, everything behind it.

    ``url`` and ``headers``: where a file is, and what a request for it brings along. Raises huggingface_hub's errors,
    OSError where the temporary file cannot be written, CheckpointError where a file is no GGUF.
    """
    for name in files:
        path = to / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data, total = _range(url(name), headers, 0, _FIRST)
        while len(data) < min(total, _MOST) and not is_header_whole(data, total, name):
            more, total = _range(url(name), headers, len(data), 2 * len(data))
            if not more:
                raise CheckpointError(f"{name} on the hub ended while it was read; try again")
            data += more
        with open(path, "wb") as file:
            file.write(data)
            file.truncate(total)
        for tensor in read_header(path).tensors.values():
            if tensor.name == "rope_freqs.weight":  # looked at where the header is
                _fill(path, tensor, url(name), headers)


def _fill(path: Path, tensor: GgufTensor, url: str, headers: dict[str, str]) -> None:
    data, _ = _range(url, headers, tensor.offset, tensor.offset + tensor.nbytes)
    with open(path, "r+b") as file:
        file.seek(tensor.offset)
        file.write(data)


def _range(url: str, headers: dict[str, str], start: int, stop: int) -> tuple[bytes, int]:
    """(the bytes from ``start`` up to ``stop`` or the file's end, the file's size)."""
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    asked = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with _streamed(url, asked) as response:
        hf_raise_for_status(response)
        partial = response.status_code == 206
        size = response.headers.get("Content-Range", "").rpartition("/")[2] if partial else ""
        size = size or response.headers.get("Content-Length", "")
        if not size.isdigit():
            raise CheckpointError(
                f"the server of {url} does not say how long the file is; download the file and give its path"
            )
        # A mirror without ranges sends the file from its beginning: what stands behind the part is not waited for.
        first, data = start if partial else 0, bytearray()
        for piece in response.iter_bytes():
            data += piece
            if first + len(data) >= stop:
                break
        return bytes(data[start - first : stop - first]), int(size)


@contextlib.contextmanager
def _streamed(url: str, headers: dict[str, str]) -> Iterator[Any]:
    """The answer to a request, of which no more is read than is asked for."""
    from huggingface_hub import constants, utils

    if hasattr(utils, "http_stream_backoff"):
        with utils.http_stream_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as found:
            yield found
        return
    # Before its version 1.0 the library is built on requests.
    answer: Any = utils.http_backoff(  # type: ignore[attr-defined]
        "GET", url, headers=headers, stream=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    )
    answer.iter_bytes = lambda: answer.iter_content(1 << 16)
    with contextlib.closing(answer):
        yield answer
