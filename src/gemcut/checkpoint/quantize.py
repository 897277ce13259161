"""Cut a checkpoint on disk: tensor by tensor into a folder that appears whole, and goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gemcut import process
from gemcut.checkpoint import names
from gemcut.checkpoint.bnb import config_entries
from gemcut.checkpoint.safetensors_header import INDEX
from gemcut.checkpoint.shard import ShardWriter
from gemcut.checkpoint.source import Source
from gemcut.checkpoint.working import (
    Lock,
    assemble,
    behind_link,
    can_go_on,
    check_out,
    publish,
    resume,
    save_state,
    shard_name,
    working_folder,
    write_json,
)
from gemcut.errors import CheckpointError, ParameterError
from gemcut.progress import Report
from gemcut.quantization.error import relative_error
from gemcut.quantization.spec import Quantization
from gemcut.quantization.state import to_stored
from gemcut.quantization.stream import quantize_tensors
from gemcut.quantization.weights import CheckpointWeight, FourBitWeight

REPORT = "gemcut_quantization.json"
# Files of a folder that travel with the weights.
_CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# Values of a matrix that its error in the report is measured on: known to a thousandth of itself, and soon done.
_ERROR_SAMPLE = 1 << 23
# A header's entry of one tensor, at most: its name, dtype, shape and two offsets.
_ENTRY_BYTES = 300


class Cutter(Protocol):
    """How tensors are cut: the cut stream, and where in it a run can go on."""

    def stream(self, wanted: Set[str], work: Path) -> Iterator[tuple[str, CheckpointWeight]]:
        """(our name, weight) of the tensors that no finished file holds; ``work`` is the working folder."""

    def ends_file(self, name: str) -> bool:
        """Whether a file is to end after this tensor."""

    def saved(self) -> None:
        """A file was finished: keep what is needed to go on after it."""

    def kept(self) -> str:
        """Name of what ``saved`` wrote into the working folder; "" for nothing."""


class NearestCutter:
    """Every value becomes the nearest code of its block; the table stays whole, as it does in a file."""

    def __init__(self, source: Source, spec: Quantization) -> None:
        self.source, self.spec = source, spec.replace(head=None)

    def stream(self, wanted: Set[str], work: Path) -> Iterator[tuple[str, CheckpointWeight]]:
        """(our name, weight) in the order of the source's files."""
        whole = self.source.tensors(dtype=_dtype(self.source), only=wanted)
        return quantize_tensors(whole, self.spec, module_name=names.hf_module)

    def ends_file(self, name: str) -> bool:
        """Files end by their size alone."""
        return False

    def saved(self) -> None:
        """Nothing is needed to go on."""

    def kept(self) -> str:
        """Nothing is kept."""
        return ""


def quantize_checkpoint(
    source: Source,
    out: str | Path,
    spec: Quantization,
    *,
    max_shard_bytes: int = 1_000_000_000,
    cutter: Cutter | None = None,
    options: dict[str, Any] | None = None,
    examine: Callable[[Path], dict[str, Any]] | None = None,
    progress: Report | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write ``source`` cut as ``spec`` says into the folder ``out``, as transformers with bitsandbytes would save it.

    Finished shards and a small state file wait in a hidden folder beside ``out``, which becomes ``out`` at the end.
    After Ctrl-C, a kill or a full disk the same call goes on after the last finished shard; if the source or an option
    has changed it starts anew. One tensor is held at a time.

    Args:
        source: a checkpoint with whole weights.
        out: must not exist, or be an empty folder.
        spec: what to cut to. An 8-bit head is recorded in config.json and cut when the folder is loaded: bitsandbytes
            has no stored form for it.
        max_shard_bytes: a file is ended before it would pass this.
        cutter: cuts the tensors in a way of its own, with calibration for one; None rounds to the nearest code.
        options: what else decides the result; part of what must be the same to go on.
        examine: looks at the complete folder before it is called ``out``; what it returns joins the report.
        progress: hears (bytes read, bytes in all).
        say: hears a line about going on or starting anew.

    Returns:
        the report that is also written to ``gemcut_quantization.json``: options, sizes, and each matrix's relative
        error.

    Raises:
        CheckpointError: the source is cut already or holds NaN, ``out`` is taken or a mount point, or the disk is full.
        ParameterError: blocks that do not divide the rows.
    """
    process.enter()
    out = behind_link(Path(out))
    _check(source, out, spec)
    work = working_folder(out)
    key = _fingerprint(source, spec, max_shard_bytes, options or {})
    try:
        work.mkdir(parents=True, exist_ok=True)
        with Lock(work):
            state = resume(work, key, say)
            try:
                _cut_all(source, work, spec, max_shard_bytes, cutter or NearestCutter(source, spec), state, progress)
            finally:
                if not state["shards"]:  # nothing is done that could be gone on with
                    shutil.rmtree(work, ignore_errors=True)
            report = _finish(source, work, spec, state, options or {})
            final = assemble(work)
            if examine is not None:
                report |= examine(final)
                write_json(final / REPORT, report)
            publish(work, out)
    except CheckpointError:
        raise
    except OSError as error:
        kept = "; finished files are kept there" if can_go_on(out) else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way = "free some space and run the same again" if full else "choose a place where files can be written"
        raise CheckpointError(f"cannot write {work}: {error.strerror or error}{kept}: {way}") from None
    return report


def _check(source: Source, out: Path, spec: Quantization) -> None:
    check_out(out)
    if source.quantization is not None:
        raise CheckpointError(
            f"{source.name} is quantized already ({source.quantization.format}); start from the whole weights"
        )
    if source.path.is_dir() and out.resolve() == source.path.resolve():
        raise CheckpointError(f"{out} is the checkpoint itself; choose another name")
    config = source.config()
    for rows in (config.hidden_size, config.intermediate_size, config.query_size):
        if spec.format != "int8" and rows % spec.block_size:
            raise ParameterError(
                f"blocks of {spec.block_size} do not divide this model's rows of {rows} values, which bitsandbytes' "
                "products need; choose a smaller block size, or int8"
            )


def _dtype(source: Source) -> torch.dtype:
    """What whole weights are stored in."""
    found = source.stored_dtype
    return torch.bfloat16 if found is None else found


def _fingerprint(source: Source, spec: Quantization, max_shard_bytes: int, options: dict[str, Any]) -> dict[str, Any]:
    """What must be the same to go on: the source's files, and everything that decides the result."""
    facts = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in source.weight_files()]
    config = json.dumps(source.config().to_dict(), sort_keys=True, default=str)
    return {
        "source": hashlib.sha256(json.dumps([facts, config]).encode()).hexdigest(),
        "quantization": describe(spec),
        "max_shard_bytes": max_shard_bytes,
        "options": json.loads(json.dumps(options)),
    }


def describe(spec: Quantization) -> dict[str, Any]:
    """A Quantization as JSON."""
    fields = dataclasses.asdict(spec)
    fields["skip"] = None if spec.skip is None else list(spec.skip)
    return fields


# ---- cutting ---------------------------------------------------------------------------------------------------------


def _cut_all(
    source: Source,
    work: Path,
    spec: Quantization,
    limit: int,
    cutter: Cutter,
    state: dict[str, Any],
    progress: Report | None,
) -> None:
    """Cut every tensor that no finished shard holds."""
    shapes = source.tensor_shapes()
    size = _dtype(source).itemsize
    amounts = {name: torch.Size(shape).numel() * size for name, shape in shapes.items()}
    done = {name for shard in state["shards"] for name in shard["ours"]}
    read, total = sum(amounts[name] for name in done), sum(amounts.values())
    if progress and done:
        progress(read, total)
    room = (len(shapes) * 6 + 1) * _ENTRY_BYTES
    todo = shapes.keys() - done
    if not todo:
        return
    stream = cutter.stream(todo, work)
    whole = _Originals(source, _dtype(source))
    item = next(stream, None)
    while item is not None:
        shard: dict[str, Any] = {"file": f"shard-{len(state['shards'])}", "ours": []}
        notes: dict[str, Any] = {}
        ended = False
        with ShardWriter(work / shard["file"], room) as writer:
            while item is not None:
                name, weight = item
                stored = to_stored(names.to_hf(name), _as_stored(name, weight, _dtype(source)))
                nbytes = sum(tensor.nbytes for tensor in stored.values())
                if writer.nbytes and writer.nbytes + nbytes > limit:
                    break
                for each, tensor in stored.items():
                    writer.add(each, tensor)
                notes[names.to_hf(name)] = {"bytes": nbytes, **whole.error(name, weight)}
                shard["ours"].append(name)
                read += amounts[name]
                del item, weight, stored  # before the reader moves on, so that its memory can go
                if progress:
                    progress(read, total)
                if ended := cutter.ends_file(name):
                    break
                item = next(stream, None)
            shard["theirs"] = writer.names
            writer.finish()
        shard["size"], shard["nbytes"] = (work / shard["file"]).stat().st_size, writer.nbytes
        state["shards"].append(shard)
        state["weights"] |= notes
        cutter.saved()
        before, state["kept"] = state.get("kept", ""), cutter.kept()
        save_state(work, state)
        if before and before != state["kept"]:
            (work / before).unlink(missing_ok=True)
        if ended:
            item = next(stream, None)


def _as_stored(name: str, weight: CheckpointWeight, dtype: torch.dtype) -> CheckpointWeight:
    """Norms as files hold them: ``w = scale - 1`` in the weights' dtype."""
    return (weight - 1.0).to(dtype) if isinstance(weight, Tensor) and name.endswith(".scale") else weight


class _Originals:
    """The whole weights, read once more to say how far the cut ones are from them."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype

    def error(self, name: str, weight: CheckpointWeight) -> dict[str, Any]:
        """{"format", "relative_error"} of a cut weight; nothing of a whole one."""
        if isinstance(weight, Tensor):
            return {}
        kind = weight.quant_type if isinstance(weight, FourBitWeight) else "int8"
        reading = self.source.tensors(dtype=self.dtype, only={name})
        original = next(reading)[1]
        assert isinstance(original, Tensor)  # the source is whole
        error = relative_error(original, weight, sample=_ERROR_SAMPLE)
        next(reading, None)  # the reader gives the memory back
        return {"format": kind, "relative_error": error}


# ---- the end ---------------------------------------------------------------------------------------------------------


def _finish(
    source: Source, work: Path, spec: Quantization, state: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """Everything beside the weights. The state file stays until the folder has its name."""
    from gemcut import __version__

    dtype = str(_dtype(source)).removeprefix("torch.")
    config = {**source.config().to_dict(), "torch_dtype": dtype, **config_entries(spec, dtype)}
    write_json(work / "config.json", config)
    _carry(source, work)
    if len(state["shards"]) > 1:
        last = len(state["shards"])
        weight_map = {
            theirs: shard_name(i, last) for i, shard in enumerate(state["shards"]) for theirs in shard["theirs"]
        }
        total = sum(shard["nbytes"] for shard in state["shards"])
        write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    whole = sum(torch.Size(shape).numel() for shape in source.tensor_shapes().values()) * _dtype(source).itemsize
    report: dict[str, Any] = {
        "gemcut_version": __version__,
        "torch_version": str(torch.__version__),
        "source": source.name,
        "revision": source.revision,
        "quantization": describe(spec),
        "options": options,
        "bytes_before": whole,
        "bytes_after": sum(shard["nbytes"] for shard in state["shards"]),
        "weights": state["weights"],
    }
    write_json(work / REPORT, report)
    return report


def _carry(source: Source, work: Path) -> None:
    if source.path.is_dir():
        for pattern in _CARRIED:
            for file in source.path.glob(pattern):
                if file.is_file():
                    copy = work / file.relative_to(source.path)
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, copy)
    else:
        source.tokenizer().save(work)
        if generation := source.generation_config():
            write_json(work / "generation_config.json", generation)
    if source.licence_notice and not any(work.glob("NOTICE*")):
        (work / "NOTICE").write_text(source.licence_notice + "\n", encoding="utf-8")
