"""Calibrated quantization of a whole checkpoint, one layer in memory at a time.

Sample texts go through the network layer by layer. Each linear layer is cut with the second moments of the inputs it
really gets, which come through everything that was cut before it, so that later weights make up for earlier losses.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemcut import process
from gemcut.calibration.samples import read_calibration_text
from gemcut.checkpoint.names import FUSED, expected_shapes, split_layer, to_hf
from gemcut.checkpoint.source import Source
from gemcut.errors import CheckpointError, ParameterError
from gemcut.kernels.linear.dispatch import choose_linear
from gemcut.model import Model
from gemcut.model.key_values import KeyValues, Span
from gemcut.model.quantized import QuantizedLinear
from gemcut.progress import Report
from gemcut.quantization.calibrate import Method, quantize_4bit_calibrated
from gemcut.quantization.dequantize import dequantize_weight
from gemcut.quantization.moments import Moments, block_width
from gemcut.quantization.spec import Quantization, skip_matcher
from gemcut.quantization.stream import EMBEDDING, check_finite, quantize_tensors
from gemcut.quantization.weights import CheckpointWeight

__all__ = ["MEMORY", "CalibrationState", "calibrate", "read_calibration_text"]

#: Rows that go through a layer together: enough for quick products, little memory at any width.
_CHUNK_ROWS = 2048
#: Bytes the second moments of one linear layer's inputs, and the work on them, may take. 27B's down_proj has 36,864
#: inputs: its whole matrix would be 5.4 GB, and inverting it dearer than all the rest.
MEMORY = 2 << 30
#: The linear layers of a layer in the order in which their inputs become known.
_STAGES = ("attention.qkv_proj", "attention.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
#: Those whose outputs go straight into a norm.
_NORMED = ("attention.o_proj", "mlp.down_proj")


@dataclass
class CalibrationState:
    """Where a calibration stands: enough to go on after an interruption.

    Attributes:
        layer: layers that are done.
        hidden: what the cut network gives after them for all documents, fp32 [T, d]; None before the first.
        methods: for each tensor that was cut, how.
    """

    layer: int = 0
    hidden: Tensor | None = None
    methods: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write to one safetensors file, whole or not at all. Raises CheckpointError."""
        from safetensors.torch import save_file

        if self.hidden is None:
            raise CheckpointError("nothing to save: no layer is calibrated yet")
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        metadata = {"layer": str(self.layer), "methods": json.dumps(self.methods)}
        try:
            save_file({"hidden": self.hidden}, part, metadata)
            os.replace(part, path)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> CalibrationState:
        """Read what ``save`` wrote. Raises CheckpointError."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                hidden = file.get_tensor("hidden")
            return cls(int(metadata["layer"]), hidden, dict(json.loads(metadata["methods"])))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is no saved calibration ({error}); delete it and start again") from None


def calibrate(
    source: Source,
    spec: Quantization,
    documents: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype | None = None,
    progress: Report | None = None,
    start_layer: int = 0,
    state: CalibrationState | None = None,
    memory: int = MEMORY,
    method: Method | None = None,
) -> Iterator[tuple[str, CheckpointWeight]]:
    """Cut a checkpoint to NF4 or FP4 with calibration, streaming.

    Args:
        source: a checkpoint with whole weights.
        spec: what to cut to.
        documents: token ids of each sample text, ``<bos>`` included.
        dtype: compute dtype; matrices are rounded to it before they are cut. None: the checkpoint's own, bf16 for a
            GGUF file.
        progress: hears (weights done, weights in all).
        start_layer: first layer to yield; others are taken as done.
        state: kept up to date while layers come; needed, as it was saved, to start at another layer than the first.
        memory: bytes the statistics of one linear layer may take.
        method: how much work is done on a matrix.

    Yields:
        (our unfused name, weight): the embedding if ``start_layer`` is 0, then layer by layer, then the final norm.
        ``state`` says that a layer is done when the first of its tensors comes: save it once the last is kept safe.

    Raises:
        ParameterError: a format without calibration, no tokens, or a state that does not fit.
        CheckpointError: NaN or infinity in a weight, or one that is cut already.
    """
    process.enter()
    _check(source, spec, documents)
    config = source.config()
    compute = dtype or source.stored_dtype or torch.bfloat16
    state = state or CalibrationState()
    with torch.device("meta"):
        model = Model(config, dtype=compute, linear=lambda name, size, rows: _Probe(name, size, rows, compute, compute))
    run = _Run(source, spec, compute, memory, method or Method(), _chunks(documents), state)
    shapes = expected_shapes(config)
    done, total = 0, sum(math.prod(shape) for shape in shapes.values())
    ids = torch.tensor([token for document in documents for token in document])
    if state.layer != start_layer or (start_layer and state.hidden is None):
        raise ParameterError(
            f"start_layer is {start_layer}, but the state holds {state.layer} layers; expected as many"
        )
    if state.hidden is not None and state.hidden.shape[0] != len(ids):
        raise ParameterError(
            f"the state holds {state.hidden.shape[0]} tokens, the documents {len(ids)}: go on with the same documents"
        )
    if start_layer == 0:
        for name, weight in quantize_tensors(
            source.tensors(dtype=compute, only={EMBEDDING}), spec, module_name=_module_name, dtype=compute
        ):
            table = weight if isinstance(weight, Tensor) else dequantize_weight(weight, compute)
            with torch.inference_mode():
                state.hidden = F.embedding(ids, table).to(compute).float() * model.embed_scale
            del table
            yield name, weight
    for name in shapes:
        if split_layer(name)[0] == "" or int(name.split(".")[1]) < start_layer:
            done += math.prod(shapes[name])
    for index in range(start_layer, config.num_hidden_layers):
        for name, weight in run.layer(model, index):
            done += math.prod(shapes[name])
            if progress:
                progress(done, total)
            yield name, weight
    yield from source.tensors(only={"norm.scale"})


class _Probe(QuantizedLinear):
    """A linear layer that shows its inputs to an observer instead of computing, if there is one."""

    #: Hears the inputs, and ends the pass there.
    observe: Callable[[Tensor], None] | None = None

    def fill(self, weights: Sequence[CheckpointWeight]) -> None:
        """Take the matrices, all in the compute dtype, and the kernel that a loaded network would take for them."""
        super().fill(weights)
        self.bind(choose_linear(self.case, torch.device("cpu")).kernel if weights else None)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [T, in] -> [T, out]."""
        if self.observe is not None:
            self.observe(x)
            raise _InputSeen
        return self.outputs(x)

    def outputs(self, x: Tensor) -> Tensor:
        """``x`` [T, in] -> [T, out], whoever observes."""
        return super().forward(x)


class _Replay(nn.Module):
    """Stands for a layer's attention once all that it gives is known: [T, d] for each chunk, over and over."""

    def __init__(self, layer: int, outputs: list[Tensor]) -> None:
        super().__init__()
        self.layer, self.outputs = layer, itertools.cycle(outputs)

    def forward(self, x: Tensor, rotation: object, kv: object, wanted: Tensor | None = None) -> Tensor:
        outputs = next(self.outputs)
        return outputs if wanted is None else outputs[wanted]


class _InputSeen(Exception):  # noqa: N818 - no error: ends a forward pass where nothing more is needed
    pass


@dataclass
class _Run:
    """What stays the same from layer to layer."""

    source: Source
    spec: Quantization
    dtype: torch.dtype
    memory: int
    method: Method
    chunks: list[list[int]]  # lengths of the documents that go through together
    state: CalibrationState

    def layer(self, model: Model, index: int) -> Iterator[tuple[str, CheckpointWeight]]:
        """Cut one layer and take the hidden states through it."""
        prefix = f"layers.{index}."
        module, stays = model.layers[index], skip_matcher(self.spec.skip)
        names = [name for name in expected_shapes(model.config) if name.startswith(prefix)]
        tensors: dict[str, CheckpointWeight] = {}
        for name, tensor in self.source.tensors(dtype=self.dtype, only=set(names)):
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"tensor {name} is quantized already; calibrate from the whole weights")
            check_finite(name, tensor)
            tensors[name] = tensor.to(self.dtype) if tensor.ndim == 2 else tensor
            if name.endswith(".scale"):
                owner, leaf = name.removeprefix(prefix).rsplit(".", 1)
                setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        probes = {stage: _probe(model, index, stage) for stage in _STAGES}
        parts = {
            stage: [prefix + part for part in FUSED.get(f"{stage}.weight", (f"{stage}.weight",))] for stage in probes
        }
        for stage, probe in probes.items():
            probe.fill([dequantize_weight(tensors[name], self.dtype) for name in parts[stage]])
        attention = module.attention
        for stage, probe in probes.items():
            if stage == "mlp.gate_up_proj":  # attention is settled: compute it once for all passes that follow
                module.attention = _Replay(index, self._attention_outputs(model, index))
            todo = [name for name in parts[stage] if not stays(_module_name(name))]
            if not todo:
                continue
            moments = self._moments(model, index, probe, normed=stage in _NORMED)
            for name in todo:
                tensors[name] = self._cut(name, tensors[name], moments)
            probe.fill([dequantize_weight(tensors[name], self.dtype) for name in parts[stage]])
        self._advance(model, index)
        module.attention = attention
        for probe in probes.values():  # this layer's memory goes before the next one's comes
            probe.fill(())
        self.state.layer = index + 1
        for name in names:
            yield name, tensors.pop(name)

    def _cut(self, name: str, weight: CheckpointWeight, moments: Moments) -> CheckpointWeight:
        assert isinstance(weight, Tensor)
        assert self.spec.format != "int8"
        self.state.methods[name] = "all correlations" if moments.whole else f"blocks of {moments.sizes[0]} inputs"
        return quantize_4bit_calibrated(
            weight,
            moments,
            self.spec.format,
            block_size=self.spec.block_size,
            double_quant=self.spec.double_quant,
            method=self.method,
        )

    @torch.inference_mode()
    def _moments(self, model: Model, index: int, probe: _Probe, *, normed: bool) -> Moments:
        """Second moments of what ``probe`` gets, over all documents."""
        size = probe.part_shapes[0][1]
        moments = Moments(size, block_width(size, self.memory, self.spec.block_size))

        def observe(x: Tensor) -> None:
            share = None
            if normed:  # what follows divides each token's outputs by their size, and their errors with them
                share = probe.outputs(x).float().square_().mean(dim=1).add_(1e-12).reciprocal_()
            moments.add(x, share)

        probe.observe = observe
        try:
            for _ in self._forward(model, index):
                pass
        finally:
            probe.observe = None
        return moments

    @torch.inference_mode()
    def _attention_outputs(self, model: Model, index: int) -> list[Tensor]:
        """What the layer's attention gives for each chunk, in the compute dtype."""
        outputs: list[Tensor] = []
        attention = model.layers[index].get_submodule("attention")
        hook = attention.register_forward_hook(lambda module, args, out: outputs.append(out))
        probe = _probe(model, index, "mlp.gate_up_proj")
        probe.observe = lambda x: None  # only to end the pass there
        try:
            for _ in self._forward(model, index):
                pass
        finally:
            hook.remove()
            probe.observe = None
        return outputs

    @torch.inference_mode()
    def _advance(self, model: Model, index: int) -> None:
        """Replace the hidden states by those after the layer."""
        assert self.state.hidden is not None
        start = 0
        for out in self._forward(model, index):
            self.state.hidden[start : start + out.shape[0]] = out
            start += out.shape[0]

    def _forward(self, model: Model, index: int) -> Iterator[Tensor]:
        """The layer's output for each chunk, in order; none for a pass that an observer ends."""
        assert self.state.hidden is not None
        table, layer = model.ropes[index], model.layer_list[index]
        start = 0
        for lengths in self.chunks:
            rows = self.state.hidden[start : start + sum(lengths)]
            positions = torch.cat([torch.arange(length) for length in lengths])
            with contextlib.suppress(_InputSeen):
                yield layer.alone(rows, table.at(positions), _Documents(lengths))
            start += sum(lengths)


def _probe(model: Model, index: int, stage: str) -> _Probe:
    probe = model.layers[index].get_submodule(stage)
    assert isinstance(probe, _Probe)
    return probe


class _Documents(KeyValues):
    """Keys and values of several whole sequences, kept only while a layer runs."""

    def __init__(self, lengths: list[int]) -> None:
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        self.spans: Sequence[Span] = [Span(s, n, n) for s, n in zip(starts, lengths, strict=True)]
        self._key = self._value = torch.empty(0)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._key, self._value = key, value

    def read(self, layer: int, sequence: int) -> tuple[Tensor, Tensor, int]:
        span = self.spans[sequence]
        rows = slice(span.start, span.start + span.length)
        return self._key[rows], self._value[rows], 0

    def read_decode(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.ones(len(self.spans), dtype=torch.int64)  # only called where every sequence has one token
        return self._key[:, None], self._value[:, None], lengths


def _chunks(documents: Sequence[Sequence[int]]) -> list[list[int]]:
    """Lengths of consecutive documents in groups of about ``_CHUNK_ROWS`` tokens."""
    chunks: list[list[int]] = []
    for document in documents:
        if not chunks or sum(chunks[-1]) + len(document) > _CHUNK_ROWS:
            chunks.append([])
        chunks[-1].append(len(document))
    return chunks


def _check(source: Source, spec: Quantization, documents: Sequence[Sequence[int]]) -> None:
    if source.quantization is not None:
        raise CheckpointError(f"{source.name} is quantized already; calibrate from the whole weights")
    if spec.format == "int8":
        raise ParameterError("calibration is for nf4 and fp4; int8 loses next to nothing: quantize without it")
    if not documents or not all(documents):
        raise ParameterError("calibration needs documents of at least one token each; got an empty one or none")


def _module_name(name: str) -> str:
    return to_hf(name).removesuffix(".weight")
