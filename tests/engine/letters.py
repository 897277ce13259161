"""A tokenizer of 320 ids without any file: every byte, and pieces of JSON; and a Gemma of the smallest network."""

from __future__ import annotations

from typing import Any

import torch

from engine.driver import CPU, small_model
from gemcut.engine import EngineConfig
from gemcut.gemma import Gemma

BOS, EOS, END_OF_TURN, PAD = 0, 1, 2, 3
PIECES = [
    *('{"', '":', '",', '"}', '","', '""', "}}", "[[", "]]", "null", "true", "false", "00", "12"),
    *("  ", "\n\n", "\n\n\n\n", "he", "the", "é", "日本", "a name"),
]


class Letters:
    """``<bos>``, ``<eos>``, ``<end_of_turn>`` and ``<pad>``, the 256 bytes, then pieces, then ids of nothing."""

    bos_id, eos_id, pad_id, end_of_turn_id, start_of_turn_id, chat_template = BOS, EOS, PAD, END_OF_TURN, None, None
    special_ids = frozenset({BOS, EOS, END_OF_TURN, PAD})
    vocab_size = 320
    _names = ("<bos>", "<eos>", "<end_of_turn>", "<pad>")

    def byte_value(self, token: int) -> int | None:
        return token - 4 if 4 <= token < 260 else None

    def token_text(self, token: int) -> str:
        if token < 4:
            return self._names[token]
        byte = self.byte_value(token)
        if byte is not None:
            return f"<0x{byte:02X}>"
        return PIECES[token - 260] if token - 260 < len(PIECES) else ""

    def token_bytes(self, token: int) -> bytes:
        byte = self.byte_value(token)
        return self.token_text(token).encode() if byte is None else bytes([byte])

    def all_token_bytes(self) -> list[bytes]:
        return [self.token_bytes(i) for i in range(self.vocab_size)]

    def token_to_id(self, text: str) -> int | None:
        return self._names.index(text) if text in self._names else None

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        return [*([BOS] if add_bos else []), *(byte + 4 for byte in text.encode())]


def new_gemma(dtype: torch.dtype = torch.float32, **sizes: Any) -> Gemma:
    """A random Gemma over Letters that may write long answers."""
    tokenizer: Any = Letters()
    model = small_model(vocab_size=320, context=512)
    engine = EngineConfig(**{"max_batch_size": 32, "sequences": 12, **sizes})
    return Gemma(model, tokenizer, CPU, engine=engine, generation_config={"eos_token_id": [EOS, END_OF_TURN]})
