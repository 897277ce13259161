"""Words <-> token ids: tokenizer, chat format, stop set, incremental detokenizer. Imports neither torch nor models."""

from gemcut.text.chat import (
    Message,
    Turn,
    encode_chat,
    normalize_messages,
    render_chat,
    render_template,
    uses_gemma_format,
)
from gemcut.text.detokenizer import Detokenizer
from gemcut.text.stops import stop_ids
from gemcut.text.tokenizer import Tokenizer

__all__ = [
    "Detokenizer",
    "Message",
    "Tokenizer",
    "Turn",
    "encode_chat",
    "normalize_messages",
    "render_chat",
    "render_template",
    "stop_ids",
    "uses_gemma_format",
]
