"""Grammars over the real vocabulary: a thousand answers to forty schemas from a random network, all of them valid."""

from __future__ import annotations

import json
from collections import Counter

import jsonschema_rs
import pytest

from engine.driver import CPU, assert_nothing_held, small_model
from engine.schemas import SCHEMAS, TEXT, WHOLE, record
from gemcut.engine import EngineConfig, Grammar, SamplingParams
from gemcut.gemma import Gemma
from gemcut.text import Tokenizer
from support import tokenizer_dir

pytestmark = pytest.mark.slow

PROMPT = [2, 300, 301]
#: Of Gemma 2's 256,000 tokens the first ones: bytes, <h1> and their like, and the commonest pieces of words.
FIRST = 4000


def new_gemma(vocabulary: int) -> Gemma:
    model = small_model(vocab_size=vocabulary, context=512)
    tokenizer = Tokenizer.from_folder(tokenizer_dir())
    return Gemma(model, tokenizer, CPU, engine=EngineConfig(max_batch_size=50, sequences=50))


def test_a_thousand_answers_to_forty_schemas() -> None:
    gemma = new_gemma(FIRST)
    wrong, reasons = [], Counter[str]()
    for name, schema in SCHEMAS.items():
        each = [
            SamplingParams(grammar=Grammar.json_schema(schema), max_new_tokens=170, seed=seed) for seed in range(25)
        ]
        for result in gemma.complete([PROMPT] * 25, each):
            reasons[result.finish_reason] += 1
            if result.error or not jsonschema_rs.is_valid(schema, json.loads(result.text)):
                wrong.append((name, result.text, result.error))
    assert not wrong
    assert sum(reasons.values()) == 1000
    assert min(reasons["stop"], reasons["length"]) > 100  # both ways to an end
    assert_nothing_held(gemma.engine)


def test_the_whole_vocabulary_greedy_and_drawn() -> None:
    """256,000 tokens; beside a free answer that goes on as it does alone."""
    gemma = new_gemma(256_000)
    schema = record(name=TEXT, age=WHOLE)
    grammar = Grammar.json_schema(schema)
    free = SamplingParams(max_new_tokens=20, seed=5)
    (alone,) = gemma.complete([PROMPT], free)
    bound = [
        SamplingParams(grammar=grammar, max_new_tokens=40, temperature=0),
        SamplingParams(grammar=grammar, max_new_tokens=40, seed=1, top_p=0.9),
    ]
    together, *answers = gemma.complete([PROMPT] * 3, [free, *bound])
    assert together.token_ids == alone.token_ids
    for answer in answers:
        assert jsonschema_rs.is_valid(schema, json.loads(answer.text))
        special = gemma.tokenizer.special_ids & set(answer.token_ids)
        assert special <= gemma.stop_ids
