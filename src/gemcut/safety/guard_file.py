"""The guard file: which judges look at prompts and answers, by which policies, and what follows. TOML, read strictly.

    GuardFile.read -> GuardFile.build(gemma) -> Guard (guard.py)

Everything is checked when the file is read, before any model is loaded; a policy without a judge is an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from gemcut.errors import ParameterError
from gemcut.safety.judge import Judge
from gemcut.safety.policies import Policy, builtin_policies, check_threshold, policies_of
from gemcut.settings import parse_toml, read_text, suggestion

if TYPE_CHECKING:
    from gemcut.gemma import Gemma
    from gemcut.safety.guard import Guard

Mode = Literal["off", "score", "block"]
MODES: tuple[Mode, ...] = ("off", "score", "block")
KINDS = ("lexicon", "linear", "shieldgemma", "http", "self")
_KEYS = {
    "mode", "on_failure", "timeout", "refusal", "piece_tokens", "input", "output", "thresholds", "policy", "judge",
}  # fmt: skip
_JUDGE_KEYS = {
    "lexicon": {"path", "policy"},
    "linear": {"path", "policy"},
    "shieldgemma": {"model", "policies", "quantization", "device"},
    "http": {"url", "policies", "key_env"},
    "self": {"policies"},
}
REFUSAL = "I can't help with that."


@dataclass(frozen=True)
class JudgeSpec:
    """A judge as the file names it. ``policies``: those it scores."""

    kind: str
    policies: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class GuardFile:
    """What a guard file says. Seconds, tokens.

    Attributes:
        mode: "score" reports, "block" refuses, "off" does nothing. A request can raise it and not lower it.
        on_failure: what becomes of a text that a judge could not judge, in mode "block": "block" or "pass".
        timeout: how long the judges together may take for one look.
        refusal: what a blocked answer says.
        piece_tokens: a stream lets out at most so many tokens at once, each piece checked before.
        input, output: policies that prompts, and answers, are judged by.
    """

    mode: Mode = "block"
    on_failure: Literal["block", "pass"] = "block"
    timeout: float = 5.0
    refusal: str = REFUSAL
    piece_tokens: int = 32
    input: tuple[str, ...] = ()
    output: tuple[str, ...] = ()
    policies: Mapping[str, Policy] = field(default_factory=builtin_policies)
    judges: tuple[JudgeSpec, ...] = ()

    @classmethod
    def read(cls, path: str | Path) -> GuardFile:
        """Raises ParameterError with the file and the key that is wrong."""
        path = Path(path)
        try:
            text = read_text(path)
        except OSError as error:
            raise ParameterError(f"cannot read the guard file {path}: {error.strerror or error}") from None
        if text is None:
            raise ParameterError(f"there is no guard file {path}; docs/responsible-use.md shows one")
        return cls.of(parse_toml(text, path), str(path), path.parent)

    @classmethod
    def of(cls, table: Mapping[str, Any], where: str, folder: Path = Path()) -> GuardFile:
        """From the file's table; paths in it begin at ``folder``."""
        for key in table:
            if key not in _KEYS:
                raise ParameterError(f"{where}: unknown key {key!r}; {suggestion(key, sorted(_KEYS))}")
        policies = policies_of(_table(table, "policy", where), where, builtin_policies())
        for name, value in _table(table, "thresholds", where).items():
            if name not in policies:
                raise ParameterError(f"{where}: thresholds names {name!r}; {suggestion(name, sorted(policies))}")
            old = policies[name]
            value = check_threshold(value, f"{where}: the threshold of {name}")
            policies[name] = Policy(name, old.definition, value, old.heading)
        specs = table.get("judge", [])
        if not isinstance(specs, list) or not all(isinstance(spec, dict) for spec in specs):
            raise ParameterError(f"{where}: judge is no list of tables; expected [[judge]] with a kind")
        judges = tuple(_judge(spec, f"{where}, judge {n}", policies, folder) for n, spec in enumerate(specs, 1))
        judged = list(dict.fromkeys(name for judge in judges for name in judge.policies))
        mode = _one_of(table, "mode", MODES, "block", where)
        if mode != "off" and not judged:
            raise ParameterError(f"{where}: there is no judge; name one in [[judge]], kind = {' or '.join(KINDS)}")
        sides = {side: _side(table, side, policies, judged, where) for side in ("input", "output")}
        refusal = table.get("refusal", REFUSAL)
        if not isinstance(refusal, str) or not 1 <= len(refusal) <= 2000:
            raise ParameterError(f"{where}: refusal is no text of 1 to 2,000 characters")
        timeout, piece = table.get("timeout", 5.0), table.get("piece_tokens", 32)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0.01 <= timeout <= 600:
            raise ParameterError(f"{where}: timeout is {timeout!r}; expected seconds from 0.01 to 600")
        if type(piece) is not int or not 1 <= piece <= 4096:
            raise ParameterError(f"{where}: piece_tokens is {piece!r}; expected a whole number from 1 to 4096")
        return cls(
            mode=cast("Mode", mode),
            on_failure=cast("Any", _one_of(table, "on_failure", ("block", "pass"), "block", where)),
            timeout=float(timeout),
            refusal=refusal,
            piece_tokens=piece,
            input=sides["input"],
            output=sides["output"],
            policies=policies,
            judges=judges,
        )

    @property
    def needs_model(self) -> bool:
        """Whether the served model itself is a judge."""
        return any(judge.kind == "self" for judge in self.judges)

    def build(self, gemma: Gemma | None = None) -> Guard:
        """Load the judges. ``gemma``: the model that is guarded, for kind "self". Raises ParameterError."""
        from gemcut.safety.guard import Guard

        return Guard(self, [(self._load(spec, gemma), spec.policies) for spec in self.judges])

    def _load(self, spec: JudgeSpec, gemma: Gemma | None) -> Judge:
        from gemcut.safety.gemma_judge import GemmaJudge, load_judge
        from gemcut.safety.http_judge import HttpJudge
        from gemcut.safety.lexicon import Lexicon
        from gemcut.safety.linear import LinearJudge

        options = spec.options
        own = {name: self.policies[name] for name in spec.policies}
        if spec.kind == "lexicon":
            return Lexicon.read(options["path"], spec.policies[0])
        if spec.kind == "linear":
            judge = LinearJudge.load(options["path"])
            missing = [name for name in spec.policies if name not in judge.policies]
            if missing:
                raise ParameterError(f"{options['path']} scores {', '.join(judge.policies)}, not {missing[0]}")
            return judge
        if spec.kind == "http":
            key = os.environ.get(options["key_env"], "") if "key_env" in options else ""
            if "key_env" in options and not key:
                raise ParameterError(f"the judge's key is to be in the variable {options['key_env']}, which is not set")
            return HttpJudge(options["url"], spec.policies, timeout=self.timeout, key=key)
        if spec.kind == "shieldgemma":
            load = {name: options[name] for name in ("quantization", "device") if name in options}
            return load_judge(options["model"], own, progress=False, **load)
        if gemma is None:
            raise ParameterError("a judge of kind self is the guarded model itself, and there is none here")
        return GemmaJudge(gemma, own, form="self")


def _table(table: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found = table.get(key, {})
    if not isinstance(found, dict):
        raise ParameterError(f"{where}: {key} is {found!r}; expected a table")
    return found


def _one_of(table: Mapping[str, Any], key: str, known: Sequence[str], default: str, where: str) -> str:
    value = table.get(key, default)
    if value not in known:
        raise ParameterError(f"{where}: {key} is {value!r}; expected one of {', '.join(known)}")
    return str(value)


def _names(value: Any, where: str, policies: Mapping[str, Policy]) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise ParameterError(f"{where} is {value!r}; expected a list of policies' names")
    for name in value:
        if name not in policies:
            raise ParameterError(f"{where} names the policy {name!r}; {suggestion(name, sorted(policies))}")
    return tuple(dict.fromkeys(value))


def _side(
    table: Mapping[str, Any], side: str, policies: Mapping[str, Policy], judged: Sequence[str], where: str
) -> tuple[str, ...]:
    """The policies of prompts or of answers: those that are named, else all that have a judge."""
    if side not in table:
        return tuple(judged)
    if table[side] == []:
        return ()
    names = _names(table[side], f"{where}: {side}", policies)
    for name in names:
        if name not in judged:
            raise ParameterError(
                f"{where}: {side} names the policy {name}, which no judge scores; name one in [[judge]]"
            )
    return names


def _judge(spec: Mapping[str, Any], where: str, policies: Mapping[str, Policy], folder: Path) -> JudgeSpec:
    kind = spec.get("kind")
    if kind not in KINDS:
        raise ParameterError(f"{where}: kind is {kind!r}; expected one of {', '.join(KINDS)}")
    options = {key: value for key, value in spec.items() if key != "kind"}
    for key in options:
        if key not in _JUDGE_KEYS[kind]:
            raise ParameterError(f"{where}: unknown key {key!r}; {suggestion(key, sorted(_JUDGE_KEYS[kind]))}")
        if key not in ("policies",) and not isinstance(options[key], str):
            raise ParameterError(f"{where}: {key} is {options[key]!r}; expected a text")
    needed = {"lexicon": "path", "linear": "path", "shieldgemma": "model", "http": "url"}.get(kind)
    if needed is not None and needed not in options:
        raise ParameterError(f"{where}: a judge of kind {kind} needs {needed}")
    if "path" in options:
        options["path"] = folder / options["path"]
    if kind in ("lexicon", "linear"):
        if "policy" not in options:
            raise ParameterError(f"{where}: a judge of kind {kind} needs policy, the name of the policy it scores")
        return JudgeSpec(kind, _names([options["policy"]], f"{where}: policy", policies), options)
    if "policies" in options:
        names = _names(options["policies"], f"{where}: policies", policies)
    elif kind == "http":
        raise ParameterError(f"{where}: a judge of kind http needs policies, the names that it scores")
    else:
        from gemcut.safety.gemma_judge import SHIELD_POLICIES

        names = SHIELD_POLICIES if kind == "shieldgemma" else tuple(policies)
    return JudgeSpec(kind, names, options)
