"""gemcut: Google's Gemma 2, made usable. Load it, chat with it, score with it, on a CPU or a GPU.

Names are imported when they are first used, so that ``import gemcut`` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemcut.config import GemmaConfig as GemmaConfig
    from gemcut.engine.grammar import Grammar as Grammar
    from gemcut.engine.results import Completion as Completion
    from gemcut.engine.results import TextStream as TextStream
    from gemcut.engine.sampling import SamplingParams as SamplingParams
    from gemcut.errors import GemcutError as GemcutError
    from gemcut.gemma import Gemma as Gemma
    from gemcut.hf import AutoModelForCausalLM as AutoModelForCausalLM
    from gemcut.hf import AutoTokenizer as AutoTokenizer
    from gemcut.hf import BatchEncoding as BatchEncoding
    from gemcut.hf import BitsAndBytesConfig as BitsAndBytesConfig
    from gemcut.hf import GenerationConfig as GenerationConfig
    from gemcut.hf import TextIteratorStreamer as TextIteratorStreamer
    from gemcut.hf import TextStreamer as TextStreamer
    from gemcut.hf.pipeline import pipeline as pipeline
    from gemcut.quantization.spec import Quantization as Quantization

__version__ = "0.1.0"

_HOME = {
    "AutoModelForCausalLM": "gemcut.hf",
    "AutoTokenizer": "gemcut.hf",
    "BatchEncoding": "gemcut.hf",
    "BitsAndBytesConfig": "gemcut.hf",
    "Completion": "gemcut.engine.results",
    "GemcutError": "gemcut.errors",
    "Gemma": "gemcut.gemma",
    "GemmaConfig": "gemcut.config",
    "GenerationConfig": "gemcut.hf",
    "Grammar": "gemcut.engine.grammar",
    "Quantization": "gemcut.quantization.spec",
    "SamplingParams": "gemcut.engine.sampling",
    "TextIteratorStreamer": "gemcut.hf",
    "TextStream": "gemcut.engine.results",
    "TextStreamer": "gemcut.hf",
    "pipeline": "gemcut.hf.pipeline",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gemcut' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
