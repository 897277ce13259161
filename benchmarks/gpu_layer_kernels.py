"""Times what stands between a layer's products, for gpu_kernels.py: attention, norms, GeGLU, rotation, embedding."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu_timing import replay_seconds
from torch import Tensor

from gemcut.engine.draw import DrawMode, draw
from gemcut.kernels.attention import varlen_hopper as hopper_attention
from gemcut.kernels.attention.case import AttentionCase
from gemcut.kernels.attention.decode import DecodeSpec, decode_attention
from gemcut.kernels.attention.varlen import VarlenSpec, triton_varlen
from gemcut.kernels.gpu import gpu_of
from gemcut.kernels.linear.gated import gated_gemm
from gemcut.kernels.linear.gemm import order_groups
from gemcut.kernels.rowwise.geglu import geglu
from gemcut.kernels.rowwise.norm import norm_add, norm_embed
from gemcut.kernels.rowwise.rope_write import rope_write
from gemcut.kernels.sampling.draw import draw_tokens

#: Query heads, key heads, values a head: 27B, 9B, 2B.
HEADS = ((32, 16, 128), (16, 8, 256), (8, 4, 256))
BLOCK = 16  # tokens of a cache block
CACHE_BYTES = 200 << 20  # several times the L2 cache: what runs in turns over so much reads memory


@dataclass(frozen=True)
class Timed:
    """One line: bytes it must read and write, or the floating-point operations it does."""

    name: str
    seconds: list[float]
    nbytes: int = 0
    flop: float = 0.0
    peer: float | None = None  # seconds

    def line(self, bandwidth: float) -> str:
        median = statistics.median(self.seconds)
        reached = f"{self.flop / median / 1e12:.0f} TFLOP/s" if self.flop else f"{self.nbytes / median / bandwidth:.1%}"
        spread = f"{min(self.seconds) * 1e6:.1f}-{max(self.seconds) * 1e6:.1f}"
        peer = "" if self.peer is None else f"{self.peer * 1e6:9.1f}"
        return f"{self.name:58}{median * 1e6:9.1f}{spread:>18}{reached:>14}{peer}"


HEADER = f"{'kernel':58}{'us':>9}{'spread':>18}{'reached':>14}{'peer us':>9}"


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def prefill_attention(repetitions: int) -> Iterator[Timed]:
    """Causal, one sequence. The peer is PyTorch's fused attention, which has neither soft-cap nor window."""
    cases = [(HEADS[0], n, 50.0, window) for n, window in ((8192, None), (8192, 4096), (8192, 1024), (4096, None))]
    cases += [(HEADS[0], 8192, None, None)]
    cases += [(heads, n, 50.0, None) for heads in HEADS[1:] for n in (8192, 4096, 1024)]
    for (heads, kv_heads, head_dim), tokens, cap, window in cases:
        query, keys, values = bf16(tokens, heads, head_dim), *(bf16(tokens, kv_heads, head_dim) for _ in range(2))
        query *= head_dim**-0.5
        spec, segments = VarlenSpec(cap, window), ((0, tokens, 0, 0),)

        case = AttentionCase(heads, kv_heads, head_dim, cap, query.dtype)
        hopper = hopper_attention.supports(case, gpu_of(query.device.index or 0)) is None
        varlen = hopper_attention.hopper_varlen if hopper else triton_varlen

        def ours(
            q: Tensor = query, k: Tensor = keys, v: Tensor = values, s: VarlenSpec = spec, r=segments, f=varlen
        ) -> Tensor:
            return f(q, k, v, r, s)

        peer = None
        if window is None:
            parts = [x.transpose(0, 1)[None] for x in (query, keys, values)]

            def torch_attention(p: list[Tensor] = parts) -> Tensor:
                return F.scaled_dot_product_attention(*p, is_causal=True, scale=1.0, enable_gqa=True)

            peer = statistics.median(replay_seconds([torch_attention], repetitions, 4))
        seen = sum(min(i + 1, window or tokens) for i in range(tokens))
        name = f"prefill attention {heads}/{kv_heads} x {head_dim}, {tokens} tokens, cap {cap}, window {window}"
        yield Timed(name, replay_seconds([ours], repetitions, 4), flop=4 * seen * heads * head_dim, peer=peer)


def decode_attentions(repetitions: int) -> Iterator[Timed]:
    """One new token of each sequence over the paged cache, 27B's heads; rotation and cache write inside."""
    heads, kv_heads, head_dim = HEADS[0]
    rope = torch.randn(8192, head_dim, device="cuda")
    for rows, context, window in (
        (1, 8000, None),
        (1, 8000, 4096),
        (4, 8000, None),
        (16, 8000, None),
        (64, 1024, None),
    ):
        blocks = -(-(context + 1) // BLOCK)
        table = torch.randperm(rows * blocks, device="cuda").int().view(rows, blocks)
        positions = torch.full((rows,), context, dtype=torch.int32, device="cuda")
        qkv = bf16(rows, (heads + 2 * kv_heads) * head_dim)
        spec = DecodeSpec(heads, kv_heads, head_dim, head_dim**-0.5, 50.0, window)
        nbytes = rows * min(context, window or context) * kv_heads * head_dim * 4
        storages = [bf16(2, rows * blocks, BLOCK, kv_heads, head_dim) for _ in range(max(2, CACHE_BYTES // nbytes))]
        runs: list[Callable[[], object]] = [
            lambda s=s, q=qkv, t=table, p=positions, sp=spec: decode_attention(q, s, t, p, rope, sp)  # type: ignore[misc]
            for s in storages
        ]
        name = f"decode attention {rows} x {context} tokens, window {window}"
        yield Timed(name, replay_seconds(runs, repetitions, 4), nbytes=nbytes)


def row_kernels(repetitions: int) -> Iterator[Timed]:
    """Norms, GeGLU, rotation with the cache write, and embedding, at 27B's width."""
    d, width = 4608, 36864
    heads, kv_heads, head_dim = HEADS[0]
    table, post = bf16(256000, d), torch.ones(d, device="cuda")
    for m in (512, 4096):
        y, residual, gate_up = bf16(m, d), torch.randn(m, d, device="cuda"), bf16(m, 2 * width)
        qkv, ids = bf16(m, (heads + 2 * kv_heads) * head_dim), torch.randint(0, 256000, (m,), device="cuda").int()
        rope = torch.randn(m, head_dim, device="cuda")
        keys, values = (bf16(m // BLOCK, BLOCK, kv_heads, head_dim) for _ in range(2))
        slots, groups = torch.randperm(m, device="cuda"), order_groups(m)
        cases: list[tuple[str, Callable[[], object], int]] = [
            (
                "residual += norm(y), norm",
                lambda y=y, r=residual: norm_add(y, r, post, post, 1e-6),  # type: ignore[misc]
                m * d * 12,
            ),
            ("GeGLU", lambda g=gate_up: geglu(g), m * width * 6),  # type: ignore[misc]
            ("GeGLU in order", lambda g=gate_up, o=groups: geglu(g, o), m * width * 6),  # type: ignore[misc]
            (
                "rotation, cache write",
                lambda q=qkv, r=rope, k=keys, v=values, s=slots: rope_write(q, r, k, v, s, 0.1),  # type: ignore[misc]
                2 * qkv.nbytes + rope.nbytes,
            ),
            (
                "embedding, norm",
                lambda i=ids: norm_embed(i, table, None, 67.9, post, 1e-6),  # type: ignore[misc]
                m * d * 8,
            ),
        ]
        for name, run, nbytes in cases:
            yield Timed(f"{name}, {m} rows", replay_seconds([run], repetitions, 8), nbytes=nbytes)


def gated_products(repetitions: int) -> Iterator[Timed]:
    """An MLP's gate, up and GeGLU of bf16 weights in one launch. The peer: torch.mm and the GeGLU kernel behind it."""
    for k, width in ((4608, 36864), (3584, 14336), (2304, 9216)):
        weights = [bf16(2 * width, k) for _ in range(2)]
        for m in (1024, 2048, 4096):
            x, gate_up = bf16(m, k), torch.empty(m, 2 * width, dtype=torch.bfloat16, device="cuda")

            def ours(w: Tensor, x: Tensor = x) -> Tensor:
                return gated_gemm(x, w)

            def apart(w: Tensor, x: Tensor = x, g: Tensor = gate_up) -> object:
                return geglu(torch.mm(x, w.T, out=g))

            times, peer = (
                replay_seconds([functools.partial(run, w) for w in weights], repetitions, 4) for run in (ours, apart)
            )
            name = f"gate+up {2 * width} x {k} and GeGLU, {m} rows"
            yield Timed(name, times, flop=4.0 * m * k * width, peer=statistics.median(peer))


def draws(repetitions: int) -> Iterator[Timed]:
    """A token from one row of 256,000 logits. The peer is the same with PyTorch's operations, in a graph too."""
    logits = torch.randn(1, 256000, device="cuda") * 3
    ids, exact = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(2))
    for name, mode, top_p in (
        ("any token", DrawMode(0, filtered=False), 2.0),
        ("top-k 64, top-p 0.95", DrawMode(64, filtered=True), 0.95),
    ):
        params = torch.tensor([[1.25, top_p, 0.0, 0.4, mode.top_k]], dtype=torch.float64, device="cuda")

        def ours(n: Tensor = params) -> None:
            draw_tokens(logits, n, ids, exact, softcap=30.0)

        def plain(n: Tensor = params, k: DrawMode = mode) -> object:
            return draw(logits[0].div(30).tanh_().mul_(30), k, n[0])

        peer = statistics.median(replay_seconds([plain], repetitions, 8))
        yield Timed(f"draw, {name}", replay_seconds([ours], repetitions, 8), nbytes=logits.nbytes, peer=peer)
