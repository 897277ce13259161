"""Ours beside transformers on a CPU, in one process, on the same weights.

    python benchmarks/cpu_inference.py                 # 2B shape (random bf16) and the real Gemma 3 270M
    python benchmarks/cpu_inference.py --case 270m --repeat 5

Rows: prefill of 512 tokens, decode of one request after those, and decode of 8 requests together. Engines take turns
within each repetition, so that a noisy neighbour hits both; medians and the spread of all repetitions are printed,
with the weight bytes a decode step reads against the read bandwidth measured just before.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers

import gemcut
from gemcut.checkpoint.load import load_model_weights
from gemcut.checkpoint.source import resolve
from gemcut.config import FAMILY, GemmaConfig
from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.model import Model

PROMPT, STEPS, BATCH = 512, 24, 8


@dataclass
class Row:
    """Seconds of every repetition of one measurement, for both engines."""

    name: str
    tokens: int
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)


def random_model(config: GemmaConfig, layers: int | None) -> Model:
    """A model of this shape with random bf16 weights of trained-like size."""
    if layers is not None:
        config = config.replace(num_hidden_layers=layers, layer_types=config.layer_types[:layers])
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Model(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if name.endswith("scale"):
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(std=0.02)
    return model


def real_model() -> Model:
    """Gemma 3 270M from the demo package, in bf16."""
    source = resolve("gemma-3-270m")
    with torch.device("meta"):
        model = Model(source.config(), dtype=torch.bfloat16)
    load_model_weights(model, source.tensors(), dtype=torch.bfloat16, device=torch.device("cpu"))
    return model


def as_transformers(model: Model) -> transformers.PreTrainedModel:
    """transformers' model of the same weights; the tensors are shared, not copied."""
    config, gemma3 = model.config, model.config.model_type == "gemma3_text"
    kinds = (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM)
    make_config, make_model = kinds if gemma3 else (transformers.Gemma2Config, transformers.Gemma2ForCausalLM)
    with torch.device("meta"):
        peer = make_model(make_config(**config.to_dict(), attn_implementation="eager", dtype=torch.bfloat16))
    state = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.scale - 1}
    state["lm_head.weight"] = model.embed.weight
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}."
        for name, part in zip("qkv", layer.attention.qkv_proj.weight.split(layer.attention.sizes), strict=True):
            state[f"{prefix}self_attn.{name}_proj.weight"] = part
        for name, part in zip(("gate", "up"), layer.mlp.gate_up_proj.weight.chunk(2), strict=True):
            state[f"{prefix}mlp.{name}_proj.weight"] = part
        state[prefix + "self_attn.o_proj.weight"] = layer.attention.o_proj.weight
        state[prefix + "mlp.down_proj.weight"] = layer.mlp.down_proj.weight
        for name in norms:
            state[f"{prefix}{name}_layernorm.weight"] = getattr(layer, f"{name}_norm").scale - 1
        if gemma3:
            for name in ("q_norm", "k_norm"):
                state[f"{prefix}self_attn.{name}.weight"] = getattr(layer.attention, name).scale - 1
    state = {name: torch.nn.Parameter(tensor.to(torch.bfloat16), requires_grad=False) for name, tensor in state.items()}
    peer.load_state_dict(state, strict=True, assign=True)
    with torch.device("cpu"):  # tables that no checkpoint holds
        rotary = type(peer.model.rotary_emb)(peer.config)
    peer.model.rotary_emb = rotary
    for module in peer.modules():
        if hasattr(module, "embed_scale"):
            module.embed_scale = torch.tensor(config.hidden_size**0.5)
    return peer.eval()


def engine_seconds(model: Model, prompts: list[list[int]], steps: int) -> tuple[float, float]:
    """(prefill, decode) seconds of our engine: until every prompt has its first token, then ``steps`` more each."""
    engine = Engine(model, torch.device("cpu"), EngineConfig(max_context=1024, sequences=len(prompts)))
    params = SamplingParams(max_new_tokens=steps + 1, temperature=0, ignore_eos=True)
    sequences = [engine.submit(Request(prompt_ids=tuple(prompt), params=params)) for prompt in prompts]
    start = time.perf_counter()
    while any(sequence.output_length == 0 for sequence in sequences):
        engine.step()
    middle = time.perf_counter()
    while engine.has_work:
        engine.step()
    return middle - start, time.perf_counter() - middle


@torch.inference_mode()
def transformers_seconds(
    peer: transformers.PreTrainedModel, prompts: list[list[int]], steps: int
) -> tuple[float, float]:
    """The same of transformers: forward with its default cache, greedy."""
    start = time.perf_counter()
    out = peer(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    middle = time.perf_counter()
    for _ in range(steps):
        out = peer(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
    return middle - start, time.perf_counter() - middle


def read_bandwidth() -> float:
    """Bytes a second that a plain sum over 1 GB of fp32 reads, best of five."""
    data = torch.ones(2**28)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return data.nbytes / min(seconds)


def weight_bytes(model: Model) -> int:
    """Bytes a decode step reads: every weight once (the embedding serves as the head)."""
    return sum(parameter.nbytes for parameter in model.parameters())


def measure(model: Model, repeat: int, steps: int) -> list[Row]:
    """Take turns: ours, transformers, ours, …"""
    peer = as_transformers(model)
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    one = torch.randint(10, vocabulary, (1, PROMPT), generator=generator).tolist()
    many = torch.randint(10, vocabulary, (BATCH, 64), generator=generator).tolist()
    rows = [
        Row(f"prefill {PROMPT}", PROMPT),
        Row("decode, 1 request", steps),
        Row(f"decode, {BATCH} together", BATCH * steps),
    ]
    runs: list[tuple[str, Callable[[list[list[int]], int], tuple[float, float]]]] = [
        ("ours", lambda prompts, n: engine_seconds(model, prompts, n)),
        ("peer", lambda prompts, n: transformers_seconds(peer, prompts, n)),
    ]
    for _, run in runs:  # warm up
        run(one, 2)
    for _ in range(repeat):
        for name, run in runs:
            prefill, decode = run(one, steps)
            _, batched = run(many, steps)
            for row, seconds in zip(rows, (prefill, decode, batched), strict=True):
                getattr(row, name).append(seconds)
    return rows


def show(title: str, model: Model, rows: list[Row], bandwidth: float) -> None:
    """Print one case."""
    size = weight_bytes(model)
    print(f"\n{title}: {size / 1e9:.2f} GB of weights, bf16")
    print(f"{'':22}{'ours tok/s':>24}{'transformers tok/s':>26}{'ratio':>8}{'read GB/s':>12}{'% of limit':>12}")
    for row in rows:
        texts = []
        for seconds in (row.ours, row.peer):
            speeds = sorted(row.tokens / s for s in seconds)
            texts.append(f"{statistics.median(speeds):.1f} ({speeds[0]:.1f}–{speeds[-1]:.1f})")
        ratio = statistics.median(p / o for o, p in zip(row.ours, row.peer, strict=True))
        read = share = ""
        if row.name.startswith("decode"):
            steps = row.tokens // (BATCH if "together" in row.name else 1)
            speed = size * steps / statistics.median(row.ours)
            read, share = f"{speed / 1e9:.1f}", f"{100 * speed / bandwidth:.0f} %"
        print(f"{row.name:22}{texts[0]:>24}{texts[1]:>26}{ratio:>8.2f}{read:>12}{share:>12}")
    single, batched = rows[1], rows[2]
    gain = statistics.median(b.tokens / s for b, s in [(batched, s) for s in batched.ours])
    gain /= statistics.median(single.tokens / s for s in single.ours)
    print(f"{BATCH} requests together give {gain:.2f} times the tok/s of one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["2b", "270m", "all"], default="all")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS, help="tokens to decode in each repetition")
    parser.add_argument("--layers", type=int, help="fewer layers of the 2B shape, for a quick look")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            cpu = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    amx = torch.cpu._is_amx_tile_supported() if hasattr(torch.cpu, "_is_amx_tile_supported") else "?"
    print(
        f"{cpu}, {torch.get_num_threads()} threads, AMX {amx}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, gemcut {gemcut.__version__}"
    )
    print(f"{args.repeat} repetitions in turns; median (min–max); {args.steps} decode steps")
    for title, make in (
        ("Gemma 2 2B shape, random weights", lambda: random_model(FAMILY["gemma-2-2b"], args.layers)),
        ("Gemma 3 270M, real weights", real_model),
    ):
        if args.case == "all" or (args.case == "2b") == ("2B" in title):
            bandwidth = read_bandwidth()
            model = make()
            rows = measure(model, args.repeat, args.steps)
            after = read_bandwidth()
            show(title, model, rows, max(bandwidth, after))
            print(f"read bandwidth before and after: {bandwidth / 1e9:.1f} and {after / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
