"""What loading a GGUF file costs in memory: the weights where they are to be, and some pieces on the way there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType as Q

from checkpoint import gguf_files
from support import gguf_path

#: Bytes beside the weights: some pieces, and what is packed before it is put into its place. The 270M's embedding, as
#: stored, is more. What is given back to the allocator counts, too, which with several threads is most in int8: there
#: the limit is the one promised, 300 MB.
SPARE, SPARE_INT8 = 160 << 20, 300 * 10**6

_MEASURE = """
import json
import os
import sys
from pathlib import Path
import gguf.quants
import torch
from gemcut.checkpoint.resolve import resolve
from gemcut.loading import load_network
from gemcut.quantization.parse import parse_quantization

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key + ":"))

def measure(form):
    cut = parse_quantization(None if form == "whole" else form)
    before = status("VmRSS")
    model = load_network(source, dtype=torch.bfloat16, device=torch.device("cpu"), quantization=cut)
    most = status("VmHWM") - before
    tensors = list(model.parameters())
    for module in model.modules():
        for weight in getattr(module, "weights", []):
            tensors += [weight] if isinstance(weight, torch.Tensor) else weight.tensors
    print(json.dumps([form, most, sum(tensor.nbytes for tensor in tensors)]), flush=True)

source = resolve(Path(sys.argv[1]))
source.config()
for form in sys.argv[2:]:
    child = os.fork()  # each with a peak of its own, and one import of torch for all
    if child == 0:
        measure(form)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def beside_the_weights(path: Path, *forms: str) -> dict[str, int]:
    """By form: bytes at most, while the file is loaded, beside what was there before and the loaded weights."""
    command = [sys.executable, "-c", _MEASURE, str(path), *forms]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    return {form: most - weights for form, most, weights in map(json.loads, printed.splitlines())}


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")


@pytest.mark.slow
@needs_proc
def test_loading_the_real_270m_holds_no_tensor_twice() -> None:
    """Its embedding is 336 MB in bf16 and 178 MB in the file."""
    found = beside_the_weights(gguf_path(), "whole", "nf4", "fp4", "int8")
    assert len(found) == 4
    for form, spare in found.items():
        assert spare < (SPARE_INT8 if form == "int8" else SPARE), {form: spare >> 20 for form, spare in found.items()}


@pytest.mark.slow
@needs_proc
def test_loading_large_matrices_holds_none_twice(tmp_path: Path) -> None:
    """Other shapes: matrices of 100 MB in bf16 and 53 MB in the file."""
    found = beside_the_weights(wide_file(tmp_path / "wide.gguf"), "whole", "nf4")
    assert len(found) == 2
    assert all(spare < SPARE for spare in found.values()), {form: spare >> 20 for form, spare in found.items()}


def wide_file(path: Path) -> Path:
    """A Gemma 2 of one layer, 2,048 wide with 24,576 in the MLP, in Q8_0: 170 MB."""
    hidden, inner, heads, width = 2048, 24576, 8, 256
    writer = gguf.GGUFWriter(path, "gemma2")
    for key, value in {
        "context_length": 512, "embedding_length": hidden, "block_count": 1, "feed_forward_length": inner,
        "attention.head_count": heads, "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": width, "attention.value_length": width, "attention.sliding_window": 128,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    }.items():  # fmt: skip
        gguf_files.add(writer, f"gemma2.{key}", value)
    tokens, scores, types = gguf_files.vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    rng = np.random.default_rng(0)
    some = quants.quantize(rng.standard_normal((256, 32), np.float32) * 0.02, Q.Q8_0)  # 256 blocks, for every matrix
    shapes = {"token_embd": (len(tokens), hidden), "blk.0.attn_q": (heads * width, hidden),
              "blk.0.attn_k": (width, hidden), "blk.0.attn_v": (width, hidden),
              "blk.0.attn_output": (hidden, heads * width), "blk.0.ffn_gate": (inner, hidden),
              "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner)}  # fmt: skip
    for name, (rows, columns) in shapes.items():
        data = np.resize(some, rows * columns // 32 * 34).reshape(rows, -1)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=Q.Q8_0)
    for name in ("output_norm", *(f"blk.0.{n}_norm" for n in ("attn", "post_attention", "ffn", "post_ffw"))):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
