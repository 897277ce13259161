"""Why logits are not finite: the first weight that holds NaN or infinity, or a computation that overflowed."""

from __future__ import annotations

import torch
from torch import Tensor

from gemcut.model import Model
from gemcut.model.quantized import QuantizedOwner
from gemcut.quantization.weights import FourBitWeight, Int8Weight

_START = "the logits of this request hold NaN or infinity: "


def explain_bad_logits(model: Model) -> str:
    """One line. Reads every weight once: a step that went wrong can wait for that."""
    name = first_bad_weight(model)
    if name is not None:
        return (
            f"{_START}tensor {name} does. The checkpoint is damaged or its training diverged; get the file again, or "
            "start from an earlier checkpoint"
        )
    spec = model.quantization
    dtypes = {model.dtype, model.dtype if spec is None else spec.dtype(model.dtype)}
    narrowest = min(dtypes, key=lambda dtype: torch.finfo(dtype).max)
    wider = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}.get(narrowest)
    what = str(narrowest).removeprefix("torch.")
    if wider is None:
        return f"{_START}all weights are finite, so what is computed from them overflowed in {what}; train them again"
    return f"{_START}all weights are finite, so a computation overflowed in {what}; load the model with dtype {wider}"


@torch.inference_mode()
def first_bad_weight(model: Model) -> str | None:
    """The name of the first tensor that holds NaN or infinity, from the embedding to the last norm; None: none does."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not finite(parameter):
                return _joined(prefix, name)
        if isinstance(module, QuantizedOwner):
            weights = module.unpacked()
            for index, weight in enumerate(weights):
                tensors = weight.tensors if isinstance(weight, (FourBitWeight, Int8Weight)) else (weight,)
                if not all(map(finite, tensors)):
                    return _joined(prefix, "weight" if len(weights) == 1 else f"weight (matrix {index + 1})")
    return None


def finite(tensor: Tensor) -> bool:
    """Whether every value is a finite number; whole numbers are."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN comes through both
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
