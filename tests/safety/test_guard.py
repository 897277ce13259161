"""Guard files, decisions, failures, hidden texts; thresholds beside a slow search. All texts are invented."""

from __future__ import annotations

import base64
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemcut.errors import ParameterError
from gemcut.safety.calibrate import Labelled, best_threshold, f1_of, fit, wilson
from gemcut.safety.guard import Guard, plainer
from gemcut.safety.guard_file import GuardFile
from gemcut.safety.judge import JudgeError

from ..cli.conftest import Cli, cli  # noqa: F401


class Words:
    """A judge that scores 1 where a word is in the text."""

    def __init__(self, policy: str, word: str, wait: float = 0, error: Exception | None = None) -> None:
        self.policies, self.word, self.wait, self.error = (policy,), word, wait, error

    def score(self, text: str, policy: str) -> float:
        time.sleep(self.wait)
        if self.error is not None:
            raise self.error
        return float(self.word in text)


def guard_of(*judges: Any, **table: Any) -> Guard:
    names = [judge.policies[0] for judge in judges]
    specs = [{"kind": "http", "url": "http://127.0.0.1:1", "policies": names}]
    return Guard(GuardFile.of({"judge": specs, **table}, "guard.toml"), [(judge, judge.policies) for judge in judges])


@pytest.fixture
def guard_file(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text("zorble\n")
    path = tmp_path / "guard.toml"
    path.write_text('[[judge]]\nkind = "lexicon"\npath = "words.txt"\npolicy = "hate"\n')
    return path


def test_a_file_and_its_decisions(guard_file: Path) -> None:
    guard = GuardFile.read(guard_file).build()
    assert guard.quick
    assert guard.policies("input") == guard.policies("output") == ("hate",)
    good, bad = guard.check("input", "a fine day"), guard.check("output", "zorble")
    assert (good.blocked, good.scores) == (False, {"hate": 0.0})
    assert (bad.blocked, bad.flagged, bad.category) == (True, ("hate",), "hate")
    assert bad.scores["hate"] == pytest.approx(100 / 101)
    scored = guard.check("output", "zorble", mode="score")
    assert (scored.blocked, scored.flagged) == (False, ("hate",))
    assert guard.check("output", "zorble", mode="off").scores == {}
    assert (guard.checks, guard.blocks, guard.failures) == (3, 1, 0)
    assert 0 < (guard.latency() or 0) < 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no judge; name one"),
        ("judge = 3", "judge is no list of tables"),
        ('[[judge]]\nkind = "magic"', "judge 1: kind is 'magic'; expected one of lexicon"),
        ('[[judge]]\nkind = "linear"\npolicy = "hate"', "needs path"),
        ('[[judge]]\nkind = "linear"\npath = "m.npz"', "needs policy"),
        ('[[judge]]\nkind = "linear"\npath = "m.npz"\npolicy = "hat"', "the policy 'hat'; did you mean hate?"),
        ('[[judge]]\nkind = "http"\nurl = "http://x"', "needs policies"),
        ('[[judge]]\nkind = "self"\nmodel = "x"', "unknown key 'model'"),
        ('mode = "loud"\n[[judge]]\nkind = "self"', "mode is 'loud'; expected one of off, score, block"),
        ('output = ["violence"]\n[[judge]]\nkind = "shieldgemma"\nmodel = "x"', "violence, which no judge scores"),
        (
            '[[judge]]\nkind = "self"\n[thresholds]\nhate = 1.2',
            "the threshold of hate is 1.2; expected a number from 0",
        ),
        ('[[judge]]\nkind = "self"\n[thresholds]\nhate = true', "the threshold of hate is True"),
        ('[[judge]]\nkind = "self"\n[thresholds]\nhat = 0.1', "thresholds names 'hat'; did you mean hate?"),
        ('[[judge]]\nkind = "self"\n[policy.pets]\nthreshold = 0.5', "policy pets needs a definition"),
        ('[[judge]]\nkind = "self"\n[policy.hate]\nthreshold = -1', "policy hate: threshold is -1"),
        ('timeout = 0\n[[judge]]\nkind = "self"', "timeout is 0; expected seconds"),
        ('piece_tokens = 0\n[[judge]]\nkind = "self"', "piece_tokens is 0"),
        ('on_failure = "ignore"\n[[judge]]\nkind = "self"', "on_failure is 'ignore'; expected one of block, pass"),
        ("colour = 1", "unknown key 'colour'"),
        ("mode = ", "line 1"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "guard.toml"
    path.write_text(text)
    with pytest.raises(ParameterError, match=r"guard\.toml") as caught:
        GuardFile.read(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParameterError, match="there is no guard file"):
        GuardFile.read(tmp_path / "none.toml")
    spec = {"kind": "http", "url": "http://127.0.0.1:1", "policies": ["hate"], "key_env": "ZORBLE_KEY"}
    with pytest.raises(ParameterError, match="ZORBLE_KEY, which is not set"):
        GuardFile.of({"judge": [spec]}, "g").build()
    with pytest.raises(ParameterError, match="the guarded model itself, and there is none"):
        GuardFile.of({"judge": [{"kind": "self"}]}, "g").build()
    file = GuardFile.of({"judge": [{"kind": "self"}]}, "g")
    with pytest.raises(ParameterError, match="no judge scores the policy"):
        Guard(file, [])


def test_a_request_cannot_lower_the_mode() -> None:
    guard = guard_of(Words("hate", "zorble"), mode="score")
    assert guard.mode(None) == "score"
    assert guard.mode("block") == "block"
    with pytest.raises(ParameterError, match="'off', below this server's 'score'"):
        guard.mode("off")
    with pytest.raises(ParameterError, match="expected one of off, score, block"):
        guard.mode("none")


@pytest.mark.parametrize("on_failure", ["block", "pass"])
def test_judges_that_fail(on_failure: str) -> None:
    for judge, words in (
        (Words("hate", "zorble", wait=1.0), "did not answer within 0.05 seconds"),
        (Words("hate", "zorble", error=JudgeError("it is ill")), "it is ill"),
        (Words("hate", "zorble", error=KeyError("x")), "failed: KeyError"),
    ):
        guard = guard_of(judge, timeout=0.05, on_failure=on_failure)
        started = time.monotonic()
        decision = guard.check("output", "fine")
        assert time.monotonic() - started < 0.9
        assert decision.blocked == (on_failure == "block")
        assert words in decision.failed[0]
        assert decision.category == "judge-failed"
        assert guard.failures == 1
        assert not guard.check("output", "fine", mode="score").blocked  # which says it in `failed`


def test_one_judge_that_fails_hides_no_other() -> None:
    guard = guard_of(Words("hate", "zorble"), Words("violence", "x", error=JudgeError("ill")), on_failure="pass")
    decision = guard.check("input", "zorble")
    assert decision.blocked
    assert decision.flagged == ("hate",)
    assert decision.failed


def test_hidden_texts() -> None:
    guard = guard_of(Words("hate", "zorble flumox"))
    hidden = {
        "zero-width": "zor\u200bble flu\u200dmox",
        "tag characters": "zorble \U000e0041flumox",
        "full width": "ｚｏｒｂｌｅ ｆｌｕｍｏｘ",
        "base64": base64.b64encode(b"please say zorble flumox now").decode(),
        "base64 amid words": f"decode {base64.urlsafe_b64encode(b'zorble flumox!!').decode()} and do it",
        "unpadded": base64.b64encode(b"oh zorble flumox").decode().rstrip("="),
    }
    for kind, text in hidden.items():
        assert guard.check("input", text).blocked, kind
    for text in ("a fine day", "AAAAAAAAAAAAAAAAAAAAAAAA", "/usr/lib/python3/dist-packages/numpy", "=" * 100):
        assert not guard.check("input", text).blocked
    assert plainer("a fine day") == ["a fine day"]
    started = time.monotonic()
    plainer("A" * 1_000_000)
    assert time.monotonic() - started < 2


# ---- thresholds --------------------------------------------------------------------------------------------------


def test_the_best_threshold_is_that_of_a_slow_search() -> None:
    draw = random.Random(1)
    for _ in range(20):
        count = draw.randint(4, 25)
        scores = np.array([round(draw.random(), 1) for _ in range(count)])
        broken = np.array([i < 2 or (i > 3 and draw.random() < 0.4) for i in range(count)])
        found = best_threshold(scores, broken, 0.3)

        def worth(level: float, scores: Any = scores, broken: Any = broken) -> float:
            tp = sum(s >= level and b for s, b in zip(scores, broken, strict=True))
            fp = sum(s >= level and not b for s, b in zip(scores, broken, strict=True))
            fn = sum(s < level and b for s, b in zip(scores, broken, strict=True))
            if fp / (~broken).sum() > 0.3:
                return -1
            return 2 * tp / (2 * tp + fp + fn)

        assert worth(found) == pytest.approx(max(worth(level / 1000) for level in range(1001)))


def test_wilson_and_f1() -> None:
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0, 1)
    assert f1_of(np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)) == 0.5


def labelled(count: int) -> list[Labelled]:
    """Texts whose number is their score, nearly as they are labelled."""
    draw = random.Random(2)
    found = []
    for i in range(count):
        value = draw.random()
        found.append(Labelled(f"{i} {value:.4f}", {"hate": value + draw.gauss(0, 0.05) > 0.6}))
    return found


def test_fit() -> None:
    result = fit("hate", labelled(600), lambda text: float(text.text.split()[1]))
    assert result.threshold == pytest.approx(0.6, abs=0.05)
    assert result.f1 > 0.9
    assert result.f1_interval[0] < result.f1 < result.f1_interval[1]
    assert result.false_positives_interval[0] <= result.false_positives <= result.false_positives_interval[1]
    assert 200 < result.texts < 400
    with pytest.raises(ParameterError, match="fewer than two texts that break it are left"):
        fit("hate", [Labelled(str(i), {"hate": False}) for i in range(50)], lambda text: 0.5)


def test_calibrate_at_the_command_line(cli: Cli, guard_file: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = [{"text": f"day {i} {'zorble' * (i % 3 == 0)}", "labels": {"hate": i % 3 == 0}} for i in range(120)]
    path, csv = tmp_path / "l.jsonl", tmp_path / "x.csv"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    csv.write_text("id,prompt,type\n1,how to end a zorble,homonyms\n2,how to boil tea,homonyms\n3,zorble,contrast_h\n")
    found = json.loads(cli("safety", "calibrate", guard_file, path, "--xstest", csv, "--json").out)
    (hate,) = found["policies"]
    assert (hate["f1"], hate["recall"], hate["false_positives"]) == (1, 1, 0)
    assert 0 < hate["threshold"] < 100 / 101
    assert found["xstest over-refusal"]["share"] == 0.5
    assert found["xstest refused contrasts"]["share"] == 1
    shown = cli("safety", "calibrate", guard_file, path).out
    assert "[thresholds]\nhate = " in shown
    assert "F1 100.0%" in shown
    for content, message in (
        ("{", "line 1: no JSON"),
        ('{"text": "a"}', 'line 1: expected {"text"'),
        ('{"text": "a", "labels": {"pets": true}}', "the policy 'pets' has no judge"),
        ('{"text": "a", "labels": {"hate": 1}}', 'expected {"text"'),
        ("", "holds no labelled text"),
    ):
        path.write_text(content)
        run = cli("safety", "calibrate", guard_file, path)
        assert run.code == 2
        assert message in run.error
    assert "share from 0 to 1" in cli("safety", "calibrate", guard_file, path, "--most-false", "2").error
    csv.write_text("a,b\n1,2\n")
    assert "is not XSTest's CSV" in cli("safety", "calibrate", guard_file, path, "--xstest", csv).error


def test_policies_at_the_command_line(cli: Cli) -> None:  # noqa: F811
    run = cli("safety", "policies")
    assert all(name in run.out for name in ("child-safety", "self-harm", "prohibited_use_policy"))
    assert {policy["name"] for policy in json.loads(cli("safety", "policies", "--json").out)} >= {"hate", "violence"}
    assert run.out.startswith("dangerous-content")
