"""Cut a checkpoint on disk: tensor by tensor into a folder that appears whole, and goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gemcut.checkpoint import names
from gemcut.checkpoint.bnb import config_entries
from gemcut.checkpoint.safetensors_reader import INDEX
from gemcut.checkpoint.shard import ShardWriter
from gemcut.checkpoint.source import Source
from gemcut.errors import CheckpointError, ParameterError
from gemcut.quantization.error import relative_error
from gemcut.quantization.spec import Quantization
from gemcut.quantization.state import to_stored
from gemcut.quantization.stream import quantize_tensors
from gemcut.quantization.weights import FourBitWeight, Weight

REPORT = "gemcut_quantization.json"
_STATE = "state.json"
# Files of a folder that travel with the weights.
_CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
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

    def stream(self, wanted: Set[str], work: Path) -> Iterator[tuple[str, Weight]]:
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

    def stream(self, wanted: Set[str], work: Path) -> Iterator[tuple[str, Weight]]:
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
    max_shard_bytes: int = 5_000_000_000,
    cutter: Cutter | None = None,
    options: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
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
        progress: hears (bytes read, bytes in all).
        say: hears a line about going on or starting anew.

    Returns:
        the report that is also written to ``gemcut_quantization.json``: options, sizes, and each matrix's relative
        error.

    Raises:
        CheckpointError: the source is cut already or holds NaN, ``out`` is taken or a mount point, or the disk is full.
        ParameterError: blocks that do not divide the rows.
    """
    out = _behind_link(Path(out))
    _check(source, out, spec)
    work = working_folder(out)
    key = _fingerprint(source, spec, max_shard_bytes, options or {})
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _Lock(work):
            state = _resume(work, key, say)
            try:
                _cut_all(source, work, spec, max_shard_bytes, cutter or NearestCutter(source, spec), state, progress)
            finally:
                if not state["shards"]:  # nothing is done that could be gone on with
                    shutil.rmtree(work, ignore_errors=True)
            report = _finish(source, work, spec, state, options or {})
            _publish(work, out)
    except CheckpointError:
        raise
    except OSError as error:
        kept = "; finished files are kept there" if can_go_on(out) else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way = "free some space and run the same again" if full else "choose a place where files can be written"
        raise CheckpointError(f"cannot write {work}: {error.strerror or error}{kept}: {way}") from None
    return report


def working_folder(out: Path) -> Path:
    """Where finished files wait until ``out`` is whole."""
    out = _behind_link(out)
    return out.with_name(f".{out.name}.quantizing")


def can_go_on(out: Path) -> bool:
    """Whether a run into ``out`` that was stopped has left finished files."""
    return (working_folder(out) / _STATE).is_file()


def _behind_link(out: Path) -> Path:
    """What ``out`` is a link to, if it is one: the link stays, and the folder appears where it leads."""
    return Path(os.path.realpath(out)) if out.is_symlink() else out


def check_out(out: Path) -> None:
    """Raise CheckpointError if ``out`` is taken, or cannot be replaced by a finished folder."""
    if not out.name or out.name == "..":
        raise CheckpointError(f"{out} is no name for a new folder; choose another")
    if os.path.ismount(_behind_link(out)):
        raise CheckpointError(f"{out} is a mount point; name a new folder inside it, such as {out / 'model'}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} already exists and is not empty; choose another name or remove it")


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


# ---- the working folder ----------------------------------------------------------------------------------------------


class _Lock:
    """No two runs may write one folder. The lock goes with the process, so a kill leaves none behind."""

    def __init__(self, work: Path) -> None:
        self._path = work / "lock"

    def __enter__(self) -> None:
        self._file = open(self._path, "w")
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise CheckpointError(f"another run is writing {self._path.parent}; wait for it or stop it") from None

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _fingerprint(source: Source, spec: Quantization, max_shard_bytes: int, options: dict[str, Any]) -> dict[str, Any]:
    """What must be the same to go on: the source's files, and everything that decides the result."""
    files = sorted(source.path.glob("*.safetensors")) if source.path.is_dir() else [source.path]
    facts = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
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
    fields["compute_dtype"] = None if spec.compute_dtype is None else str(spec.compute_dtype).removeprefix("torch.")
    fields["skip"] = None if spec.skip is None else list(spec.skip)
    return fields


def _resume(work: Path, key: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The state of an earlier run of the same work, or of a new one."""
    state: dict[str, Any]
    fresh: dict[str, Any] = {"key": key, "shards": [], "weights": {}}
    try:
        state = json.loads((work / _STATE).read_bytes())
        shards = state["shards"]
        sound = state["key"] is not None and all((work / s["file"]).stat().st_size == s["size"] for s in shards)
        done = sum(len(shard["ours"]) for shard in shards)
    except FileNotFoundError:
        state, sound, done = fresh, True, 0
    except (ValueError, KeyError, TypeError, AttributeError):
        state, sound, done = fresh, False, 0
    if not sound or state["key"] != key:
        why = "the source or the options have changed since" if sound else "what it left is damaged"
        say(f"an earlier run was stopped, but {why}: starting anew")
        state = fresh
    elif done:
        say(f"going on where an earlier run was stopped: {len(state['shards'])} files ({done} tensors) are done")
    kept = {"lock", _STATE, state.get("kept", ""), *(shard["file"] for shard in state["shards"])}
    for path in work.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return state


def _save_state(work: Path, state: dict[str, Any]) -> None:
    _write_json(work / _STATE, state)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


# ---- cutting ---------------------------------------------------------------------------------------------------------


def _cut_all(
    source: Source,
    work: Path,
    spec: Quantization,
    limit: int,
    cutter: Cutter,
    state: dict[str, Any],
    progress: Callable[[int, int], None] | None,
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
        _save_state(work, state)
        if before and before != state["kept"]:
            (work / before).unlink(missing_ok=True)
        if ended:
            item = next(stream, None)


def _as_stored(name: str, weight: Weight, dtype: torch.dtype) -> Weight:
    """Norms as files hold them: ``w = scale - 1`` in the weights' dtype."""
    return (weight - 1.0).to(dtype) if isinstance(weight, Tensor) and name.endswith(".scale") else weight


class _Originals:
    """The whole weights, read once more to say how far the cut ones are from them."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype

    def error(self, name: str, weight: Weight) -> dict[str, Any]:
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
    _write_json(work / "config.json", config)
    _carry(source, work)
    if len(state["shards"]) > 1:
        last = len(state["shards"])
        weight_map = {
            theirs: f"model-{i + 1:05d}-of-{last:05d}.safetensors"
            for i, shard in enumerate(state["shards"])
            for theirs in shard["theirs"]
        }
        total = sum(shard["nbytes"] for shard in state["shards"])
        _write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
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
    _write_json(work / REPORT, report)
    return report


def add_to_report(folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
    """Add entries to the report of a finished folder; returns the whole. Raises CheckpointError."""
    path = folder / REPORT
    part = folder / f".{REPORT}.{os.getpid()}.part"
    try:
        report = {**json.loads(path.read_bytes()), **entries}
        _write_json(part, report)
        part.replace(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write {path}: {error}; the folder itself is complete") from None
    finally:
        part.unlink(missing_ok=True)
    return report


def _carry(source: Source, work: Path) -> None:
    if source.path.is_dir():
        for pattern in _CARRIED:
            for file in source.path.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, work / file.name)
    else:
        source.tokenizer().save(work)
        if generation := source.generation_config():
            _write_json(work / "generation_config.json", generation)
    if source.licence_notice and not any(work.glob("NOTICE*")):
        (work / "NOTICE").write_text(source.licence_notice + "\n", encoding="utf-8")


def _publish(work: Path, out: Path) -> None:
    """Give the shards their names and the folder its own. A kill in between is made good by the next run."""
    state = json.loads((work / _STATE).read_bytes())
    last = len(state["shards"])
    final = work / "folder"  # built beside the state, so that what is called OUT never lacks a file
    final.mkdir()
    for i, shard in enumerate(state["shards"]):
        name = "model.safetensors" if last == 1 else f"model-{i + 1:05d}-of-{last:05d}.safetensors"
        try:
            os.link(work / shard["file"], final / name)
        except OSError:  # a file system without links: a kill in these few renames costs the run
            (work / shard["file"]).replace(final / name)
    for path in work.iterdir():
        if path.is_file() and path.name not in {
            "lock",
            _STATE,
            state.get("kept", ""),
            *(shard["file"] for shard in state["shards"]),
        }:
            path.replace(final / path.name)
    if out.exists():
        out.rmdir()
    final.rename(out)
    shutil.rmtree(work, ignore_errors=True)
