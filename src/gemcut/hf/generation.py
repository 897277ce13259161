"""From transformers' generation options to requests of the engine, and from their tokens to a padded tensor."""

from __future__ import annotations

import dataclasses
import operator
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemcut.config import token_ids
from gemcut.engine import SamplingParams, TokenEvent
from gemcut.engine.results import start_together
from gemcut.errors import ParameterError
from gemcut.gemma import Gemma
from gemcut.hf.common import warn_once
from gemcut.hf.inputs import Rows
from gemcut.sampling_defaults import SUPPRESSED as SUPPRESSED
from gemcut.sampling_defaults import Level, resolve_sampling

#: New tokens where nothing names a length, as far as the context has room for them (transformers: 20).
DEFAULT_NEW_TOKENS = 1024
#: transformers' top_k where sampling is on and none is named.
DEFAULT_TOP_K = 50

# Options that are fields of SamplingParams, or lengths that count the prompt.
_LENGTHS = ("max_new_tokens", "max_length", "min_new_tokens", "min_length")
_FIELDS = ("top_k", "top_p", "min_p", "repetition_penalty", *_LENGTHS)
# Sampling options and the values at which each does nothing.
_NEUTRAL: dict[str, tuple[float, ...]] = {"temperature": (0, 1), "top_k": (0, 1, 50), "top_p": (1,), "min_p": (0,)}


@dataclass(frozen=True)
class Job:
    """A batch, ready to run: one request for each row of the result.

    Attributes:
        inputs: the rows, each repeated ``num_return_sequences`` times.
        params: how each samples.
        stop_ids: token ids that end a row.
        pad_id: fills rows that end before the longest.
        max_time: seconds after which no more tokens are computed.
    """

    inputs: Rows
    params: list[SamplingParams]
    stop_ids: frozenset[int]
    pad_id: int
    max_time: float | None


def make_job(gemma: Gemma, inputs: Rows, options: Mapping[str, Any], asked: frozenset[str], seed: int | None) -> Job:
    """Turn merged options into a Job.

    Args:
        gemma: the model that will run it.
        inputs: the prompts.
        options: honoured options, those of the model's own config included.
        asked: the names the caller set; the others do not cause warnings.
        seed: of all draws; None takes them from torch's global generator.

    Raises:
        ParameterError: an option is out of range or contradicts another.
    """
    do_sample = options.get("do_sample", False)
    copies = _whole(options, "num_return_sequences", 1)
    if copies > 1 and do_sample is not True:
        raise ParameterError(
            f"num_return_sequences={copies} needs do_sample=True: greedy sequences would all be the same"
        )
    base = _params(gemma, inputs, options, asked, seed)
    if not base.do_sample:
        _warn_without_effect(options, asked)
    repeated = _repeat(inputs, copies)
    stops = _token_ids(gemma, options, "eos_token_id")
    pads = _token_ids(gemma, options, "pad_token_id") or [gemma.pad_id]
    max_time = options.get("max_time")
    if max_time is not None and not (isinstance(max_time, (int, float)) and max_time > 0):
        raise ParameterError(f"max_time is {max_time!r}; expected a number of seconds above 0")
    return Job(repeated, _seeded(base, len(repeated.rows)), frozenset(stops), pads[0], max_time)


def run(gemma: Gemma, job: Job, streamer: Any) -> list[list[int]]:
    """Run a job to its end and return each row's new tokens. ``streamer`` gets one token of every row at a time."""
    rows = job.inputs.rows
    new: list[list[int]] = [[] for _ in rows]
    streams = []
    if streamer is not None:
        streamer.put(job.inputs.ids.cpu())
    deadline = None if job.max_time is None else time.monotonic() + job.max_time
    try:
        for ids, params in zip(rows, job.params, strict=True):
            streams.append(gemma.prepare_stream(ids, params, stop_ids=job.stop_ids))
        start_together(streams)
        running: dict[int, Iterator[TokenEvent]] = {i: stream.events() for i, stream in enumerate(streams)}
        while running:
            column = [job.pad_id] * len(rows)
            for i, events in list(running.items()):
                event = next(events, None)
                if event is not None and event.token_id is not None:
                    new[i].append(event.token_id)
                    column[i] = event.token_id
                if event is None or event.finish_reason is not None:
                    del running[i]
            if streamer is not None:
                streamer.put(torch.tensor(column))
            if deadline is not None and time.monotonic() > deadline:
                for stream in streams:
                    stream.cancel()
                    _ = stream.result  # takes the last event, so that nothing of the request stays behind
                break
    finally:  # after an error or Ctrl-C nothing keeps running
        for stream in streams:
            stream.cancel()
    if streamer is not None:
        streamer.end()
    return new


def assemble(ids: Tensor, new: list[list[int]], pad_id: int) -> Tensor:
    """int64 [B, T + longest]: prompts as they came, then the new tokens, then padding; on the prompts' device."""
    width = ids.shape[1]
    out = torch.full((len(new), width + max(map(len, new), default=0)), pad_id, dtype=torch.int64)
    out[:, :width] = ids
    for row, tokens in zip(out, new, strict=True):
        row[width : width + len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    return out.to(ids.device)


def _params(
    gemma: Gemma, inputs: Rows, options: Mapping[str, Any], asked: frozenset[str], seed: int | None
) -> SamplingParams:
    """How each row samples, before it gets a seed of its own.

    As in transformers: greedy unless ``do_sample``, whatever the temperature; max_new_tokens wins over max_length,
    also where only the latter was asked for; lengths count the padded prompt.
    """
    width = inputs.ids.shape[1]
    if {"max_new_tokens", "max_length"} <= options.keys() and "max_length" in asked:
        where = "are both given" if "max_new_tokens" in asked else "(of the model's generation_config) are both set"
        warn_once(f"max_new_tokens and max_length {where}; max_new_tokens counts")
    if "max_new_tokens" in options:
        _whole(options, "max_new_tokens", 1, low=1)
    # Which of the two levels names the switch and the temperature must not matter here: both are put into the first.
    settled = {"do_sample": options.get("do_sample", False), "temperature": options.get("temperature", 1.0)}
    fields = {name: options[name] for name in _FIELDS if name in options}
    given = {name: value for name, value in fields.items() if name in asked}
    given["logit_bias"] = dict.fromkeys(_token_ids(gemma, options, "suppress_tokens"), SUPPRESSED)
    given |= {**settled, "stop": options.get("stop_strings"), "seed": seed}
    levels: list[Level] = [
        ("generate", given),
        ("the model's generation_config", {name: value for name, value in fields.items() if name not in asked}),
        ("transformers", {"top_k": DEFAULT_TOP_K}),
    ]
    room = gemma.engine.max_context - max(map(len, inputs.rows))
    return resolve_sampling(levels, prompt_tokens=width, room=room, new_tokens=DEFAULT_NEW_TOKENS).params


def _whole(options: Mapping[str, Any], name: str, default: int, *, low: int | None = None) -> int:
    value = options.get(name, default)
    low = default if low is None else low
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < low:
        raise ParameterError(f"{name} is {value!r}; expected a whole number of at least {low}")
    return number


def _token_ids(gemma: Gemma, options: Mapping[str, Any], name: str) -> list[int]:
    """The ids an option names; none where it is not set."""
    value = options.get(name)
    if value is None:
        return []
    if hasattr(value, "tolist"):
        value = value.tolist()
    ids = token_ids(value, name) if value != [] else ()
    size = gemma.config.vocab_size
    if any(i >= size for i in ids):
        raise ParameterError(f"{name} is {value!r}; this model's ids go from 0 to {size - 1}")
    return list(ids)


def _warn_without_effect(options: Mapping[str, Any], asked: frozenset[str]) -> None:
    idle = [n for n, neutral in _NEUTRAL.items() if n in asked and n in options and options[n] not in neutral]
    if idle:
        verb = "has" if len(idle) == 1 else "have"
        warn_once(f"{', '.join(idle)} {verb} no effect without do_sample=True; the likeliest token is taken each time")


def _repeat(inputs: Rows, copies: int) -> Rows:
    if copies == 1:
        return inputs
    return Rows(
        inputs.ids.repeat_interleave(copies, dim=0),
        [span for span in inputs.spans for _ in range(copies)],
        [row for row in inputs.rows for _ in range(copies)],
    )


def _seeded(base: SamplingParams, count: int) -> list[SamplingParams]:
    """One seed a row, drawn from torch's generator, so that ``torch.manual_seed`` makes a call repeatable."""
    if base.greedy:
        return [base] * count
    generator = None if base.seed is None else torch.Generator().manual_seed(base.seed)
    seeds = torch.randint(2**63 - 1, (count,), generator=generator).tolist()
    return [dataclasses.replace(base, seed=seed) for seed in seeds]
