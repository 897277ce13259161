"""transformers on a GPU as a peer: random weights of the same shape, in bf16 or quantized by bitsandbytes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Sequence

import torch
from gpu_network import shape
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel
from transformers_peer import cut_by_bitsandbytes

#: What bitsandbytes makes of a network that we measure with these weights; the rest has bf16 as its peer.
CUTS = {"nf4": "nf4", "nf4-head8": "nf4", "int8": "int8"}


def peer_name(weights: str) -> str:
    """What stands beside our ``weights``: bf16 where bitsandbytes is not installed."""
    if weights in CUTS and importlib.util.find_spec("bitsandbytes") is not None:
        return f"transformers + bitsandbytes {CUTS[weights]}"
    return "transformers bf16"


def versions() -> str:
    """The peers' versions."""
    found = [name for name in ("transformers", "bitsandbytes") if importlib.util.find_spec(name) is not None]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in found)


def build_peer(size: str, layers: int | None, name: str) -> PreTrainedModel:
    """The peer called ``name``, with PyTorch's fused attention."""
    values = {**shape(size, layers), "attn_implementation": "sdpa"}
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            peer = Gemma2ForCausalLM(Gemma2Config(**values)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    return peer if name == "transformers bf16" else cut_by_bitsandbytes(peer, name.rpartition(" ")[2], "cuda")


@torch.inference_mode()
def _seconds(peer: PreTrainedModel, length: int, new: int) -> float:
    ids = torch.randint(3, 255000, (1, length), device="cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    peer.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def peer_speeds(
    peer: PreTrainedModel, contexts: Sequence[int], prefills: Sequence[int], new: int, repetitions: int
) -> dict[str, list[float]]:
    """tok/s of each repetition by row: decode of ``new`` tokens after the first, prefill until the first token."""
    speeds: dict[str, list[float]] = {}
    for context in contexts:
        _seconds(peer, context, 2)
        both = [(_seconds(peer, context, 1), _seconds(peer, context, new + 1)) for _ in range(repetitions)]
        speeds[f"decode after {context}"] = [new / (whole - first) for first, whole in both]
    for length in prefills:
        _seconds(peer, length, 1)
        speeds[f"prefill {length}"] = [length / _seconds(peer, length, 1) for _ in range(repetitions)]
    return speeds
