"""The front door in transformers' shape: programs written for it run with their import line changed.

    from gemcut.hf import AutoTokenizer, AutoModelForCausalLM

Every argument is honoured or refused by name. Where gemcut differs on purpose, the docstring of the method says so.
"""

from gemcut.hf.auto import AutoModelForCausalLM, AutoTokenizer
from gemcut.hf.encoding import BatchEncoding
from gemcut.hf.options import GenerationConfig
from gemcut.hf.quantization_config import BitsAndBytesConfig
from gemcut.hf.streamers import TextIteratorStreamer, TextStreamer

__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "BatchEncoding",
    "BitsAndBytesConfig",
    "GenerationConfig",
    "TextIteratorStreamer",
    "TextStreamer",
]
