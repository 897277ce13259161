"""The real Gemma 3 270M as transformers reads it, and texts to go on from."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, Gemma3ForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from support import gguf_path

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village at the foot of the mountains,",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "1, 2, 4, 8, 16,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of motion were first stated by",
    "Zutaten für einen Apfelkuchen:\n",
    "Q: Why is the sky blue?\nA:",
    "<h1>Opening hours</h1>\n<ul>\n",
]


def their_gemma3() -> Any:
    """fp32 on the CPU, with eager attention.

    What ``from_pretrained(folder, gguf_file=…)`` does, which asks for accelerate without needing it on a CPU.
    """
    path = gguf_path()
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        empty = Gemma3ForCausalLM(config)
    weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty, torch_dtype=torch.float32)
    return Gemma3ForCausalLM.from_pretrained(
        None, config=config, state_dict=weights["tensors"], dtype=torch.float32, attn_implementation="eager"
    ).eval()
