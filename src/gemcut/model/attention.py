"""Attention: scale, soft-cap, mask, softmax, in that order; queries come scaled (see ``gemma.Attention``).

``attend`` is the mathematics for one sequence, ``attend_decode`` for one new token of each of many. Other
implementations register in ``IMPLEMENTATIONS``; they are tested against these two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gemcut.config import GemmaConfig
from gemcut.errors import UnsupportedError
from gemcut.kernels.attention import varlen as prefill_attention
from gemcut.kernels.attention import varlen_hopper as hopper_attention
from gemcut.kernels.attention.case import AttentionCase
from gemcut.kernels.attention.varlen import VarlenAttention, VarlenSpec, fresh_segments
from gemcut.kernels.gpu import Gpu, gpu_at
from gemcut.kernels.runtime import nvrtc
from gemcut.model.key_values import KeyValues

# Queries are taken in tiles so that fp32 scores of an 8k context stay small and keys no query sees are skipped.
QUERY_TILE = 256
#: The instructions that PyTorch found for its own CPU code.
_CAPABILITY = torch.backends.cpu.get_cpu_capability()


@dataclass(frozen=True)
class AttentionSpec:
    """What one layer's attention computes from queries that are scaled already. ``window`` None: the whole context."""

    softcap: float | None
    window: int | None


AttentionFunction = Callable[[Tensor, Tensor, Tensor, int, KeyValues, AttentionSpec], Tensor]


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, layer: int, kv: KeyValues, spec: AttentionSpec
) -> Tensor:
    """Plain PyTorch attention over any batch. ``query`` [T, heads, head_dim] -> [T, heads · head_dim]."""
    kv.write(layer, key, value)
    if all(span.length == 1 for span in kv.spans):
        keys, values, lengths = kv.read_decode(layer)
        return attend_decode(query, keys, values, lengths, spec).flatten(1)
    parts = []
    for index, span in enumerate(kv.spans):
        rows = query[span.start : span.start + span.length]
        keys, values, first_position = kv.read(layer, index)
        parts.append(attend(rows, keys, values, span.context_length - span.length - first_position, spec))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)


def attend(query: Tensor, keys: Tensor, values: Tensor, offset: int, spec: AttentionSpec) -> Tensor:
    """Attention of one sequence's consecutive queries.

    ``query`` [n, heads, head_dim]; ``keys`` and ``values`` [L, kv_heads, head_dim]; query i sits at index
    ``offset + i`` of the keys. Returns [n, heads, head_dim] in the query's dtype.
    """
    kv_heads, dtype = keys.shape[1], query.dtype
    if _wide_products(query):
        query, keys, values = query.float(), keys.float(), values.float()
    # [kv_heads, L, head_dim], laid out so: CPU matrix products in bf16 are several times slower on strided operands.
    keys, values = keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()
    tiles = []
    for start in range(0, query.shape[0], QUERY_TILE):
        tile = query[start : start + QUERY_TILE]
        rows, heads, head_dim = tile.shape
        low, high = offset + start, offset + start + rows  # key indices of this tile's queries
        first = 0 if spec.window is None else max(0, low - spec.window + 1)
        # Query heads that share a key head become extra rows of one matrix product.
        grouped = tile.view(rows, kv_heads, -1, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        hidden = _hidden(low, high, first, spec.window, query.device)
        part = partial(_attend_tile, grouped, keys[:, first:high], values[:, first:high], hidden, spec)
        out = _never_through_masks(part, query.device)
        tiles.append(out.view(kv_heads, -1, rows, head_dim).permute(2, 0, 1, 3).reshape(rows, heads, head_dim))
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles)).to(dtype)


def _wide_products(query: Tensor) -> bool:
    """Whether products of these 16-bit numbers are better computed in fp32, which holds each of them exactly.

    PyTorch has no 16-bit products for processors that end at AVX2: it does 1 to 8 GFLOPS a core in bf16, 60 in fp32.
    """
    return query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16) and _CAPABILITY == "AVX2"


def _attend_tile(
    grouped: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, spec: AttentionSpec, careful: bool
) -> Tensor:
    """``grouped`` [kv_heads, group · rows, head_dim] looks at ``keys`` and ``values`` [kv_heads, L, head_dim], of which
    ``hidden`` [rows, L] are masked; the result is as ``grouped``. ``careful``: see ``_never_through_masks``."""
    kv_heads, _, head_dim = grouped.shape
    scores = _cap(torch.bmm(grouped, keys.transpose(1, 2)).float(), spec).view(kv_heads, -1, *hidden.shape)
    weights = _masked(scores, hidden, careful).softmax(dim=-1).to(grouped.dtype).view(kv_heads, -1, keys.shape[1])
    if not careful:
        return torch.bmm(weights, values)
    # A value that is no finite number is nothing to queries that do not see it, and everything to those that do.
    odd = ~torch.isfinite(values)
    out = torch.bmm(weights, values.masked_fill(odd, 0.0)).view(kv_heads, -1, len(hidden), head_dim)
    reached = torch.matmul((~hidden).float(), odd.float())[:, None] > 0  # [kv_heads, 1, rows, head_dim]
    return out.masked_fill_(reached, torch.nan).view(kv_heads, -1, head_dim)


def attend_decode(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, spec: AttentionSpec) -> Tensor:
    """Attention of one query for each of B sequences, each at the last position of its context.

    ``query`` [B, heads, head_dim]; ``keys`` and ``values`` [B, L, kv_heads, head_dim]: the first ``lengths[b]`` rows
    of sequence b are real and end with the query's own. Returns [B, heads, head_dim] in the query's dtype.
    """
    batch, heads, head_dim = query.shape
    length, kv_heads = keys.shape[1], keys.shape[2]
    grouped = query.view(batch, kv_heads, -1, head_dim)
    keys, values = keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()  # [B, kv_heads, L, head_dim]
    index = torch.arange(length, device=query.device)
    hidden = index[None, :] >= lengths[:, None]
    if spec.window is not None:
        hidden = hidden | (index[None, :] < (lengths - spec.window)[:, None])

    def product(careful: bool) -> Tensor:
        scores = _cap(torch.matmul(grouped, keys.transpose(2, 3)).float(), spec)  # [B, kv_heads, group, L]
        weights = _masked(scores, hidden[:, None, None, :], careful).softmax(dim=-1).to(query.dtype)
        return torch.matmul(weights, values.masked_fill(hidden[:, None, :, None], 0.0) if careful else values)

    return _never_through_masks(product, query.device).reshape(batch, heads, head_dim)


def _hidden(low: int, high: int, first: int, window: int | None, device: torch.device) -> Tensor:
    """Which of the keys ``first … high - 1`` queries ``low … high - 1`` do not see: bool [queries, keys]."""
    distance = torch.arange(low, high, device=device)[:, None] - torch.arange(first, high, device=device)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return hidden


def _masked(scores: Tensor, hidden: Tensor, careful: bool) -> Tensor:
    """Capped fp32 ``scores`` with -inf where ``hidden``, in place.

    Adding -inf is many times quicker on a CPU than filling a broadcast mask, and the same where scores are finite.
    """
    if careful:
        return scores.masked_fill_(hidden, -torch.inf)
    return scores.add_(torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf))


def _never_through_masks(product: Callable[[bool], Tensor], device: torch.device) -> Tensor:
    """``product(careful)``: attention in which keys and values that a query does not see weigh nothing at all.

    0 · NaN and NaN + (-inf) are NaN: one request's NaN would reach its neighbours through the padding of a batch and
    through blocks of the cache that were its own before. The careful way costs a few passes more, so on a CPU it is
    taken only where a result holds a NaN; on a GPU, where looking would wait for it, always.
    """
    if device.type != "cpu":
        return product(True)
    out = product(False)
    return product(True) if bool(out.isnan().any()) else out


def _cap(scores: Tensor, spec: AttentionSpec) -> Tensor:
    """``cap · tanh(score / cap)``, in place on fp32 ``scores``. Masking comes later."""
    return scores if spec.softcap is None else scores.div_(spec.softcap).tanh_().mul_(spec.softcap)


def varlen_attention(
    varlen: VarlenAttention, query: Tensor, key: Tensor, value: Tensor, layer: int, kv: KeyValues, spec: AttentionSpec
) -> Tensor:
    """Attention over any batch in one call of ``varlen``; arguments as in ``eager_attention``."""
    kv.write(layer, key, value)
    segments = fresh_segments(kv.spans)
    if segments is None:
        parts = [kv.read(layer, index) for index in range(len(kv.spans))]
        key, value = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        before, found = 0, []
        for span, (keys, _, first) in zip(kv.spans, parts, strict=True):
            found.append((span.start, span.length, before, span.context_length - span.length - first))
            before += len(keys)
        segments = tuple(found)
    return varlen(query, key, value, segments, VarlenSpec(spec.softcap, spec.window))


@dataclass(frozen=True)
class Implementation:
    """A registered way to compute attention.

    Attributes:
        name: what it is asked for by.
        function: computes it.
        supports: None, or the reason why it cannot serve a case on a GPU, None being a CPU (gemcut.kernels.gpu).
        varlen: the same without the cache, where there is such a function; fused kernels take it (gemcut.model.bind).
        detail: which code runs, where the name leaves that open.
        unavailable: None, or what it lacks on this machine, whatever the case.
    """

    name: str
    function: AttentionFunction
    supports: Callable[[AttentionCase, Gpu | None], str | None]
    varlen: VarlenAttention | None = None
    detail: str = ""
    unavailable: Callable[[], str | None] = lambda: None

    def refusal(self, case: AttentionCase, gpu: Gpu | None) -> str | None:
        """None, or why it cannot serve ``case`` on this machine, on its GPU ``gpu`` or on its CPU."""
        return self.supports(case, gpu) or self.unavailable()


def attention_case(config: GemmaConfig, dtype: torch.dtype, block_size: int | None = None) -> AttentionCase:
    """What a network of this shape asks of an attention kernel."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return AttentionCase(heads, kv_heads, config.head_dim, config.attn_logit_softcapping, dtype, block_size)


def _varlen_implementation(
    name: str,
    varlen: VarlenAttention,
    supports: Callable[[AttentionCase, Gpu | None], str | None],
    unavailable: Callable[[], str | None] = lambda: None,
) -> Implementation:
    function = partial(varlen_attention, varlen)
    return Implementation(name, function, supports, varlen, unavailable=unavailable)


#: In order of preference; plain PyTorch serves everything and stands last.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "hopper": _varlen_implementation(
        "hopper", hopper_attention.hopper_varlen, hopper_attention.supports, nvrtc.unavailable_reason
    ),
    "triton": _varlen_implementation(
        "triton", prefill_attention.triton_varlen, prefill_attention.supports, prefill_attention.triton_reason
    ),
    "eager": Implementation("eager", eager_attention, lambda case, gpu: None),
}

#: transformers' name for the flash-attn package.
FLASH = "flash_attention_2"


def choose_attention(name: str, config: GemmaConfig, dtype: torch.dtype, device: torch.device) -> Implementation:
    """The implementation called ``name``; "auto" takes the first that supports the case. Refuses by name otherwise."""
    case, gpu = attention_case(config, dtype), gpu_at(device)
    if name == FLASH:
        return _flash_attention(case, gpu)
    if name == "auto":
        for implementation in IMPLEMENTATIONS.values():
            if implementation.refusal(case, gpu) is None:
                return implementation
    if name not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS, FLASH])
        raise UnsupportedError(f"attn_implementation={name!r} is not available in this version; choose one of: {known}")
    reason = IMPLEMENTATIONS[name].refusal(case, gpu)
    if reason is not None:
        raise UnsupportedError(f"attn_implementation={name!r} cannot serve this model: {reason}")
    return IMPLEMENTATIONS[name]


def _flash_attention(case: AttentionCase, gpu: Gpu | None) -> Implementation:
    """The flash-attn package where it serves, else a kernel of gemcut's own; ``detail`` says which and why.

    On a CPU plain attention stands in until the model is moved to a GPU, with a warning, as in transformers.
    """
    if case.dtype not in (torch.bfloat16, torch.float16):
        raise UnsupportedError(
            f"attn_implementation={FLASH!r} computes in bfloat16 or float16, not in {case.dtype}; load with one of "
            "these"
        )
    if gpu is None:
        message = (
            f"attn_implementation={FLASH!r} needs an NVIDIA GPU; plain attention runs until the model is moved to one"
        )
        warnings.warn(message, stacklevel=2)
        return replace(IMPLEMENTATIONS["eager"], name=FLASH, detail="plain PyTorch, on a CPU")
    reason = prefill_attention.flash_attn_reason()
    if reason is None:
        found = _varlen_implementation(FLASH, prefill_attention.flash_attn_varlen, lambda case, gpu: None)
        return replace(found, detail="the flash-attn package")
    for name, own in ("hopper", "kernel for Hopper"), ("triton", "Triton kernel"):
        refused = IMPLEMENTATIONS[name].refusal(case, gpu)
        if refused is None:
            return replace(IMPLEMENTATIONS[name], name=FLASH, detail=f"gemcut's own {own}: {reason}")
    raise UnsupportedError(
        f"attn_implementation={FLASH!r} cannot serve this model: {reason}, and gemcut's own kernel {refused}"
    )
