"""llama.cpp (through llama-cpp-python) as a peer: random GGUF files of Gemma 2 shapes, prefill and decode seconds.

Random blocks are written straight in llama.cpp's storage formats (its speed does not depend on values): Q4_0 is fp16
scale + 16 bytes for 32 values, Q8_0 fp16 scale + 32 bytes, Q6_K 210 bytes for 256 values.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from gemcut.config import GemmaConfig

#: (values, bytes, byte offsets of fp16 scales) of a block.
_BLOCKS = {"Q4_0": (32, 18, 0), "Q8_0": (32, 34, 0), "Q6_K": (256, 210, 208)}


def _random_blocks(rows: int, columns: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """A random matrix in a block format, as bytes [rows, bytes of a row]; values are of trained-like size."""
    values, size, scale_at = _BLOCKS[kind]
    count = rows * columns // values
    data = rng.integers(0, 256, size=(count, size), dtype=np.uint8)
    scale = np.float16({"Q4_0": 0.004, "Q8_0": 0.0003, "Q6_K": 0.00002}[kind])
    data[:, scale_at : scale_at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    return data.reshape(rows, -1)


def write_random_gguf(path: Path, config: GemmaConfig, kind: str, table_kind: str) -> None:
    """A Gemma 2 GGUF with random weights of ``kind`` ("Q4_0", "Q8_0") and a table of ``table_kind``."""
    writer = gguf.GGUFWriter(path, "gemma2")
    rng = np.random.default_rng(0)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_float32("gemma2.attn_logit_softcapping", config.attn_logit_softcapping)
    writer.add_float32("gemma2.final_logit_softcapping", config.final_logit_softcapping)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([1] * config.vocab_size)

    def add(name: str, rows: int, columns: int, kind: str) -> None:
        data = _random_blocks(rows, columns, kind, rng)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])

    def add_norm(name: str) -> None:
        writer.add_tensor(name, np.ones(config.hidden_size, np.float32))

    d, ffn = config.hidden_size, config.intermediate_size
    add("token_embd.weight", config.vocab_size, d, table_kind)
    add_norm("output_norm.weight")
    for i in range(config.num_hidden_layers):
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add_norm(f"blk.{i}.{norm}.weight")
        add(f"blk.{i}.attn_q.weight", config.query_size, d, kind)
        add(f"blk.{i}.attn_k.weight", config.key_value_size, d, kind)
        add(f"blk.{i}.attn_v.weight", config.key_value_size, d, kind)
        add(f"blk.{i}.attn_output.weight", d, config.query_size, kind)
        add(f"blk.{i}.ffn_gate.weight", ffn, d, kind)
        add(f"blk.{i}.ffn_up.weight", ffn, d, kind)
        add(f"blk.{i}.ffn_down.weight", d, ffn, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_gguf(config: GemmaConfig, kind: str, table_kind: str, folder: Path | None = None) -> Path:
    """The path of such a file, written once and kept in ``folder`` (None: a folder of the system's temporary files)."""
    folder = folder or Path(tempfile.gettempdir()) / "gemcut-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.hidden_size}x{config.num_hidden_layers}-{kind}-{table_kind}.gguf"
    if not path.exists():
        part = path.with_suffix(".part")
        write_random_gguf(part, config, kind, table_kind)
        part.rename(path)
    return path


class LlamaPeer:
    """One model in llama.cpp."""

    def __init__(self, path: Path, threads: int, context: int = 1024) -> None:
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self._quiet = quiet  # must outlive the library's use of it
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_options)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def _run(self, tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama.cpp failed to decode")
        llama_cpp.llama_synchronize(self.context)

    def seconds(self, prompt: list[int], steps: int) -> tuple[float, float]:
        """(prefill, decode) seconds: one request, greedy, ``steps`` tokens after the first."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        start = time.perf_counter()
        self._run(prompt)
        token = self._greedy()
        middle = time.perf_counter()
        for _ in range(steps):
            self._run([token])
            token = self._greedy()
        return middle - start, time.perf_counter() - middle

    def _greedy(self) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())


def system_info() -> str:
    """What llama.cpp was built with."""
    return llama_cpp.llama_print_system_info().decode()
