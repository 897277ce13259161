"""Where the values of a request's sampling come from: what was given, else the checkpoint, else what is built in.

Free of torch, so that ``gemcut info`` can tell a checkpoint's defaults quickly.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemcut.errors import ParameterError

if TYPE_CHECKING:
    from gemcut.engine.sampling import SamplingParams

#: One place where values can come from: its name, for people, and what it says. None means that it says nothing.
Level = tuple[str, Mapping[str, Any]]

GIVEN = "given"
CHECKPOINT = "checkpoint"
BUILT_IN = "built-in"

#: Added to a suppressed token's logit; finite, since log-probabilities of all-suppressed vocabularies must be too.
SUPPRESSED = -1e9

# Keys of generation_config.json that mean what the field of SamplingParams of the same name means, and two lengths
# that count the prompt too.
_LENGTHS = ("max_new_tokens", "max_length", "min_new_tokens", "min_length")
_SAME = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", *_LENGTHS)
# What narrows a draw, and the value at which it does nothing. Naming one of them is asking for a draw.
_NARROWS = {"top_k": 0, "top_p": 1, "min_p": 0}
# Keys of generation_config.json that would change the tokens and that gemcut does not have, with the values at which
# they do nothing.
_UNKNOWN_HERE: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "dola_layers": (),
    "max_time": (),
}


@dataclass(frozen=True)
class ResolvedSampling:
    """What one request samples with, and where each value came from.

    Attributes:
        params: the values.
        origins: the level of each field of SamplingParams whose value is not built in.
    """

    params: SamplingParams
    origins: Mapping[str, str]

    def origin(self, name: str) -> str:
        """The level a field's value came from; "built-in" where no level named it."""
        return self.origins.get(name, BUILT_IN)

    def report(self) -> dict[str, dict[str, Any]]:
        """{name: {"value": …, "origin": …}} of the temperature, the length, and everything that some level named."""
        shown = [f.name for f in dataclasses.fields(self.params)]
        shown = [name for name in shown if name in self.origins or name in ("temperature", "max_new_tokens")]
        values = {name: getattr(self.params, name) for name in shown}
        if "grammar" in values:
            values["grammar"] = None if self.params.grammar is None else str(self.params.grammar)
        if "watermark" in values:
            values["watermark"] = values["watermark"] is not None  # never the key
        return {name: {"value": value, "origin": self.origin(name)} for name, value in values.items()}

    def words(self) -> str:
        """The same in one line: "temperature 0.6 (checkpoint), top_k 64 (given), max_new_tokens 256 (built-in)"."""
        return ", ".join(f"{name} {_word(entry['value'])} ({entry['origin']})" for name, entry in self.report().items())


def checkpoint_level(generation_config: Mapping[str, Any]) -> Level:
    """What a generation_config.json says of sampling, under the names of SamplingParams.

    ``max_length`` and ``min_length`` stay as they are: they count the prompt, whose length the request knows.
    """
    found = {name: generation_config[name] for name in _SAME if generation_config.get(name) is not None}
    if (stop := generation_config.get("stop_strings")) is not None:
        found["stop"] = stop
    if suppressed := generation_config.get("suppress_tokens"):
        if not isinstance(suppressed, list) or not all(type(i) is int for i in suppressed):
            raise ParameterError(f"{CHECKPOINT}: suppress_tokens is {str(suppressed)[:60]}; expected a list of ids")
        found["logit_bias"] = dict.fromkeys(suppressed, SUPPRESSED)
    return CHECKPOINT, found


def left_out(generation_config: Mapping[str, Any]) -> list[str]:
    """Keys of a generation_config.json that would change the tokens and that gemcut does not have."""
    return [
        name
        for name, neutral in _UNKNOWN_HERE.items()
        if (value := generation_config.get(name)) is not None and value not in neutral
    ]


def checkpoint_words(generation_config: Mapping[str, Any]) -> str | None:
    """A checkpoint's sampling defaults in one line, "temperature 0.6, top_k 64"; None where it has none."""
    values = checkpoint_level(generation_config)[1]
    return ", ".join(f"{name} {_word(value)}" for name, value in values.items()) or None


def resolve_sampling(
    levels: Sequence[Level], *, prompt_tokens: int, room: int, new_tokens: int = 256
) -> ResolvedSampling:
    """Values of SamplingParams from levels, the first that names a field decides; what none names is built in.

    ``do_sample`` is the one switch that speaks about others; the level that speaks last about a draw decides:

    ====================  ===================================  =================================================
    do_sample             temperature                          the request
    ====================  ===================================  =================================================
    at no level           at no level                          samples at 1.0
    at no level           0 / above 0                          greedy / samples at it
    false                 at no level, the same or a lower     greedy
    false                 at a higher level                    greedy where it is 0, else samples at it
    false                 any but a higher level, and top_k,   samples, at the highest temperature level's value
                          top_p or min_p narrows at a higher   or 1.0: who asks for top_p wants a draw
    true                  at no level                          samples at 1.0
    true                  above 0, at any level                samples at it
    true                  0 at a higher level                  greedy
    true                  0 at the same level                  ParameterError: a contradiction
    true                  0 at a lower level                   samples at the next lower level's, or 1.0
    ====================  ===================================  =================================================

    Lengths: ``max_new_tokens`` wins over ``max_length`` and ``min_new_tokens`` over ``min_length``, at whatever levels
    they are. The first level is what was asked for this time: its length is taken as it is (the engine refuses what
    does not fit the context). A length of any other level, and the built-in one, is a default: it is shortened to
    ``room``, grows to an asked-for minimum, and an unasked minimum never exceeds it.

    ``logit_bias`` of all levels is joined.

    Args:
        levels: (name, values) from the highest to the lowest. Values are fields of SamplingParams, and max_length and
            min_length; None is the same as not there.
        prompt_tokens: tokens of the prompt.
        room: tokens that the context holds beside the prompt.
        new_tokens: the built-in length.

    Raises:
        ParameterError: a value that is used is out of range, or an unknown name; beside the first level's, the
            message begins with the level's name.
    """
    from gemcut.engine.sampling import SamplingParams

    said = [(origin, {k: v for k, v in values.items() if v is not None}) for origin, values in levels]
    known = {f.name for f in dataclasses.fields(SamplingParams)} | set(_LENGTHS)
    for index, (origin, values) in enumerate(said):
        if unknown := sorted(set(values) - known):
            raise ParameterError(
                f"{'' if index == 0 else f'{origin}: '}unknown sampling parameter {unknown[0]!r}; known are: "
                f"{', '.join(f.name for f in dataclasses.fields(SamplingParams))}"
            )
    said = _settle_draw(said)
    chosen: dict[str, tuple[int, Any]] = {}  # field -> (level, value)
    for index, (_, values) in reversed(list(enumerate(said))):
        for name, value in values.items():
            if name == "logit_bias" and name in chosen and isinstance(value, Mapping):
                value = {**chosen[name][1], **value}
            chosen[name] = (index, value)
    lengths = {name: chosen.pop(name) for name in _LENGTHS if name in chosen}
    for index, (origin, _) in enumerate(said):
        own = {name: value for name, (level, value) in chosen.items() if level == index}
        _checked(own, origin if index else "")
    new, least = _lengths(said, lengths, prompt_tokens, room, new_tokens)
    values = {name: value for name, (_, value) in chosen.items()}
    origins = {name: said[level][0] for name, (level, _) in chosen.items()}
    for name, sources in (("max_new_tokens", _LENGTHS[:2]), ("min_new_tokens", _LENGTHS[2:])):
        for source in sources:
            if source in lengths:
                origins[name] = said[lengths[source][0]][0]
                break
    return ResolvedSampling(SamplingParams(**values, max_new_tokens=new, min_new_tokens=least), origins)


def _settle_draw(said: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Drop the do_sample, or the temperatures, that a higher level speaks against; see resolve_sampling's table."""
    switch = _level_of(said, "do_sample")
    if switch is None:
        return said
    higher = [values for _, values in said[:switch]]
    draw = said[switch][1]["do_sample"]
    asks = any(values.get(name, neutral) != neutral for values in higher for name, neutral in _NARROWS.items())
    named = any("temperature" in values for values in higher)
    if draw is False and (named or asks):
        return [_without(level, "do_sample") for level in said]
    if draw is True:
        above = next((values["temperature"] for values in higher if "temperature" in values), None)
        if above is not None:
            return [_without(level, "do_sample") for level in said] if above == 0 else said
        return [
            _without(level, "temperature") if index > switch and level[1].get("temperature") == 0 else level
            for index, level in enumerate(said)
        ]
    return said


def _level_of(said: Iterable[tuple[str, Mapping[str, Any]]], name: str) -> int | None:
    return next((index for index, (_, values) in enumerate(said) if name in values), None)


def _without(level: tuple[str, dict[str, Any]], name: str) -> tuple[str, dict[str, Any]]:
    return level[0], {key: value for key, value in level[1].items() if key != name}


def _checked(values: dict[str, Any], origin: str) -> None:
    """Raise ParameterError, beginning with the level's name, where its own values cannot be."""
    from gemcut.engine.sampling import SamplingParams

    try:
        SamplingParams(**values)
    except ParameterError as error:
        if not origin:
            raise
        raise ParameterError(f"{origin}: {error}; a value of your own takes its place") from None


def _lengths(
    said: list[tuple[str, dict[str, Any]]], lengths: dict[str, tuple[int, Any]], prompt: int, room: int, default: int
) -> tuple[int, int]:
    """(most, least) new tokens."""
    numbers = {
        name: (level, _count(name, value, said[level][0] if level else ""))
        for name, (level, value) in lengths.items()
        if not (name.endswith("length") and name.replace("length", "new_tokens") in lengths)
    }
    level, least = numbers.get("min_new_tokens", (len(said), 0))
    if "min_length" in numbers:
        level, least = numbers["min_length"][0], max(0, numbers["min_length"][1] - prompt)
    asked_least = least if level == 0 else 0
    room = max(1, room)
    if "max_new_tokens" in numbers:
        at, most = numbers["max_new_tokens"]
    elif "max_length" in numbers:
        at, longest = numbers["max_length"]
        if longest <= prompt:
            whose = "" if at == 0 else f"{said[at][0]}: "
            raise ParameterError(
                f"{whose}max_length is {longest} but the prompt alone has {prompt} tokens; raise it or use "
                "max_new_tokens"
            )
        most = longest - prompt
    else:
        at, most = len(said), default
    if at > 0:  # a default
        most = max(min(most, room), asked_least)
    return most, asked_least or min(least, most)


def _count(name: str, value: object, origin: str) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    low = 1 if name == "max_length" else 0
    if number < low:
        where = f"{origin}: " if origin else ""
        raise ParameterError(f"{where}{name} is {value!r}; expected a whole number of at least {low}")
    return number


def _word(value: object) -> str:
    if isinstance(value, Mapping):
        return f"of {len(value)} tokens"
    return f"{value:g}" if isinstance(value, float) else str(value)
