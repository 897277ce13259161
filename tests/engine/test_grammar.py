"""Answers under a grammar: valid JSON whatever a random network wants, alone and in company, and what is refused."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from llguidance import LLMatcher

from engine.chi_square import chi_square, critical
from engine.driver import assert_nothing_held
from engine.letters import END_OF_TURN, EOS, PIECES, Letters, new_gemma
from engine.schemas import NUMBER, POINT, SCHEMAS, TEXT, TRUTH, WHOLE, record, several
from gemcut.engine import Edit, Grammar, SamplingParams, constrain, masks, numbers
from gemcut.engine.cache import bytes_per_block
from gemcut.engine.masks import GrammarEdit
from gemcut.errors import GemcutError, ParameterError, RequestError
from gemcut.gemma import Gemma

PROMPT = [0, 100, 101]
PERSON = record(name=TEXT, age=WHOLE, tags=several(TEXT))
QUICK = ["any object", "person", "mixed choice", "records", "phone", "expression", "map", "tree"]


@pytest.fixture(scope="module")
def gemma() -> Iterator[Gemma]:
    found = new_gemma()
    yield found
    assert_nothing_held(found.engine)


def under(grammar: Any, **more: Any) -> SamplingParams:
    return SamplingParams(**{"grammar": grammar, "max_new_tokens": 200, "seed": 1, **more})


def valid(schema: dict[str, Any], text: str) -> bool:
    return bool(jsonschema_rs.is_valid(schema, json.loads(text)))


@pytest.mark.parametrize("name", QUICK)
def test_every_answer_is_valid(gemma: Gemma, name: str) -> None:
    """A random network closes no string by itself, so most answers meet their limit."""
    schema = SCHEMAS[name]
    each = [under(schema, seed=seed, max_new_tokens=limit) for seed in range(4) for limit in (90, 200)]
    for result in gemma.complete([PROMPT] * len(each), each):
        assert valid(schema, result.text), result
        # It ends with a stop token, or where its last token just fitted.
        whole = result.token_ids[-1] in (EOS, END_OF_TURN)
        assert whole or len(result.token_ids) in (90, 200)
        assert result.finish_reason in ("stop", "length")
        assert not set(result.token_ids[:-1]) & Letters.special_ids


def test_forty_schemas_are_compiled_and_closed(gemma: Gemma) -> None:
    assert len(SCHEMAS) == 40
    for name, schema in SCHEMAS.items():
        compiled = gemma.grammars.compile(Grammar.json_schema(schema))
        assert compiled.shortest is not None, name


def test_an_answer_that_meets_its_limit_is_closed_and_says_so(gemma: Gemma) -> None:
    (cut,) = gemma.complete([PROMPT], under(record(text=TEXT), max_new_tokens=40))
    assert cut.finish_reason == "length"
    assert valid(record(text=TEXT), cut.text)
    assert len(json.loads(cut.text)["text"].encode()) > 8  # it is not the shortest answer at once
    (whole,) = gemma.complete([PROMPT], under({"enum": ["yes", "no"]}))
    assert (whole.finish_reason, json.loads(whole.text) in ("yes", "no")) == ("stop", True)


def test_white_space_does_not_run_away(gemma: Gemma) -> None:
    """The model is told to like spaces and line breaks best."""
    liking = dict.fromkeys((4 + 0x20, 4 + 0x0A, 260 + PIECES.index("  "), 260 + PIECES.index("\n\n\n\n")), 50.0)
    (result,) = gemma.complete([PROMPT], under(record(a=WHOLE, b=TRUTH), logit_bias=liking, temperature=0))
    assert max(map(len, re.findall(r"\s+", result.text))) == 8
    assert valid(record(a=WHOLE, b=TRUTH), result.text)


def test_neighbours_do_not_feel_it(gemma: Gemma) -> None:
    """Three free answers beside two with grammars are what they are without them, and the other way round."""
    free = [SamplingParams(seed=seed, max_new_tokens=30, top_k=50) for seed in range(3)]
    bound = [under(PERSON, logprobs=2), under(several(POINT), top_p=0.9, repetition_penalty=1.2, stop=("zz",))]
    alone = [gemma.complete([PROMPT], own)[0] for own in (*free, *bound)]
    together = gemma.complete([PROMPT] * 5, [*free, *bound])
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert together[3].logprobs is not None
    assert len(together[3].logprobs) == len(together[3].token_ids)


def test_log_probabilities_are_the_models_own(gemma: Gemma) -> None:
    (result,) = gemma.complete([PROMPT], under(PERSON, logprobs=0, max_new_tokens=60))
    scores = gemma.score([[*PROMPT, *result.token_ids]], start=len(PROMPT))[0]
    assert result.logprobs is not None
    assert [each.logprob for each in result.logprobs] == pytest.approx(scores, abs=1e-4)


def test_draws_follow_the_distribution_among_what_is_allowed(gemma: Gemma) -> None:
    """600 first tokens: the network's own probabilities, at the temperature, of the tokens that the regex allows."""
    texts = ["a", "b", "h", "t", "he", "the", "1", "12", "9"]  # all pieces with which an answer may begin
    tokens = [260 + PIECES.index(text) if text in PIECES else 4 + ord(text) for text in texts]
    scores = np.array([gemma.score([[*PROMPT, token]], start=len(PROMPT))[0][0] for token in tokens])
    weights = np.exp(scores / 1.7)
    expected = np.zeros(Letters.vocab_size)
    expected[tokens] = weights / weights.sum()
    grammar, count = Grammar.regex("a|b|he|the|12|9"), 600
    each = [under(grammar, seed=seed, temperature=1.7) for seed in range(count)]
    drawn = [result.token_ids[0] for result in gemma.complete([PROMPT] * count, each)]
    counts = np.bincount(drawn, minlength=Letters.vocab_size).astype(float)
    statistic, df = chi_square(counts, expected * count)
    assert df == len(texts) - 1
    assert statistic < critical(df)


def test_seeds_and_several_answers(gemma: Gemma) -> None:
    texts = gemma.generate("x", n=3, seed=5, grammar=PERSON, max_new_tokens=80)
    assert len(set(texts)) == 3
    assert all(valid(PERSON, text) for text in texts)
    assert gemma.generate("x", n=3, seed=5, grammar=PERSON, max_new_tokens=80) == texts


def test_stop_texts_end_it_first(gemma: Gemma) -> None:
    (result,) = gemma.complete([PROMPT], under(record(name=TEXT), stop=('"name',)))
    assert (result.finish_reason, result.stop_reason) == ("stop", '"name')
    assert result.text.strip() == "{"


def test_a_regex_and_a_lark_grammar(gemma: Gemma) -> None:
    for seed in range(5):
        text = gemma.generate("x", grammar=Grammar.regex(r"(yes|no), [a-z]{3,9}\."), seed=seed)
        assert re.fullmatch(r"(yes|no), [a-z]{3,9}\.", text)
    lark = 'start: "SELECT " column (", " column)* " FROM t"\ncolumn: /[a-z]{1,5}/'
    for seed in range(5):
        text = gemma.generate("x", grammar=Grammar.lark(lark), seed=seed, max_new_tokens=60)
        assert re.fullmatch(r"SELECT [a-z]{1,5}(, [a-z]{1,5})* FROM t", text)


def test_a_stop_token_of_the_callers_own(gemma: Gemma) -> None:
    stream = gemma.stream_ids(PROMPT, under({"enum": ["yes"]}), stop_ids=frozenset({300}))
    assert stream.result.token_ids[-1] == 300
    with pytest.raises(ParameterError, match="this request has none"):
        gemma.stream_ids(PROMPT, under({"enum": ["yes"]}), stop_ids=frozenset())


# ---- how it is computed ------------------------------------------------------------------------------------------


def bits(edit: Edit) -> set[int]:
    assert edit.allowed is not None
    return set(np.flatnonzero(np.unpackbits(edit.allowed.numpy().view(np.uint8), bitorder="little")).tolist())


def fresh_bits(gemma: Gemma, schema: dict[str, Any], tokens: list[int]) -> set[int]:
    """The mask of a matcher that has done nothing else."""
    options: Any = {"whitespace_pattern": constrain.WHITESPACE}
    setup = gemma.grammars._begin_setup().result()
    matcher = LLMatcher(setup.tokenizer, LLMatcher.grammar_from_json_schema(schema, overrides=options))
    assert matcher.consume_tokens(tokens)
    row = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)[: 320 // 8]
    found = set(np.flatnonzero(np.unpackbits(row, bitorder="little")).tolist())
    return found | {EOS, END_OF_TURN} if setup.end_id in found else found


def test_an_edit_answers_the_same_for_the_same_place(gemma: Gemma) -> None:
    """Asked again, told in pieces, gone back to, told without the call and called without being told."""
    answer = Letters().encode('{"name":"é日","age":12,"tags":[]}', add_bos=False)
    edit = gemma.grammars.edit(Grammar.json_schema(PERSON), frozenset({EOS, END_OF_TURN}), 10_000)
    order = [0, 0, 3, 4, 4, 5, 2, 2, 9, 10, len(answer), len(answer), 7, 8, len(answer)]
    for number, place in enumerate(order):
        tokens = [*PROMPT, *answer[:place]]
        if number % 2:
            edit.begin(tokens, len(PROMPT))
        assert bits(edit(tokens, len(PROMPT))) == fresh_bits(gemma, PERSON, answer[:place])


def test_one_who_was_interrupted_after_telling_tells_again(gemma: Gemma) -> None:
    answer = Letters().encode('{"name":"abc"', add_bos=False)
    edit = gemma.grammars.edit(Grammar.json_schema(PERSON), frozenset({EOS}), 10_000)
    before = edit._job_for([*PROMPT, *answer[:5]], len(PROMPT))
    edit.begin([*PROMPT, *answer[:6]], len(PROMPT))
    edit._job = before  # Ctrl-C came before the new job was noted
    for place in (6, 8):
        assert bits(edit([*PROMPT, *answer[:place]], len(PROMPT))) - {EOS, END_OF_TURN} == fresh_bits(
            gemma, PERSON, answer[:place]
        )


def test_preemption_changes_nothing(gemma: Gemma) -> None:
    """A cache for one and a half answers: they put each other out, and start again with the tokens that they have."""
    params = [under(PERSON, seed=seed, max_new_tokens=60) for seed in range(4)]
    expected = [gemma.complete([PROMPT], own)[0].text for own in params]
    size = sum(bytes_per_block(gemma.config, gemma.dtype, 4))
    small = new_gemma(block_size=4, max_batch_tokens=8, kv_memory=24 * size)
    streams = [small.prepare_stream(PROMPT, own) for own in params]
    for stream in streams:
        stream.start()
    assert [stream.result.text for stream in streams] == expected
    assert sum(stream._sequence.preemptions for stream in streams) > 0


def test_masks_are_computed_beside_the_engine(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread of their own, begun as soon as the token is there; the engine's thread asks behind the network."""
    where: set[str] = set()
    order: list[str] = []
    compute, begin, call = masks._compute, GrammarEdit.begin, GrammarEdit.__call__

    def spying_compute(*args: Any) -> None:
        where.add(threading.current_thread().name)
        compute(*args)

    def spying_begin(self: GrammarEdit, tokens: Any, length: int) -> None:
        order.append("begin")
        begin(self, tokens, length)

    def spying_call(self: GrammarEdit, tokens: Any, length: int) -> Edit:
        order.append("call")
        return call(self, tokens, length)

    inner = gemma.engine.runner.run

    def run(*args: Any) -> Any:
        order.append("network")
        return inner(*args)

    monkeypatch.setattr(masks, "_compute", spying_compute)
    monkeypatch.setattr(GrammarEdit, "begin", spying_begin)
    monkeypatch.setattr(GrammarEdit, "__call__", spying_call)
    monkeypatch.setattr(gemma.engine.runner, "run", run)
    gemma.complete([PROMPT], under({"enum": ["yes", "no"]}))
    assert where == {"gemcut-masks"}
    assert order[:5] == ["network", "call", "begin", "network", "call"]


def test_a_grammar_that_fails_amid_its_answer_ends_it_alone(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = GrammarEdit.advance

    def failing(self: GrammarEdit, job: Any) -> None:
        if self.max_new_tokens == 77 and job.place == 5:
            raise GemcutError("the grammar cannot go on: too many states")
        advance(self, job)

    monkeypatch.setattr(GrammarEdit, "advance", failing)
    bad, good = gemma.complete([PROMPT] * 2, [under(PERSON, max_new_tokens=77), under(PERSON)])
    assert (bad.finish_reason, bad.error) == ("error", "the grammar cannot go on: too many states")
    assert valid(PERSON, good.text)
    with pytest.raises(RequestError):
        bad.checked()


def test_compiled_grammars_are_kept_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrain, "MOST_KEPT", 3)
    grammars = new_gemma().grammars
    made = [Grammar.json_schema({"enum": [number]}) for number in range(5)]
    kept = [grammars.compile(each) for each in made]
    assert list(grammars._kept) == made[2:]
    assert grammars.compile(made[3]) is kept[3]
    assert grammars.compile(made[0]) is not kept[0]
    monkeypatch.setattr(constrain, "MOST_BYTES", 1)
    grammars.compile(made[1])
    assert list(grammars._kept) == [made[1]]


def test_set_up_and_compiling_are_a_workers(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[str] = []
    for name in ("_set_up", "_compile"):
        inner = getattr(constrain, name)

        def spying(*args: Any, inner: Any = inner) -> Any:
            where.append(threading.current_thread().name)
            return inner(*args)

        monkeypatch.setattr(constrain, name, spying)
    other = new_gemma()
    other.generate("x", grammar={"enum": [1]})
    other.generate("x", grammar={"enum": [1]})
    assert len(where) == 2
    assert all(name.startswith("gemcut-grammar") for name in where)


def test_a_grammar_that_is_compiled_at_once_holds_nobody_up(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the worker is through before the caller goes on: so it is each time here."""
    grammars = gemma.grammars
    grammars.prepare()
    submit = grammars._workers.submit

    def slowly(*args: Any) -> Any:
        future = submit(*args)
        wait([future], 0.5)
        return future

    monkeypatch.setattr(grammars._workers, "submit", slowly)
    found: list[Any] = []
    for number in (70, 71):
        grammar = Grammar.json_schema({"enum": [number]})
        thread = threading.Thread(target=lambda grammar=grammar: found.append(grammars.compile(grammar)), daemon=True)
        thread.start()
        thread.join(10)
    with pytest.raises(ParameterError):
        grammars.compile(Grammar.regex("("))
    assert len(found) == 2
    assert grammars._under_way == {}


# ---- what is refused ---------------------------------------------------------------------------------------------

NESTED: dict[str, Any] = {}
for _ in range(40):
    NESTED = {"type": "array", "items": NESTED}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {}, "type": "string"}, r'Unimplemented keys: \["not"\]'),
        ({"type": "string", "format": "zzz"}, "Unknown format: zzz"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "https://example.org/schema"}, "does not fetch resources"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum .5. is greater than maximum .3."),
        ({"type": "strnig"}, "strnig"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(a+)+$" * 50}, "lookarounds not supported"),
        ({"not": 1, "type": "string", "x-guidance": {"lenient": True}}, "Unimplemented keys"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "JSON schema cannot be used"),
        (NESTED, "nested deeper than 32"),
        ({"enum": ["x" * 70_000]}, "at most 65,536"),
        ({"enum": [float("nan")]}, "no JSON"),
        ({"enum": [{1, 2}]}, "no JSON"),
        ({"const": 2**53 + 1}, r"9007199254740993 is beyond 2\*\*53"),
        ("[1]", "of type str; expected a gemcut.Grammar, or a JSON schema"),
        (7, "of type int; expected a gemcut.Grammar"),
    ],
)
def test_a_bad_schema_is_refused_in_one_line(gemma: Gemma, schema: Any, words: str) -> None:
    with pytest.raises(ParameterError, match=words) as caught:
        gemma.generate("x", grammar=schema)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["[1]", "{", "nul", "[" * 60_000, '{"a": NaN}', '"text"'])
def test_bad_schema_texts(text: str) -> None:
    with pytest.raises(ParameterError, match="schema"):
        Grammar.json_schema(text)


def test_what_contradicts_a_grammar(gemma: Gemma) -> None:
    for name, value in (("ignore_eos", True), ("min_new_tokens", 3)):
        with pytest.raises(ParameterError, match=f"{name} contradicts grammar"):
            SamplingParams(grammar=Grammar.json_object(), **{name: value})
    with pytest.raises(ParameterError, match="a grammar or an edit of its own"):
        gemma.stream_ids(PROMPT, under({}), edit=lambda tokens, length: None)
    with pytest.raises(ParameterError, match="kind is 'ebnf'"):
        Grammar("ebnf", "x")  # type: ignore[arg-type]
    for bad in (Grammar.regex("("), Grammar.lark("start: other")):
        with pytest.raises(ParameterError, match=f"the {bad.kind} grammar cannot be used"):
            gemma.grammars.compile(bad)
    for make in (Grammar.regex, Grammar.lark):
        with pytest.raises(ParameterError, match="is empty"):
            make("")


@pytest.mark.parametrize("limit", ["TIME_LIMIT", "WAIT_LIMIT"])
def test_an_explosive_schema_is_refused_within_its_time(
    gemma: Gemma, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Where its worker computes for too long, and where nothing is heard of it."""
    inner = constrain._compile
    release = threading.Event()

    def slow(*args: Any) -> Any:
        if limit == "WAIT_LIMIT":
            release.wait(10)
        while not release.is_set():
            pass
        return inner(*args)

    monkeypatch.setattr(constrain, "_compile", slow)
    monkeypatch.setattr(constrain, limit, 0.05)
    try:
        with pytest.raises(ParameterError, match=r"longer than .* s to compile"):
            gemma.generate("x", grammar={"enum": [limit]})
    finally:
        release.set()


def test_a_busy_machine_refuses_no_grammar(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds in which the worker did not get a processor do not count."""
    inner = constrain._compile

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        return inner(*args)

    monkeypatch.setattr(constrain, "_compile", slow)
    monkeypatch.setattr(constrain, "TIME_LIMIT", 0.2)
    assert gemma.grammars.compile(Grammar.regex("(busy|idle)")).shortest


def test_without_llguidance_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrain.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GemcutError, match=r"pip install 'gemcut\[grammar\]'"):
        new_gemma().generate("x", grammar={})


def test_a_pydantic_model_is_a_schema(gemma: Gemma) -> None:
    pydantic = pytest.importorskip("pydantic", reason="needs pydantic, which comes with openai")

    class Answer(pydantic.BaseModel):  # type: ignore[misc,name-defined]
        name: str
        points: list[int]

    text = gemma.generate("x", grammar=Answer, seed=2, max_new_tokens=80)
    assert Answer.model_validate_json(text)


def test_chat_takes_it_too(gemma: Gemma) -> None:
    with pytest.raises(ParameterError, match="unknown sampling parameter 'gramar'"):
        gemma.generate("x", gramar={})
    stream = gemma.stream("x", grammar=PERSON, seed=3, max_new_tokens=50)
    assert valid(PERSON, "".join(stream))
    used = gemma.resolve_sampling(3, {"grammar": PERSON})
    assert json.loads(json.dumps(used.report()))["grammar"]["value"].startswith("json_schema of ")


def test_numbers_end_and_are_finite(gemma: Gemma) -> None:
    """The model is told to like digits and exponents best; what a schema demands is longer where it must be."""
    liking = dict.fromkeys([4 + byte for byte in b"0123456789eE+-"] + [260 + PIECES.index("12")], 50.0)
    for seed in range(6):
        params = under(record(a=NUMBER, b=NUMBER, c=WHOLE), logit_bias=liking, seed=seed)
        (result,) = gemma.complete([PROMPT], params)
        for number in re.findall(r":\s*([^,}\s]+)", result.text):
            assert len(number) <= numbers.MOST_CHARACTERS + 1  # "12" is one token
            assert abs(float(number)) < 1e125
        assert result.finish_reason == "stop"
    scan, digits = numbers.NumberScan(), np.zeros(10, dtype=np.int32)
    scan.feed(b'{"a\\"1": ' + b"1" * 30)
    digits[1] = 1 << (4 + 0x31 - 32)
    numbers.NumberLimits(Letters().all_token_bytes()).narrow(digits, scan)
    assert digits.any()
    assert "1" * 60 in gemma.generate("x", grammar={"type": "string", "minLength": 60}, logit_bias={4 + 0x31: 1e6})
