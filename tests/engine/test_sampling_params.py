"""SamplingParams: each bad value is refused by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from gemcut.engine import SamplingParams
from gemcut.errors import GemcutError, ParameterError

BAD: list[tuple[str, Any]] = [
    ("watermark", "key"),
    ("temperature", -1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "1"),
    ("temperature", None),
    ("temperature", True),
    ("temperature", 101),
    ("top_p", 2),
    ("top_p", 0),
    ("top_p", -0.1),
    ("top_p", math.nan),
    ("top_k", -1),
    ("top_k", 1.5),
    ("top_k", True),
    ("top_k", "5"),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("min_p", math.nan),
    ("max_new_tokens", -1),
    ("max_new_tokens", 2.0),
    ("max_new_tokens", False),
    ("max_new_tokens", None),
    ("min_new_tokens", -1),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1),
    ("presence_penalty", math.nan),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", [1]),
    ("seed", 1.0),
    ("seed", True),
    ("seed", 2**64),
    ("seed", -(2**63) - 1),
    ("logprobs", -1),
    ("logprobs", 101),
    ("logprobs", True),
    ("do_sample", 1),
    ("do_sample", "yes"),
    ("ignore_eos", 1),
    ("ignore_eos", "no"),
    ("ignore_eos", None),
    ("stop", ""),
    ("stop", ("a", "")),
    ("stop", 5),
    ("stop", [b"x"]),
    ("stop", ["x"] * 65),
    ("grammar", 5),
    ("grammar", "{}"),
    ("logit_bias", [1]),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {1.5: 1}),
    ("logit_bias", {1: "x"}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: math.inf}),
    ("logit_bias", {1: 1e300}),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}={value!r}"[:40] for name, value in BAD])
def test_bad_value_names_the_parameter(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=name) as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, GemcutError)
    assert isinstance(caught.value, ValueError)


def test_every_field_is_checked() -> None:
    """Whoever adds a field is asked for a value that is refused."""
    assert {field.name for field in dataclasses.fields(SamplingParams)} == {name for name, _ in BAD}


def test_unknown_parameter_is_named_with_those_known() -> None:
    with pytest.raises(ParameterError, match=r"unknown sampling parameter 'temprature'; known are: .*temperature"):
        SamplingParams.from_kwargs({"temprature": 1})


def test_contradictions() -> None:
    with pytest.raises(ParameterError, match="min_new_tokens is 5, more than max_new_tokens, which is 4"):
        SamplingParams(min_new_tokens=5, max_new_tokens=4)
    with pytest.raises(ParameterError, match="do_sample=True contradicts temperature=0"):
        SamplingParams(do_sample=True, temperature=0)


def test_edges_are_allowed() -> None:
    SamplingParams(
        temperature=100,
        top_p=1,
        min_p=1,
        top_k=0,
        max_new_tokens=0,
        presence_penalty=-2,
        frequency_penalty=2,
        seed=-(2**63),
        logprobs=0,
        logit_bias={0: -1e9},
        repetition_penalty=0.01,
    )
    assert SamplingParams(stop="one").stop == ("one",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]
    assert SamplingParams(logit_bias={"12": 3}).logit_bias == {12: 3.0}  # type: ignore[dict-item]
    assert SamplingParams(logit_bias=None).logit_bias == {}  # type: ignore[arg-type]


def test_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(do_sample=False).greedy
    assert SamplingParams(top_k=1).greedy
    assert not SamplingParams().greedy
    assert not SamplingParams(do_sample=True, top_k=2).greedy


def test_frozen_and_copied() -> None:
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[3] = 99.0
    assert params.logit_bias == {3: 1.0}
    with pytest.raises(AttributeError):
        params.top_k = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "least"), [("temperature", "0 or a number from 1e-30"), ("repetition_penalty", "1e-30")]
)
@pytest.mark.parametrize("value", [1e-31, 1e-38, 1e-46, 5e-324])
def test_what_fp32_cannot_divide_by_is_refused_by_name(name: str, least: str, value: float) -> None:
    with pytest.raises(ParameterError, match=f"{name} is {value!r}; expected .*{least}"):
        SamplingParams(**{name: value})
