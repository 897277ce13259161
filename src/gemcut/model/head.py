"""The output head a part at a time: logits of some tokens alone."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from gemcut.kernels.linear.dispatch import LinearKernel, choose_linear
from gemcut.kernels.linear.plain import PlainLinear
from gemcut.model.gemma import Model
from gemcut.quantization.weights import Int8Weight


def head_part(model: Model, tokens: slice | Tensor) -> LinearKernel | None:
    """The product of the head's rows of ``tokens`` alone, before the final soft-cap; None where it has none here.

    Args:
        model: whose head it is.
        tokens: a range of ids, whose rows are not copied, or ids as int64 [m].
    """
    if model.embed.part is not None:  # the rows are with several ranks
        return None
    case = model.embed.case
    (weight,) = case.weights
    if isinstance(weight, Tensor):
        part: Tensor | Int8Weight = weight[tokens]
    elif isinstance(weight, Int8Weight):
        part = Int8Weight(weight.codes[tokens], weight.absmax[tokens], weight.dtype)
    else:
        return None
    own = replace(case, weights=(part,))
    if model.embed.kernel is None:
        return PlainLinear(own)
    codes = part if isinstance(part, Tensor) else part.codes
    return choose_linear(own, codes.device, model.kernels).kernel
