"""A process a rank, as `Gemma.load(..., gpus=N)` starts them: the answers of one process, and what goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemcut import Gemma, SamplingParams
from gemcut.engine import Edit
from gemcut.errors import CapacityError, CommunicationError, GemcutError, ParameterError, UnsupportedError
from gemcut.model.dense import dense_logits
from gemcut.parallel.messages import Job
from gemcut.parallel.team import Team
from model.build import random_ids
from parallel.cases import FORMATS, SHAPE, checkpoint

PROMPTS = [random_ids(n, vocab_size=SHAPE["vocab_size"], seed=n).tolist() for n in (3, 9, 40, 1)]
GREEDY = SamplingParams(max_new_tokens=12, temperature=0, logprobs=2)
OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_context": 128, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def one(folder: Path) -> Gemma:
    return Gemma.load(folder, **OPTIONS)


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[Gemma]:
    gemma = Gemma.load(folder, gpus=2, **OPTIONS)
    yield gemma
    assert gemma.team is not None
    gemma.team.close()


def answers(gemma: Gemma, params: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    return [tuple(each.token_ids) for each in gemma.complete(PROMPTS, params)]


def same_but_for_ties(ours: Gemma, theirs: Gemma) -> None:
    """Greedy answers agree up to where the two likeliest tokens are as good as equal, which is shown."""
    for own, other in zip(ours.complete(PROMPTS, GREEDY), theirs.complete(PROMPTS, GREEDY), strict=True):
        for place, (a, b) in enumerate(zip(own.token_ids, other.token_ids, strict=True)):
            if a != b:
                best, second = (value for _, value in other.logprobs[place].top)
                assert best - second < 1e-4, f"token {place}: {a} instead of {b}, apart by {best - second}"
                print(f"tie at token {place} of {own.prompt_ids[:4]}: {a} and {b}")
                break


def gone(pids: list[int], seconds: float = 3.0) -> bool:
    """Whether the processes end within so many seconds; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_greedy_answers_are_those_of_one_process_and_two_runs_are_bit_equal(one: Gemma, two: Gemma) -> None:
    same_but_for_ties(two, one)
    first, second = two.complete(PROMPTS, GREEDY), two.complete(PROMPTS, GREEDY)
    assert [each.logprobs for each in first] == [each.logprobs for each in second]
    # Without log-probabilities the likeliest tokens alone are exchanged, not the logits.
    plain = SamplingParams(max_new_tokens=GREEDY.max_new_tokens, temperature=0)
    assert answers(two, plain) == answers(two)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("int8", 2),
        ("nf4-double", 2),
        pytest.param("nf4", 2, marks=pytest.mark.slow),
        pytest.param("nf4-double", 4, marks=pytest.mark.slow),
    ],
)
def test_greedy_answers_in_other_formats(folder: Path, name: str, size: int) -> None:
    whole = Gemma.load(folder, quantization=FORMATS[name], **OPTIONS)
    split = Gemma.load(folder, quantization=FORMATS[name], gpus=size, **OPTIONS)
    assert split.team is not None
    same_but_for_ties(split, whole)
    pids = split.team.pids
    assert len(pids) == size - 1
    split.team.close()
    assert gone(pids)


def test_samples_logprobs_scores_embeddings_and_edits_are_those_of_one_process(one: Gemma, two: Gemma) -> None:
    drawn = SamplingParams(max_new_tokens=12, temperature=0.7, top_p=0.9, seed=5, repetition_penalty=1.2)
    assert answers(two, drawn) == answers(one, drawn)
    for own, other in zip(two.complete(PROMPTS, GREEDY), one.complete(PROMPTS, GREEDY), strict=True):
        assert own.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-4)
    for own_scores, other_scores in zip(two.score(PROMPTS[:3]), one.score(PROMPTS[:3]), strict=True):
        assert own_scores == pytest.approx(other_scores, abs=1e-4)
    torch.testing.assert_close(two.embed(PROMPTS[:2]), one.embed(PROMPTS[:2]), rtol=1e-4, atol=1e-4)


def test_edits_of_logits_work_as_grammars_do(one: Gemma, two: Gemma) -> None:
    allowed = [11, 40, 300]
    bias = torch.full((SHAPE["vocab_size"],), float("-inf"))
    bias[allowed] = torch.tensor([0.0, 0.5, -0.5])

    def edit(tokens: Any, prompt_length: int) -> Edit:
        return Edit(bias=bias)

    params = SamplingParams(max_new_tokens=10, temperature=0, ignore_eos=True)
    found = [gemma.stream_ids(PROMPTS[0], params, edit=edit).result for gemma in (two, one)]
    assert len(found[0].token_ids) == 10
    assert set(found[0].token_ids) <= set(allowed)
    assert found[0].token_ids == found[1].token_ids


def test_workers_end_with_a_load_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Team] = []
    real = Team.start.__func__  # type: ignore[attr-defined]

    def start(cls: type[Team], *arguments: Any) -> Team:
        started.append(real(cls, *arguments))
        return started[-1]

    monkeypatch.setattr(Team, "start", classmethod(start))
    with pytest.raises(CapacityError, match="kv_memory"):
        Gemma.load(folder, gpus=2, kv_memory=1, **OPTIONS)
    assert gone(started[0].pids)


def test_a_prompts_beginning_is_found_in_the_cache(one: Gemma, two: Gemma) -> None:
    start = random_ids(64, vocab_size=SHAPE["vocab_size"], seed=9).tolist()
    params = SamplingParams(max_new_tokens=8, temperature=0)
    two.complete([[*start, 5]], params)
    (found,) = two.complete([[*start, 7]], params)
    assert found.stats.cached_tokens >= 32
    assert found.token_ids == one.complete([[*start, 7]], params)[0].token_ids


def test_requests_that_come_while_others_run(one: Gemma, two: Gemma) -> None:
    params = SamplingParams(max_new_tokens=16, temperature=0)
    streams = []
    for prompt in PROMPTS:
        streams.append(two.stream_ids(prompt, params))
        time.sleep(0.01)
    streams[1].cancel()
    found = [tuple(stream.result.token_ids) for stream in (streams[0], *streams[2:])]
    expected = [tuple(each.token_ids) for each in one.complete([PROMPTS[0], *PROMPTS[2:]], params)]
    assert found == expected


def test_what_needs_the_whole_network_is_refused_by_name(two: Gemma, tmp_path: Path) -> None:
    from gemcut.hf.model import GemmaForCausalLM

    with pytest.raises(UnsupportedError, match="split over several devices"):
        dense_logits(two.model, torch.tensor(PROMPTS[0]))
    with pytest.raises(UnsupportedError, match="cannot be saved"):
        GemmaForCausalLM(two).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    assert answers(two)  # nothing has happened to it


def test_a_worker_that_is_killed_amid_a_request_ends_it_with_the_cause(folder: Path) -> None:
    gemma = Gemma.load(folder, gpus=4, **OPTIONS)
    assert gemma.team is not None
    stream = gemma.stream_ids(PROMPTS[0], SamplingParams(max_new_tokens=120, temperature=0, ignore_eos=True))
    while not stream.sequence.events:
        time.sleep(0.005)
    pids = gemma.team.pids
    os.kill(pids[1], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(GemcutError, match=r"device 2 \(cpu\): its process was ended by SIGKILL; load the model again"):
        list(stream)
    assert time.monotonic() - started < 1.5
    assert gone(pids)
    (after,) = gemma.complete([PROMPTS[0]], GREEDY)
    assert "SIGKILL" in str(after.error)
    gemma.team.close()


def test_memory_that_runs_out_on_one_device_is_said(folder: Path) -> None:
    resource = pytest.importorskip("resource")
    gemma = Gemma.load(folder, gpus=2, **{**OPTIONS, "max_context": 256}, max_batch_tokens=256)
    assert gemma.team is not None
    (pid,) = gemma.team.pids
    resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))
    (result,) = gemma.complete([PROMPTS[2] * 6], GREEDY)
    assert result.finish_reason == "error"
    assert "device 1 (cpu): its memory ran out" in str(result.error)
    gemma.team.close()


def job(folder: Path, **changes: Any) -> Job:
    values = {"rank": 1, "size": 2, "backend": "gloo", "folder": "", "device": "cpu", "kind": "folder",
              "path": str(folder), "dtype": "float32", "quantization": None, "attention": "auto", "kernels": "auto",
              "threads": 1}  # fmt: skip
    return Job(**{**values, **changes})


def test_a_worker_that_cannot_begin_says_why(folder: Path, one: Gemma, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(CommunicationError, match=r"device 1 \(cpu\): .*config.json") as caught:
        Team.start([job(tmp_path / "nothing")], one.config, torch.device("cpu"))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 30


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
import torch
torch.set_num_threads(1)
from gemcut import Gemma, SamplingParams
gemma = Gemma.load(sys.argv[1], gpus=2, dtype="float32", device="cpu", max_context=128, progress=False)
print(*gemma.team.pids, flush=True)
try:
    while True:
        gemma.complete([[5, 6, 7]], SamplingParams(max_new_tokens=50, temperature=0, ignore_eos=True))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_leader(folder: Path, how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as leader:
        assert leader.stdout is not None
        pids = [int(pid) for pid in leader.stdout.readline().split()]
        assert len(pids) == 1
        time.sleep(0.3)
        if how is signal.SIGINT:
            os.killpg(leader.pid, how)  # Ctrl-C on a terminal reaches all of them
            assert leader.stdout.read() == "interrupted\n"
            assert leader.wait(20) == 0
        else:
            os.kill(leader.pid, how)
            leader.wait(20)
        assert gone(pids)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gpus": 0}, "gpus is 0; expected a whole number from 1 on"),
        ({"gpus": True}, "gpus is True"),
        ({"gpus": 3}, "8 attention heads cannot be shared evenly by 3 devices"),
        ({"gpus": 2, "dtype": "float16"}, "float16 is not supported over 2 devices"),
        ({"gpus": 2, "device": "auto"}, "2 GPUs were asked for, but torch sees none"),
    ],
)
def test_bad_counts_are_refused_in_one_line(
    folder: Path, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParameterError, match=reason) as caught:
        Gemma.load(folder, **{**OPTIONS, **options})
    assert "\n" not in str(caught.value)
