"""Every kernel by name: what it computes, in which schedule, where it is, what tests and what times it.

kernels/README.md is made from this table (``python -m gemcut.kernels.catalogue``), and a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

_SOURCE, _TESTS = "src/gemcut/kernels/", "tests/kernels/"


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        computes: in one line.
        schedule: the field's term for how the work is laid out.
        source: its file; paths are from the repository's root.
        test: what compares it with float64.
        benchmark: the command that times it; "" where only a whole step, or a load, does.
        note: the page on its limit and what was tried.
    """

    computes: str
    schedule: str
    source: str
    test: str
    benchmark: str
    note: str


def _gpu(computes: str, schedule: str, source: str, test: str, benchmark: str, note: str) -> Kernel:
    command = f"python benchmarks/gpu_kernels.py {benchmark}" if benchmark else ""
    return Kernel(computes, schedule, _SOURCE + source, _TESTS + test, command, f"docs/notes/{note}.md")


def _cpu(computes: str, schedule: str, source: str, test: str, rows: str = "") -> Kernel:
    benchmark = f"python benchmarks/cpu_kernels.py --rows {rows}" if rows else ""
    return Kernel(
        computes, schedule, f"{_SOURCE}cpu/src/{source}", f"{_TESTS}cpu/{test}", benchmark, "docs/notes/cpu.md"
    )


_GEMV, _GEMM = "linear/test_gemv_gpu.py", "linear/test_gemm_gpu.py"
_OPS = "rowwise/test_decode_ops_gpu.py"

KERNELS: dict[str, Kernel] = {
    "four_bit_gemv": _gpu(
        "NF4 or FP4 times up to 16 rows", "persistent GEMV, split-K with a Stream-K fix-up", "linear/four_bit_gemv.cu",
        _GEMV, "--formats nf4 --rows 1,8", "linear-four-bit-gemv",
    ),
    "four_bit_fixed": _gpu(
        "the same of small matrices", "GEMV, warps of fixed columns with x in registers", "linear/four_bit_fixed.cu",
        _GEMV, "--formats nf4 --linears qkv,o --rows 1,8", "linear-four-bit-gemv",
    ),
    "int8_gemv": _gpu(
        "int8 times up to 8 rows", "persistent GEMV, split-K with a Stream-K fix-up", "linear/int8_gemv.cu",
        _GEMV, "--formats int8 --rows 1,8", "linear-int8",
    ),
    "int8_fixed": _gpu(
        "the same of small matrices", "GEMV, warps of fixed columns with x in registers", "linear/int8_fixed.cu",
        _GEMV, "--formats int8 --linears qkv,o --rows 1,8", "linear-int8",
    ),
    "bf16_gemv": _gpu(
        "bf16 times a few rows", "persistent GEMV, split-K with a Stream-K fix-up", "linear/bf16_gemv.cu",
        _GEMV, "--formats bf16 --rows 1,4,8", "linear-bf16",
    ),
    "four_bit_gemm": _gpu(
        "NF4 or FP4 times 9 to 1,792 rows", "warp-specialized wgmma, W dequantized in registers, Stream-K fix-up",
        "linear/four_bit_gemm.cu", _GEMM, "--formats nf4 --rows 16,64,256", "linear-four-bit-gemm",
    ),
    "int8_gemm": _gpu(
        "int8 times 9 to 1,792 rows", "warp-specialized wgmma, W widened in registers, Stream-K fix-up",
        "linear/int8_gemm.cu", _GEMM, "--formats int8 --rows 16,64,256", "linear-int8",
    ),
    "gated_gemm": _gpu(
        "gelu(gate) · up of many rows", "warp-specialized wgmma and TMA, clusters of two", "linear/gated.cu",
        "linear/test_gated_gpu.py", "--kernels gated", "linear-bf16",
    ),
    "four_bit_dequant": _gpu(
        "NF4 or FP4 to bf16, for cuBLAS", "one warp a stage", "linear/four_bit_dequant.cu",
        _GEMM, "--formats nf4 --rows 1024,4096", "linear-dequant",
    ),
    "int8_dequant": _gpu(
        "int8 to bf16, for cuBLAS", "elementwise", "linear/int8_dequant.cu",
        _GEMM, "--formats int8 --rows 1024,4096", "linear-dequant",
    ),
    "cublas": _gpu(
        "bf16 times many rows: PyTorch's own", "cuBLAS", "linear/plain.py", _GEMV, "--formats bf16 --rows 8,64,1024",
        "linear-bf16",
    ),
    "order_x": _gpu(
        "rows of x in the fused GEMM's order", "elementwise", "linear/layout.cu", _GEMM, "--x rows --rows 16,64",
        "linear-four-bit-gemm",
    ),
    "varlen_hopper": _gpu(
        "soft-capped attention of packed prompts, heads of 128 and 256", "FlashAttention-3: wgmma, TMA, ping-pong",
        "attention/varlen_hopper.cu", "attention/test_varlen_gpu.py", "--kernels attention", "attention-hopper",
    ),
    "varlen_triton": _gpu(
        "the same, other heads and GPUs", "FlashAttention-2, varlen", "attention/varlen_triton.py",
        "attention/test_varlen_gpu.py", "--kernels attention", "attention-varlen",
    ),
    "decode_attention": _gpu(
        "one token of each sequence over the paged cache; rotation and write inside", "flash-decoding, one launch",
        "attention/decode.cu", _OPS, "--kernels attention", "attention-decode",
    ),
    "norm_add": _gpu(
        "a sublayer's norm, the residual sum, the next norm", "one block a row", "rowwise/norm.cu", _OPS,
        "--kernels rows", "rowwise",
    ),
    "geglu": _gpu("gelu(gate) · up", "elementwise", "rowwise/geglu.cu", _OPS, "--kernels rows", "rowwise"),
    "rope_write": _gpu(
        "rotation of queries and keys, the write into the paged cache", "elementwise", "rowwise/rope_write.cu",
        "attention/test_varlen_gpu.py", "--kernels rows", "rowwise",
    ),
    "argmax": _gpu(
        "the likeliest token; NaN is told", "one pass", "sampling/argmax.cu", _OPS, "", "sampling"
    ),
    "draw": _gpu(
        "a token drawn with top-k, top-p, min-p", "one launch, candidates in shared memory", "sampling/draw.cu",
        "sampling/test_draw_gpu.py", "--kernels rows", "sampling",
    ),
    "decode_step": _gpu(
        "all layers of one sequence's step", "megakernel: persistent, flagged words (LL protocol) between SMs",
        "megakernel/decode_step.cu", "megakernel/test_decode_step_gpu.py", "", "megakernel",
    ),
    "cpu_gemv": _cpu(
        "any format times up to 8 rows", "GEMV, threads by rows of W", "variant/linear.cpp", "test_linear.py", "1 8"
    ),
    "cpu_gemm": _cpu(
        "any format times many rows", "GEMM, panels dequantized once", "variant/gemm.cpp", "test_gemm.py", "64"
    ),
    "cpu_rowwise": _cpu("norms, GeGLU, soft-cap", "threads by rows", "variant/rowwise.cpp", "test_rowwise.py"),
    "cpu_decode_attention": _cpu(
        "one token of each sequence over the paged cache", "flash-decoding by heads", "variant/decode_attention.cpp",
        "test_rowwise.py",
    ),
    "cpu_stack": Kernel(
        "all layers of a decode step in one call", "the kernels above, one after another",
        f"{_SOURCE}cpu/src/variant/stack.cpp", "tests/model/test_ops.py", "",
        "docs/notes/cpu.md",
    ),
    "cpu_dequantize": _cpu(
        "GGUF's types to bf16 and fp32", "elementwise", "variant/dequantize.cpp", "test_dequantize.py"
    ),
}  # fmt: skip


def table() -> str:
    """kernels/README.md."""
    lines = [
        "# Kernels",
        "",
        "Made by `python -m gemcut.kernels.catalogue > src/gemcut/kernels/README.md`.",
        "`gemcut info --kernels --gpu a100 --format nf4 --rows 16` says which of them run where, and why not others.",
        "",
        "| kernel | computes | schedule |",
        "|---|---|---|",
        *(f"| `{name}` | {it.computes} | {it.schedule} |" for name, it in KERNELS.items()),
        "",
        "Where each is, what tests it, what times it, and which note says why it is as fast as it is. Sources are",
        "below this folder, tests below `tests/`, notes in [docs/notes](../../../docs/notes/README.md).",
        "",
        "| kernel | source | test | timed by `python benchmarks/…` | note |",
        "|---|---|---|---|---|",
    ]
    for name, it in KERNELS.items():
        command = f"`{it.benchmark.removeprefix('python benchmarks/')}`" if it.benchmark else "nothing of its own"
        source, test, note = it.source.removeprefix(_SOURCE), it.test.removeprefix("tests/"), it.note.split("/")[-1]
        lines.append(f"| `{name}` | `{source}` | `{test}` | {command} | {note.removesuffix('.md')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
