"""A training run as one TOML file, read strictly: an unknown key, a wrong type or a missing file is one line."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from gemcut.config import FAMILY, GemmaConfig
from gemcut.errors import ConfigError, ParameterError, RecipeError
from gemcut.training.network import REMAT
from gemcut.training.optimizer import OptimizerConfig

#: What TOML must give for a field of such a type, or of such a name, and how an error says so.
_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "a text"),
    "config": (dict, "a table"),
    "mesh": (list, "a list of three whole numbers"),
}


@dataclass(frozen=True)
class RunSection:
    """``[run]``: how long, how large a batch, and what happens how often; 0 is never.

    A step learns from ``micro_batches`` times ``batch`` windows of ``length`` tokens. ``keep`` checkpoints are kept.
    ``workers`` are threads that read ahead. ``mesh`` is (replica, data, model); left out, all devices stand along data.
    """

    steps: int
    batch: int
    length: int
    micro_batches: int = 1
    seed: int = 0
    save_every: int = 100
    keep: int = 2
    eval_every: int = 100
    sample_every: int = 0
    sample_prompt: str = "The"
    sample_tokens: int = 40
    log_every: int = 1
    workers: int = 0
    mesh: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelSection:
    """``[model]``: ``size`` of the family, or ``config`` (a config.json's keys), or ``folder`` to go on from.

    ``tokenizer`` is a tokenizer.json (a folder has its own); ``train_tokenizer`` learns one of so many pieces from the
    texts of the run. ``remat`` "auto" is the policy that computes least again and fits a device's memory.
    """

    size: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    tokenizer: str = ""
    train_tokenizer: int = 0
    compute_dtype: str = "bfloat16"
    attention: str = "xla"
    remat: str = "none"
    z_loss: float = 0.0


@dataclass(frozen=True)
class SourceSection:
    """``[[source]]``: a folder of shards or of texts, its share by weight, and windows held out to measure the loss.

    ``teacher`` is a folder that `gemcut train teacher-logits` wrote for this source.
    """

    name: str
    path: str
    weight: float = 1.0
    held_out: int = 4
    teacher: str = ""


@dataclass(frozen=True)
class TeacherSection:
    """``[teacher]``: ``folder`` of a model that answers in the same step; without it, sources bring stored answers.

    ``share`` of the loss is the teacher's, the rest is cross-entropy with the text. ``temperature`` needs a folder.
    """

    folder: str = ""
    temperature: float = 1.0
    share: float = 1.0


@dataclass(frozen=True)
class RunFile:
    """A run file: its sections, its text, and the folder that its paths are relative to."""

    run: RunSection
    model: ModelSection
    sources: tuple[SourceSection, ...]
    optimizer: OptimizerConfig
    teacher: TeacherSection | None
    text: str
    base: Path

    def path(self, name: str) -> Path:
        """A path that the file names."""
        return self.base / name


def read_run_file(path: Path, base: Path | None = None) -> RunFile:
    """Read a run file; its paths are relative to ``base``, else to its own folder. Raises RecipeError."""
    try:
        text = path.read_text("utf-8")
        data = tomllib.loads(text)
    except FileNotFoundError:
        raise RecipeError(f"there is no run file {path}; expected a TOML file such as configs/smoke.toml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is no TOML: {error}") from None
    _known(path, "the file", data, ("run", "model", "source", "optimizer", "teacher"))
    sources = data.get("source", [])
    if not isinstance(sources, list) or not sources or not all(isinstance(each, dict) for each in sources):
        raise RecipeError(f"{path}: the mixture is empty; expected at least one [[source]] with name and path")
    found = RunFile(
        run=_section(path, "[run]", data.get("run", {}), RunSection),
        model=_section(path, "[model]", data.get("model", {}), ModelSection),
        sources=tuple(_section(path, f"[[source]] {i + 1}", each, SourceSection) for i, each in enumerate(sources)),
        optimizer=_section(path, "[optimizer]", data.get("optimizer", {}), OptimizerConfig),
        teacher=_section(path, "[teacher]", data["teacher"], TeacherSection) if "teacher" in data else None,
        text=text,
        base=(path.parent if base is None else base).resolve(),
    )
    try:
        _check(found)
    except (ParameterError, ConfigError) as error:
        raise RecipeError(f"{path}: {error}") from None
    return found


def network_config(file: RunFile, vocabulary: int | None = None) -> GemmaConfig:
    """The network that a run file names; ``vocabulary``: of a tokenizer that the run learns. Raises ConfigError."""
    model = file.model
    if model.folder:
        return GemmaConfig.from_file(file.path(model.folder) / "config.json")
    if model.size:
        return FAMILY[model.size]
    data = {"model_type": "gemma2", **model.config}
    known = tuple(FAMILY["gemma-2-2b" if data["model_type"] == "gemma2" else "gemma-3-270m"].to_dict())
    for key in model.config:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise ConfigError(f"[model.config]: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
    if vocabulary is not None:
        data.setdefault("vocab_size", vocabulary)
    return GemmaConfig.from_dict(data)


def _check(file: RunFile) -> None:
    run, model = file.run, file.model
    for name in ("steps", "batch", "length", "micro_batches", "keep", "log_every"):
        if getattr(run, name) < 1:
            raise ParameterError(f"{name} is {getattr(run, name)}; expected at least 1")
    for name in ("save_every", "eval_every", "sample_every", "sample_tokens", "workers", "seed"):
        if getattr(run, name) < 0:
            raise ParameterError(f"{name} is {getattr(run, name)}; expected 0 or more")
    ways = [name for name in ("size", "config", "folder") if getattr(model, name)]
    if len(ways) != 1:
        given = " and ".join(ways) if ways else "none of them"
        raise ParameterError(f"[model] names {given}; expected one of size, config and folder")
    if model.size and model.size not in FAMILY:
        raise ParameterError(f"size is {model.size!r}; expected one of {', '.join(FAMILY)}")
    if not model.folder and bool(model.tokenizer) == bool(model.train_tokenizer):
        raise ParameterError("[model] needs either tokenizer, a tokenizer.json, or train_tokenizer, a number of pieces")
    if model.folder and (model.tokenizer or model.train_tokenizer):
        raise ParameterError("[model] has a folder with its tokenizer; leave tokenizer and train_tokenizer out")
    if model.compute_dtype not in ("bfloat16", "float32"):
        raise ParameterError(f"compute_dtype is {model.compute_dtype!r}; expected bfloat16 or float32")
    if model.remat not in (*REMAT, "auto"):
        raise ParameterError(f"remat is {model.remat!r}; expected one of {', '.join(REMAT)}, auto")
    _check_teacher(file)
    if run.mesh and (len(run.mesh) != 3 or min(run.mesh) < 1):
        raise ParameterError(f"mesh is {list(run.mesh)}; expected three numbers from 1: replica, data, model")
    names = [source.name for source in file.sources]
    if len(set(names)) < len(names):
        raise ParameterError("two sources have one name; give each a name of its own")
    for source in file.sources:
        if not source.weight >= 0 or source.held_out < 0:
            raise ParameterError(f"source {source.name}: weight and held_out must be 0 or more")
        if not file.path(source.path).exists():
            raise ParameterError(f"source {source.name}: there is no {file.path(source.path)}")
    if not model.train_tokenizer:
        config = network_config(file)
        if run.length > config.max_position_embeddings:
            raise ParameterError(
                f"length is {run.length:,}; the model's context has {config.max_position_embeddings:,} tokens"
            )


def _check_teacher(file: RunFile) -> None:
    stored = [source.name for source in file.sources if source.teacher]
    if file.teacher is None:
        if stored:
            raise ParameterError(f"source {stored[0]} has a teacher, but there is no [teacher] that says its share")
        return
    if not 0 <= file.teacher.share <= 1 or not 0.01 <= file.teacher.temperature <= 100:
        raise ParameterError("[teacher]: expected a share of 0 to 1 and a temperature of 0.01 to 100")
    if file.teacher.folder and stored:
        raise ParameterError(f"[teacher] has a folder and source {stored[0]} stored answers; choose one of the two")
    if not file.teacher.folder and len(stored) < len(file.sources):
        missing = next(source.name for source in file.sources if not source.teacher)
        raise ParameterError(f"[teacher] needs a folder, or every source its teacher; source {missing} has none")
    if not file.teacher.folder and file.teacher.temperature != 1:
        raise ParameterError("stored answers have temperature 1; leave temperature out, or give [teacher] a folder")
    if file.model.z_loss:
        raise ParameterError("z_loss goes with next-token training; leave it out with [teacher]")


def _known(path: Path, where: str, table: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; expected {', '.join(names)}"
            raise RecipeError(f"{path}, {where}: unknown key {key!r}{hint}")


def _section(path: Path, where: str, table: Any, kind: type[Any]) -> Any:
    if not isinstance(table, dict):
        raise RecipeError(f"{path}: {where} is {type(table).__name__}; expected a table")
    hints = get_type_hints(kind)
    _known(path, where, table, tuple(each.name for each in dataclasses.fields(kind)))
    values: dict[str, Any] = {}
    for each in dataclasses.fields(kind):
        if each.name not in table:
            if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
                raise RecipeError(f"{path}: {where} needs the key {each.name}")
            continue
        value, hint = table[each.name], hints[each.name]
        kind_of = each.name if each.name in _KINDS else getattr(hint, "__name__", "")
        wanted, words = _KINDS.get(kind_of, _KINDS["str"])  # a Literal's value is a text, which its class checks
        listed = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
        if isinstance(value, bool) or not isinstance(value, wanted) or (wanted is list and not listed):
            raise RecipeError(f"{path}, {where}: {each.name} is {value!r}; expected {words}")
        values[each.name] = float(value) if hint is float else tuple(value) if wanted is list else value
    try:
        return kind(**values)
    except ParameterError as error:
        raise RecipeError(f"{path}, {where}: {error}") from None
