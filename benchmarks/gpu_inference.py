"""One user on one GPU: decode and prefill of a full Gemma 2 shape with random weights.

    python benchmarks/gpu_inference.py --size 27b --weights nf4 --peer transformers

Decode is timed through the engine; every repetition is a request of its own, and its figure counts the steps after the
first. The limit is the bytes a step must read over the read bandwidth measured in the same run, for a prefill its
products over the rate of a bf16 product of 8192 x 8192 x 8192 measured then. "transformers" measures eager transformers
with the same shape, in bf16 (its own random weights).
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time

import torch

from gemcut.config import GemmaConfig
from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.kernels.bandwidth import read_bandwidth
from gemcut.model import Model
from gemcut.model.bind import bind_kernels
from gemcut.model.quantized import quantized_embedding, quantized_linear
from gemcut.quantization.spec import Quantization
from gemcut.quantization.weights import FourBitWeight, Int8Weight, Nested, Weight

SIZES = {
    "2b": (26, 2304, 9216, 8, 4, 256, 256),
    "9b": (42, 3584, 14336, 16, 8, 256, 256),
    "27b": (46, 4608, 36864, 32, 16, 128, 144),
}
WEIGHTS = {
    "bf16": None,
    "int8": Quantization("int8"),
    "nf4": Quantization("nf4"),
    "nf4-head8": Quantization("nf4", head="int8"),
}


def shape(size: str, layers: int | None) -> dict[str, object]:
    """config.json of a member of the family, cut to ``layers`` where given."""
    count, hidden, width, heads, kv_heads, head_dim, scalar = SIZES[size]
    return {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers or count,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rope_theta": 10000.0,
    }


def random_weight(shape: tuple[int, int], spec: Quantization, head: bool) -> Weight:
    """A random packed matrix whose values are of a usual size."""
    n, k = shape
    if head or spec.format == "int8":
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
        return Int8Weight(codes, torch.full((n,), 0.035, device="cuda"), torch.bfloat16)
    codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.randint(0, 256, (n * k // 64,), dtype=torch.uint8, device="cuda")
    nested = Nested(torch.full((-(-n * k // 64 // 256),), 0.01, device="cuda"), 0.04)
    return FourBitWeight(codes, absmax, "nf4", 64, shape, torch.bfloat16, nested)


def build(size: str, weights: str, layers: int | None = None) -> tuple[Model, int]:
    """(a random network on the GPU with its kernels bound, bytes of weights a step reads)."""
    spec = WEIGHTS[weights]
    device = torch.device("cuda", torch.cuda.current_device())
    factories = {}
    if spec is not None:
        factories = {
            "linear": quantized_linear(spec, torch.bfloat16),
            "embedding": quantized_embedding(spec, torch.bfloat16),
        }
    with torch.device("meta"):
        model = Model(GemmaConfig.from_dict(shape(size, layers)), dtype=torch.bfloat16, device=device, **factories)
    nbytes = 0
    for name, module in list(model.named_modules()):
        if hasattr(module, "part_shapes"):
            module.fill([random_weight(part, spec, name == "embed") for part in module.part_shapes])
            nbytes += sum(weight.nbytes for weight in module.weights)
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if leaf == "scale":
                value = torch.ones(parameter.shape, device=device)
            else:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
            nbytes += value.nbytes
            setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False))
    bind_kernels(model, device)
    return model, nbytes


def parameters(module: torch.nn.Module) -> int:
    """How many values its matrices have."""
    shapes = [part for child in module.modules() for part in getattr(child, "part_shapes", ())]
    whole = [p.shape for p in module.parameters() if p.dim() == 2]
    return sum(n * k for n, k in [*shapes, *whole])


GREEDY: dict[str, float] = {"temperature": 0}
SAMPLED: dict[str, float] = {"temperature": 0.8, "top_k": 64, "top_p": 0.95, "seed": 1}


def product_rate() -> float:
    """FLOP/s of a large bf16 matrix product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    seconds = []
    for _ in range(13):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / statistics.median(seconds[3:])


def decode(engine: Engine, prompt: int, new: int, sampling: dict[str, float] = GREEDY) -> tuple[float, float]:
    """(tok/s of the steps after the first, seconds to the first token) of one request."""
    ids = torch.randint(3, 255000, (prompt,)).tolist()
    params = SamplingParams(max_new_tokens=new, ignore_eos=True, **sampling)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    started = time.perf_counter()
    sequence = engine.submit(Request(prompt_ids=tuple(ids), params=params))
    while sequence.output_length == 0:
        engine.step()
    first = time.perf_counter()
    while engine.has_work:
        engine.step()
    torch.cuda.synchronize()
    return (new - 1) / (time.perf_counter() - first), first - started


def transformers_decode(size: str, layers: int | None, prompt: int, new: int) -> float:
    """tok/s of eager transformers in bf16."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    values = {**shape(size, layers), "attn_implementation": "sdpa"}
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            peer = Gemma2ForCausalLM(Gemma2Config(**values)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    ids = torch.randint(3, 255000, (1, prompt), device="cuda")
    seconds = []
    for count in (1, new):
        torch.cuda.synchronize()
        started = time.perf_counter()
        peer.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return (new - 1) / (seconds[1] - seconds[0])


def main() -> None:
    parser = argparse.ArgumentParser(description="One user on one GPU, full shapes, random weights.")
    parser.add_argument("--size", choices=list(SIZES), default="27b")
    parser.add_argument("--weights", default="nf4", help=f"comma-separated: {', '.join(WEIGHTS)}")
    parser.add_argument("--peer", choices=["none", "transformers"], default="none")
    parser.add_argument("--contexts", default="128", help="prompt lengths for decode, comma-separated")
    parser.add_argument("--prefill", default="2048,4096", help="prompt lengths for prefill, comma-separated")
    parser.add_argument("--layers", type=int, help="cut the network to so many layers (for a quick check)")
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--greedy-only", action="store_true", help="leave out the requests that draw their tokens")
    parser.add_argument(
        "--several-launches", action="store_true", help="also decode with several launches a layer, on the same network"
    )
    parser.add_argument("--quick", action="store_true", help="two repetitions, one prefill length")
    options = parser.parse_args()
    repetitions = 2 if options.quick else options.repetitions
    lengths = [int(n) for n in options.prefill.split(",") if n]
    bandwidth, rate = read_bandwidth(), product_rate()
    print(f"device {torch.cuda.get_device_name()}, torch {torch.__version__}, python {platform.python_version()}")
    print(f"{options.size}, read bandwidth {bandwidth / 1e9:.0f} GB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
    print(f"{repetitions} repetitions, {options.new} tokens")
    for weights in options.weights.split(","):
        model, nbytes = build(options.size, weights, options.layers)
        engine = Engine(
            model, torch.device("cuda", 0), EngineConfig(max_batch_tokens=4096, sequences=2, max_context=8192)
        )
        print(f"\n{weights}: {nbytes / 1e9:.2f} GB a step; graphs: {engine.runner.graph_refusal or 'yes'}")
        twin = None
        if options.several_launches:
            twin = Engine(model, torch.device("cuda", 0), engine.config)
            twin.runner.one_launch = False
        for context in (int(n) for n in options.contexts.split(",")):
            for it in (engine, twin):
                if it is None:
                    continue
                decode(it, context, 8)  # compiles and captures
                speeds = [decode(it, context, options.new) for _ in range(repetitions)]
                rates, firsts = sorted(s[0] for s in speeds), sorted(s[1] for s in speeds)
                median, limit = statistics.median(rates), bandwidth / nbytes
                print(
                    f"decode after {context}: {median:.1f} tok/s ({rates[0]:.1f}-{rates[-1]:.1f}), "
                    f"{median / limit:.1%} of {limit:.1f}; first token {statistics.median(firsts) * 1e3:.1f} ms"
                    + (" (several launches a layer)" if it is twin else ""),
                    flush=True,
                )
            if not options.greedy_only:
                sampled = sorted(decode(engine, context, options.new, SAMPLED)[0] for _ in range(repetitions))
                print(f"sampled after {context}: {statistics.median(sampled):.1f} tok/s", flush=True)
        for length in lengths[:1] if options.quick else lengths:
            decode(engine, length, 1)
            seconds = sorted(decode(engine, length, 1)[1] for _ in range(repetitions))
            slowest, median, best = (length / s for s in (seconds[-1], statistics.median(seconds), seconds[0]))
            limit = rate / sum(2 * parameters(module) for module in model.layers)
            print(
                f"prefill {length}: {median:.0f} tok/s ({slowest:.0f}-{best:.0f}), {median / limit:.1%} of {limit:.0f}",
                flush=True,
            )
        del engine, model
        gc.collect()
        torch.cuda.empty_cache()
    if options.peer == "transformers":
        print(f"\ntransformers bf16 eager: {transformers_decode(options.size, options.layers, 128, 24):.1f} tok/s")


if __name__ == "__main__":
    main()
