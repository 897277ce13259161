"""Words <-> token ids: tokenizer, chat format, stop set, incremental detokenizer. Imports neither torch nor models."""

from gemcut.text.chat import Turn, encode_chat, normalize_messages, render_chat, uses_gemma_format
from gemcut.text.detokenizer import Detokenizer
from gemcut.text.prompt import ChatOptions, ChatWriter
from gemcut.text.stops import stop_ids
from gemcut.text.template import Message, render_template
from gemcut.text.tokenizer import Tokenizer

__all__ = [
    "ChatOptions",
    "ChatWriter",
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
