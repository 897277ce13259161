"""Calibration while a checkpoint is cut on disk: layer by layer, resumable with the files that are finished."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from pathlib import Path

from gemcut.calibration.layerwise import CalibrationState, calibrate
from gemcut.checkpoint.names import expected_shapes, split_layer
from gemcut.checkpoint.source import Source
from gemcut.quantization.spec import Quantization
from gemcut.quantization.weights import CheckpointWeight


class CalibratedCutter:
    """Cuts with calibration for ``quantize_checkpoint``: a file ends with each layer, and the state beside it says
    what the next layer's inputs are.

    Args:
        source: a checkpoint with whole weights.
        spec: what to cut to.
        documents: token ids of each sample text.
    """

    def __init__(self, source: Source, spec: Quantization, documents: Sequence[Sequence[int]]) -> None:
        self.source, self.spec, self.documents = source, spec.replace(head=None), documents
        self.state = CalibrationState()
        self._work: Path | None = None
        self._missing = set(expected_shapes(source.config()))

    def stream(self, wanted: Set[str], work: Path) -> Iterator[tuple[str, CheckpointWeight]]:
        """(our name, weight) of the layers that are still to do; earlier ones' outputs are read from ``work``."""
        self._work = work
        self._missing &= wanted
        layers = {int(name.split(".")[1]) for name in wanted if _in_layer(name)}
        count = self.source.config().num_hidden_layers
        start = min(layers, default=count)
        if start:
            self.state = CalibrationState.load(work / _file(start))
        stream = calibrate(self.source, self.spec, self.documents, start_layer=start, state=self.state)
        # What finished files hold of a layer's neighbours (embedding, final norm) is not needed again.
        return ((name, weight) for name, weight in stream if name in wanted)

    def ends_file(self, name: str) -> bool:
        """Whether a layer is complete with ``name``."""
        self._missing.discard(name)
        prefix = split_layer(name)[0]
        # The final norm goes with the last layer.
        return (
            bool(prefix) and any(map(_in_layer, self._missing)) and not any(n.startswith(prefix) for n in self._missing)
        )

    def saved(self) -> None:
        """Keep what is needed to go on after the file that has just been finished."""
        if self._work is not None and self.state.hidden is not None:
            self.state.save(self._work / _file(self.state.layer))

    def kept(self) -> str:
        """The file beside the finished ones to go on from."""
        return _file(self.state.layer)


def _in_layer(name: str) -> bool:
    return split_layer(name)[0] != ""


def _file(layer: int) -> str:
    return f"calibration-{layer}"
