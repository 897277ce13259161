"""A tokenizer of 64 ids without any file, and a Gemma of the smallest network with it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from engine.driver import CPU, small_model
from gemcut.engine import EngineConfig
from gemcut.gemma import Gemma


class Words:
    """A tokenizer of 64 ids: ``<bos>`` and ``<eos>``, the eight bytes of two characters, and words."""

    bos_id, eos_id, pad_id, end_of_turn_id, chat_template = 0, 1, 0, None, None
    special_ids = frozenset({0, 1})
    _BYTES = "€𝄞é".encode()

    def byte_value(self, token: int) -> int | None:
        return self._BYTES[(token - 2) % len(self._BYTES)] if token % 3 == 2 and token > 1 else None

    def token_text(self, token: int) -> str:
        return f" w{token}"

    def token_to_id(self, text: str) -> int | None:
        return None

    def decode(self, ids: list[int]) -> str:
        """All at once, and so by another way than the Detokenizer's: runs of bytes are valid, or one mark a byte."""
        text, run = "", b""
        for token in [*(i for i in ids if i not in self.special_ids), 3]:
            byte = self.byte_value(token)
            if byte is not None:
                run += bytes([byte])
                continue
            try:
                text += run.decode()
            except UnicodeDecodeError:
                text += "\N{REPLACEMENT CHARACTER}" * len(run)
            run, text = b"", text + self.token_text(token)
        return text.removesuffix(self.token_text(3))

    def encode(self, text: str) -> list[int]:
        """``<bos>`` and a token a character."""
        return [0, *(ord(character) % 64 for character in text)]


def new_gemma(**sizes: Any) -> Gemma:
    engine = EngineConfig(**{"block_size": 4, "max_batch_tokens": 8, "sequences": 3, **sizes})
    tokenizer: Any = Words()
    return Gemma(small_model(context=32), tokenizer, CPU, engine=engine, generation_config={"eos_token_id": 63})


class Gate:
    """Holds a loop's thread before each run of the network until it may go on."""

    def __init__(self, gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
        self._may, self._here, self._wide = threading.Semaphore(0), threading.Semaphore(0), False
        runner = gemma.engine.runner
        inner = runner.run

        def run(*args: Any) -> Any:
            if not self._wide:
                self._here.release()
                assert self._may.acquire(timeout=30)
            return inner(*args)

        monkeypatch.setattr(runner, "run", run)

    def wait(self) -> None:
        """Until a step has come to the gate."""
        assert self._here.acquire(timeout=30)

    def step(self, count: int = 1) -> None:
        """Let as many steps through."""
        for _ in range(count):
            self.wait()
            self._may.release()

    def open(self) -> None:
        """Let everything through from now on."""
        self._wide = True
        self._may.release()
