"""Requests in, tokens out: continuous batching over a paged key-value cache, on every device."""

from gemcut.engine.edits import Edit, LogitsEdit
from gemcut.engine.engine import Engine, EngineConfig
from gemcut.engine.grammar import Grammar
from gemcut.engine.loop import EngineLoop
from gemcut.engine.request import PromptLogprob, Request, TokenEvent, TokenLogprob
from gemcut.engine.sampling import SamplingParams

__all__ = [
    "Edit",
    "Engine",
    "EngineConfig",
    "EngineLoop",
    "Grammar",
    "LogitsEdit",
    "PromptLogprob",
    "Request",
    "SamplingParams",
    "TokenEvent",
    "TokenLogprob",
]
