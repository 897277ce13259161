"""Cut a matrix to 4 bits so that its *outputs* stay right: same format, better codes and block statistics.

Dequantizing only ever computes ``table[code] · absmax[block]``, so codes and statistics may be chosen freely. With
``H = Σ x xᵀ`` over sample inputs x of the layer, the squared error of its outputs is ``tr((W - Q) H (W - Q)ᵀ)``. Three
steps make it small; each handles all rows of W at once, since rows do not depend on one another:

1. Block statistics: a search over factors of the largest magnitude and a least-squares fit, values weighted by the
   energy of their inputs. With double quantization they are rounded to 8 bits *before* codes are chosen.
2. Codes by error feedback, column by column: what rounding one column lost is made up for by the columns that are
   still whole (GPTQ, Frantar et al. 2022, arXiv 2210.17323), those with the strongest inputs first.
3. Coordinate descent: each code in turn takes the best value given all others, each statistic the best one given its
   codes (QuantEase, Behdin et al. 2023, arXiv 2309.01885, does this for codes). No step can raise the error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcut.quantization.four_bit import nest
from gemcut.quantization.moments import Moments
from gemcut.quantization.spec import NESTED_BLOCK_SIZE, FourBitType
from gemcut.quantization.tables import code_table, dynamic_map
from gemcut.quantization.weights import FourBitWeight, Nested

#: Columns whose corrections are gathered before they reach all later columns in one matrix product.
_LAZY = 128
#: Factors of a block's largest magnitude that are tried as its statistic, and least-squares fits after the best.
_GRID = tuple(0.72 + 0.04 * i for i in range(9))
_REFITS = 2
#: Values searched at a time.
_SEARCH_VALUES = 1 << 17
#: Values from which the table of fine steps finds nearest codes sooner than a binary search: 5 ns a value, not 25.
_MANY = 1 << 13
#: Values whose codes a thread chooses together: about ten temporaries of 4 or 8 bytes each.
_SLICE_VALUES = 1 << 22


@dataclass(frozen=True)
class Method:
    """How much work is done; the defaults are what was measured best.

    Attributes:
        damping: share of the inputs' mean energy added to every input's own. It keeps few samples from being fitted
            too closely: much more than numbers alone would need is best, above all for text of another kind.
        feedback: whether codes are chosen by error feedback, or each for itself.
        sweeps: rounds of coordinate descent.
    """

    damping: float = 0.2
    feedback: bool = True
    sweeps: int = 2


def quantize_4bit_calibrated(
    weight: Tensor,
    moments: Moments,
    quant_type: FourBitType = "nf4",
    *,
    block_size: int = 64,
    double_quant: bool = True,
    method: Method | None = None,
) -> FourBitWeight:
    """Cut ``weight`` [out, in] (fp32, fp16 or bf16, finite), given the moments of its inputs.

    Args:
        weight: the matrix; the result's dtype is its.
        moments: second moments of the ``in`` inputs. Inputs that were never seen (all zero) do no harm.
        quant_type: "nf4" or "fp4".
        block_size: values that share a statistic.
        double_quant: quantize the statistics too.
        method: how much work is done.

    Returns:
        A weight that is dequantized like any other of its format.
    """
    how = method or Method()
    wanted = weight.float()
    rows, columns = wanted.shape
    codebook = Codebook(quant_type, wanted.device)
    damped = [_damped(block, how) for block in moments.blocks]
    energy = torch.cat([block.diagonal() for block in damped])
    scales = Scales.search(wanted, energy, codebook, block_size, double_quant)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=wanted.device)
    start = 0
    for hessian in damped:
        feedback = Feedback(hessian) if how.feedback else None
        part = _Part(wanted, codes, scales, codebook, hessian, feedback, start, how.sweeps)
        _in_slices(part.cut, rows, wanted.device, at_most=max(1, _SLICE_VALUES // hessian.shape[0]))
        start += hessian.shape[0]
    return _pack(codes, scales, quant_type, block_size, (rows, columns), weight.dtype)


@dataclass(frozen=True)
class _Part:
    """The columns of a matrix whose correlations are known together, the first of them at ``start``."""

    wanted: Tensor
    codes: Tensor
    scales: Scales
    codebook: Codebook
    hessian: Tensor
    feedback: Feedback | None
    start: int
    sweeps: int

    def cut(self, low: int, high: int) -> None:
        """Choose ``codes`` and ``scales`` of rows ``low … high - 1``."""
        stop = self.start + self.hessian.shape[0]
        weight = self.wanted[low:high, self.start : stop].t().contiguous()  # [in, out]: a column's values side by side
        absmax = self.scales.columns(self.start, stop, low, high)
        if self.feedback is None:
            chosen = self.codebook.nearest(weight * _reciprocal(absmax))
        else:
            chosen = self.feedback.round(weight, absmax, self.codebook)
        if self.sweeps:
            corner = (self.start, low)
            _descend(weight, self.hessian, chosen, absmax, self.scales, corner, self.codebook, self.sweeps)
        self.codes[low:high, self.start : stop] = self.codebook.stored[chosen].t()


def _in_slices(work: Callable[[int, int], None], rows: int, device: torch.device, at_most: int | None = None) -> None:
    """Call ``work(low, high)`` for slices of all rows, ``at_most`` so many each, on a CPU side by side.

    Column by column work is many small operations: threads within each would mostly wait for one another.
    """
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    slices = min(rows, max(workers, math.ceil(rows / (at_most or rows))))
    edges = [rows * i // slices for i in range(slices + 1)]
    if workers == 1:
        for low, high in itertools.pairwise(edges):
            torch.inference_mode()(work)(low, high)
        return
    # A thread's count of its own helpers is its own: the caller's stays as it is.
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(torch.inference_mode()(work), edges[:-1], edges[1:]))


class Codebook:
    """The 16 values of a format in rising order, and the code each is stored as."""

    def __init__(self, quant_type: FourBitType, device: torch.device) -> None:
        ordered = code_table(quant_type, device).sort(stable=True)
        self.values = ordered.values
        self.stored = ordered.indices.to(torch.uint8)
        self.middles = (self.values[:-1] + self.values[1:]) / 2
        # Steps so fine that each holds one middle at most: a value's place is that of its step, or one more.
        self._fineness = 1.0
        while len(set((steps := self._step(self.middles)).tolist())) < steps.numel():
            self._fineness *= 2
        every = torch.arange(2 * int(self._fineness) + 1, device=device)
        self._places = (steps[None, :] < every[:, None]).sum(dim=1)
        self._limits = torch.full(every.shape, torch.inf, device=device)
        self._limits[steps] = self.middles

    def nearest(self, ratios: Tensor) -> Tensor:
        """Places (int64) in ``values`` nearest to ``ratios``."""
        if ratios.numel() < _MANY:
            return torch.bucketize(ratios, self.middles)
        flat = ratios.reshape(-1)
        steps = self._step(flat)
        places = self._places.index_select(0, steps)
        return places.add_(flat > self._limits.index_select(0, steps)).view(ratios.shape)

    def at(self, places: Tensor) -> Tensor:
        """``values[places]``, fp32, for int64 places of any shape: several times quicker on a CPU."""
        return self.values.index_select(0, places.reshape(-1)).view(places.shape)

    def _step(self, ratios: Tensor) -> Tensor:
        """The step of each ratio, int64: rises with it. NaN, which no integer stands for, gets the first."""
        return ratios.clamp(-1.0, 1.0).mul_(self._fineness).add_(self._fineness).long().clamp_(min=0)


class Scales:
    """Block statistics of a matrix [rows, columns], as dequantizing will see them; blocks run along its flat values."""

    def __init__(self, absmax: Tensor, block_size: int, shape: tuple[int, int], double_quant: bool) -> None:
        self.block_size, self.shape = block_size, shape
        self.byte_map = dynamic_map(absmax.device)
        self.middles = (self.byte_map[:-1] + self.byte_map[1:]) / 2
        self.stored, self.dequantized = absmax, absmax
        self.nested: Nested | None = None
        if double_quant:
            self.stored, self.nested = nest(absmax)
            self.dequantized = self._dequantize(torch.arange(absmax.numel(), device=absmax.device), self.stored)

    @property
    def aligned(self) -> bool:
        """Whether every block lies within one row."""
        return self.shape[1] % self.block_size == 0

    @classmethod
    def search(cls, weight: Tensor, energy: Tensor, codebook: Codebook, block_size: int, double_quant: bool) -> Scales:
        """Statistics that make the error small if inputs were independent with ``energy`` [columns]."""
        rows, columns = weight.shape
        count = rows * columns
        absmax = torch.empty(math.ceil(count / block_size), dtype=torch.float32, device=weight.device)
        flat = weight.reshape(-1)
        # A few blocks at a time: the grid needs a handful of temporaries of that size.
        step = max(1, _SEARCH_VALUES // block_size)
        pieces = math.ceil(absmax.numel() / step)

        def work(first_piece: int, end_piece: int) -> None:
            for first in range(first_piece * step, end_piece * step, step):
                low, high = first * block_size, min(count, (first + step) * block_size)
                values = _in_blocks(flat[low:high], block_size)
                # Which column each value belongs to: the flat index modulo the row length.
                importance = energy[torch.arange(low, high, device=weight.device) % columns]
                best = _search(values, _in_blocks(importance, block_size), codebook)
                absmax[first : first + values.shape[0]] = best

        _in_slices(work, pieces, weight.device)
        return cls(absmax, block_size, (rows, columns), double_quant)

    def columns(self, start: int, stop: int, low: int, high: int) -> Tensor:
        """The statistic of each value in columns ``start … stop - 1`` of rows ``low … high - 1``: fp32, transposed."""
        device = self.dequantized.device
        index = torch.arange(low, high, device=device)[None, :] * self.shape[1]
        index = index + torch.arange(start, stop, device=device)[:, None]
        return self.dequantized[index // self.block_size]

    def replace(self, column: int, low: int, wanted: Tensor) -> Tensor:
        """Set the statistics of the blocks at ``column`` of rows from ``low`` on to the nearest that can be stored.

        ``wanted`` fp32, one value a row; returns what dequantizing will see of it. Blocks must be ``aligned``.
        """
        rows = torch.arange(low, low + wanted.shape[0], device=wanted.device)
        blocks = (rows * self.shape[1] + column) // self.block_size
        if self.nested is None:
            self.dequantized[blocks] = wanted
            return wanted
        reach = self.nested.scale[blocks // NESTED_BLOCK_SIZE]
        ratios = _ratio(wanted - self.nested.offset, reach)
        codes = torch.bucketize(ratios, self.middles).to(torch.uint8)
        dequantized = self._dequantize(blocks, codes)
        self.stored[blocks], self.dequantized[blocks] = codes, dequantized
        return dequantized

    def _dequantize(self, blocks: Tensor, codes: Tensor) -> Tensor:
        assert self.nested is not None
        return self.byte_map[codes.int()] * self.nested.scale[blocks // NESTED_BLOCK_SIZE] + self.nested.offset


class Feedback:
    """Chooses codes column by column, spreading each column's error over those still to come."""

    def __init__(self, hessian: Tensor) -> None:
        """``hessian`` fp32 [in, in], positive definite."""
        # Strong inputs first, while many columns are left to make up for them. Blocks stay where they are: their
        # statistics are fixed already, so that the order of work is free.
        self.order = hessian.diagonal().argsort(descending=True)
        self.factor = _inverse_factor(hessian[self.order][:, self.order])

    def round(self, weight: Tensor, absmax: Tensor, codebook: Codebook) -> Tensor:
        """Places in the codebook, int64, for ``weight`` with statistics ``absmax``; all are [in, out]."""
        work, scale = weight[self.order], absmax[self.order]
        inverse, strength = _reciprocal(scale), self.factor.diagonal().tolist()
        chosen = torch.empty(work.shape, dtype=torch.int64, device=work.device)
        size = work.shape[0]
        for start in range(0, size, _LAZY):
            stop = min(size, start + _LAZY)
            near = self.factor[start:stop, start:stop].contiguous()
            lost = torch.empty(stop - start, work.shape[1], dtype=torch.float32, device=work.device)
            for j in range(start, stop):
                places = codebook.nearest(work[j] * inverse[j])
                error = (work[j] - codebook.at(places) * scale[j]).div_(strength[j])
                chosen[j], lost[j - start] = places, error
                if j + 1 < stop:
                    work[j + 1 : stop].addr_(near[j - start, j - start + 1 :], error, alpha=-1)
            if stop < size:
                work[stop:].addmm_(self.factor[start:stop, stop:].t(), lost, alpha=-1)
        back = torch.empty_like(chosen)
        back[self.order] = chosen
        return back


def _descend(
    weight: Tensor,
    hessian: Tensor,
    chosen: Tensor,
    absmax: Tensor,
    scales: Scales,
    corner: tuple[int, int],
    codebook: Codebook,
    sweeps: int,
) -> None:
    """Coordinate descent on codes and, where blocks allow it, statistics.

    ``weight``, ``chosen`` and ``absmax`` [in, out] are the matrix's columns and rows from ``corner`` (column, row) on;
    ``chosen``, ``absmax`` and ``scales`` are changed in place.
    """
    size, (first, row) = weight.shape[0], corner
    refit = scales.aligned and first % scales.block_size == 0
    width = scales.block_size if refit else _LAZY
    current = codebook.at(chosen) * absmax
    gradient = hessian @ (weight - current)  # of the error, but for a factor of -2
    strength = hessian.diagonal().tolist()
    for _ in range(sweeps):
        for low in range(0, size, width):
            high = min(size, low + width)
            own = hessian[low:high, low:high].contiguous()
            slope, part = gradient[low:high].clone(), current[low:high].clone()
            inverse = _reciprocal(absmax[low:high])
            for j in range(high - low):
                places = codebook.nearest((part[j] + slope[j] / strength[low + j]) * inverse[j])
                values = codebook.at(places) * absmax[low + j]
                slope.addr_(own[j], values - part[j], alpha=-1)
                chosen[low + j], part[j] = places, values
            if refit:
                units = codebook.at(chosen[low:high])
                # The error is quadratic in the block's statistic: take its best value, or the nearest storable one.
                best = absmax[low] + _ratio((units * slope).sum(dim=0), (units * (own @ units)).sum(dim=0))
                fitted = scales.replace(first + low, row, torch.where(best > 0, best, absmax[low]))
                absmax[low:high] = fitted
                part = units * fitted
            gradient.addmm_(hessian[:, low:high], part - current[low:high], alpha=-1)
            current[low:high] = part


def _search(values: Tensor, importance: Tensor, codebook: Codebook) -> Tensor:
    """The best statistic of each block of ``values`` [blocks, size] with weights ``importance``: fp32 [blocks]."""
    largest = values.abs().amax(dim=1)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)

    def consider(absmax: Tensor) -> Tensor:
        """Keep ``absmax`` where it beats the best so far; returns the values it is dequantized to, before scaling."""
        units = codebook.at(codebook.nearest(values * _reciprocal(absmax)[:, None]))
        error = ((units * absmax[:, None] - values).square_() * importance).sum(dim=1)
        better = error < least
        best[better], least[better] = absmax[better], error[better]
        return units

    for factor in _GRID:
        consider(largest * factor)
    for _ in range(_REFITS):
        units = consider(best)
        weighted = units * importance
        fitted = _ratio((weighted * values).sum(dim=1), (weighted * units).sum(dim=1))
        consider(torch.where(fitted > 0, fitted, best))
    return best


def _damped(moment: Tensor, method: Method) -> Tensor:
    """A positive definite fp32 copy of ``moment``."""
    energy = moment.diagonal()
    mean = energy.mean().item()
    hessian = moment.float().clone()
    hessian.diagonal().add_(mean * method.damping if mean > 0 else 1.0)
    return hessian


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with ``inverse(H) = Uᵀ U``; damps further where H is singular in fp32."""
    mean = hessian.diagonal().mean()
    for extra in (0.0, 0.01, 0.1, 1.0):
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(extra * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
    # Flipped, a lower factor of the flipped matrix is V, upper triangular with H = V Vᵀ; then U = inverse(V).
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return factor


def _reciprocal(absmax: Tensor) -> Tensor:
    return torch.where(absmax == 0, 0.0, 1.0 / absmax)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; 0 where the denominator is 0."""
    return torch.where(denominator == 0, 0.0, numerator / denominator)


def _in_blocks(flat: Tensor, block_size: int) -> Tensor:
    """``flat`` as [blocks, block_size], the last one filled up with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)


def _pack(
    codes: Tensor, scales: Scales, quant_type: FourBitType, block_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> FourBitWeight:
    flat = codes.reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2))
    packed = flat[0::2] << 4 | flat[1::2]
    return FourBitWeight(packed, scales.stored, quant_type, block_size, shape, dtype, scales.nested)
