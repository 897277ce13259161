"""gemcut generate: where the prompt comes from, that every option counts, and what is shown."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from gemcut import Gemma
from gemcut.cli import output
from gemcut.cli.options import SamplingOptions
from gemcut.engine.sampling import SamplingParams

from .conftest import Cli, process

SEED = ("--seed", "7", "-n", "12")


@pytest.fixture(scope="module")
def gemma(tiny: Path) -> Gemma:
    return Gemma.load(tiny, progress=False)


def test_the_answer_is_that_of_the_python_api(cli: Cli, tiny: Path, gemma: Gemma) -> None:
    run = cli("generate", "-m", tiny, *SEED, "The sky is")
    assert run.code == 0, run.err
    assert run.err == ""
    assert run.out == gemma.generate("The sky is", seed=7, max_new_tokens=12) + "\n"


def test_a_prompt_may_be_argument_file_or_pipe(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    expected = cli("generate", "-m", tiny, *SEED, "The sky\nis").out
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfThe sky\nis\r\n")  # with the byte order mark and newline of some editors
    assert cli("generate", "-m", tiny, *SEED, "--file", file).out == expected
    assert cli("generate", "-m", tiny, *SEED, stdin=b"The sky\nis\n").out == expected
    assert cli("generate", "-m", tiny, *SEED, "-", stdin=b"The sky\nis").out == expected


@pytest.mark.parametrize(
    ("args", "stdin", "parts"),
    [
        ((), b"abc\xffdef", ["standard input is not UTF-8", "0xff at offset 3"]),
        ((), b"", ["the prompt is empty"]),
        ((), b" \n", ["the prompt is empty"]),
        (("",), b"", ["the prompt is empty"]),
        ((os.fsdecode(b"ab\xe9"),), b"", ["argument is not UTF-8", "0xe9 at offset 2"]),
        (("--file", "/nowhere/prompt.txt"), b"", ["/nowhere/prompt.txt", "No such file"]),
        (("--file", "/"), b"", ["cannot read /"]),
        (("--file", "/nowhere", "hi"), b"", ["given twice"]),
        (("-t", "-1", "hi"), b"", ["temperature is -1"]),
        (("-t", "nan", "hi"), b"", ["temperature is nan"]),
        (("--top-p", "2", "hi"), b"", ["top_p is 2"]),
        (("--top-k", "-5", "hi"), b"", ["top_k is -5"]),
        (("--min-p", "1.5", "hi"), b"", ["min_p is 1.5"]),
        (("--repetition-penalty", "0", "hi"), b"", ["repetition_penalty is 0"]),
        (("--presence-penalty", "3", "hi"), b"", ["presence_penalty is 3"]),
        (("--frequency-penalty", "-3", "hi"), b"", ["frequency_penalty is -3"]),
        (("--stop", "", "hi"), b"", ["stop is"]),
        (("-n", "-1", "hi"), b"", ["max_new_tokens is -1"]),
        (("--logprobs", "2", "hi"), b"", ["--logprobs", "--json"]),
        (("--logprobs", "-2", "--json", "hi"), b"", ["logprobs is -2"]),
        (("--threads", "0", "hi"), b"", ["--threads is 0"]),
        (("--dtype", "int3", "hi"), b"", ["int3"]),
        (("--device", "tpu", "hi"), b"", ["tpu"]),
        (("--attn-implementation", "magic", "hi"), b"", ["magic"]),
        (("--max-context", "9000", "hi"), b"", ["9000", "8192"]),
        (("--revision", "main", "hi"), b"", ["revision"]),
    ],
)
def test_bad_input(cli: Cli, tiny: Path, args: tuple[str, ...], stdin: bytes, parts: list[str]) -> None:
    run = cli("generate", "-m", tiny, *args, stdin=stdin)
    assert run.code == 2
    assert run.out == ""
    for part in parts:
        assert part in run.error


def test_a_prompt_of_9000_tokens(cli: Cli, tiny: Path) -> None:
    run = cli("generate", "-m", tiny, stdin=b"word " * 9000)
    assert run.code == 2
    assert "90" in run.error
    assert "8192" in run.error


def test_no_terminal_no_prompt(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "is_terminal", lambda stream: True)
    run = cli("generate", "-m", tiny)
    assert run.code == 2
    assert "--file PATH" in run.err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--top-k", "1"),
        ("--top-p", "0.00001"),
        ("--min-p", "0.9999"),
        ("--temperature", "0"),
    ],
)
def test_each_of_these_alone_makes_it_greedy(cli: Cli, tiny: Path, gemma: Gemma, option: str, value: str) -> None:
    greedy = gemma.generate("The sky is", temperature=0, max_new_tokens=8)
    assert cli("generate", "-m", tiny, "-n", "8", option, value, "The sky is").out == greedy + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value"),
    [("--repetition-penalty", "5"), ("--presence-penalty", "2"), ("--frequency-penalty", "2"), ("--seed", "8")],
)
def test_each_of_these_changes_the_answer(cli: Cli, tiny: Path, gemma: Gemma, option: str, value: str) -> None:
    name = option.removeprefix("--").replace("-", "_")
    fields = {"seed": 7, "top_k": 3, "max_new_tokens": 40, name: int(value)}
    plain = gemma.generate("The sky is", seed=7, top_k=3, max_new_tokens=40)
    run = cli("generate", "-m", tiny, "--seed", "7", "--top-k", "3", "-n", "40", option, value, "The sky is")
    assert run.out == gemma.generate("The sky is", **fields) + "\n"
    assert run.out != plain + "\n"


def test_stop_texts_end_the_answer(cli: Cli, tiny: Path) -> None:
    text = cli("generate", "-m", tiny, *SEED, "The sky is").out
    run = cli("generate", "-m", tiny, *SEED, "--stop", text[3:6], "--stop", text[8:11], "The sky is")
    assert run.out == text[: text.index(text[3:6])] + "\n"


def test_options_have_the_defaults_and_names_of_sampling_params() -> None:
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    for field in dataclasses.fields(SamplingOptions):
        assert field.name in known
        assert field.default is None  # not given: the checkpoint decides


def test_the_checkpoint_decides_what_is_not_given(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(tiny, folder)
    own = {"do_sample": True, "temperature": 0.6, "top_k": 5, "max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(own))
    same = ("-t", "0.6", "--top-k", "5", "-n", "7", "--seed", "3")
    run = cli("generate", "-m", folder, "--seed", "3", "--stats", "The sky is")
    assert run.out == cli("generate", "-m", tiny, *same, "The sky is").out
    rows = dict(line.split(maxsplit=1) for line in run.err.splitlines() if line)
    assert rows["sampling"] == (
        "max_new_tokens 7 (checkpoint), temperature 0.6 (checkpoint), top_k 5 (checkpoint), seed 3 (given), "
        "do_sample True (checkpoint)"
    )
    report = json.loads(cli("generate", "-m", folder, "-t", "0", "--json", "The sky is").out)
    assert report["completion_tokens"] == 7
    assert report["sampling"]["temperature"] == {"value": 0, "origin": "given"}
    assert report["sampling"]["top_k"] == {"value": 5, "origin": "checkpoint"}
    chat = ("chat", "--once", "Hi", "--stats")
    assert cli(*chat[:1], folder, *chat[1:], "--seed", "3").out == cli(*chat[:1], tiny, *chat[1:], *same).out
    assert "do_sample True, temperature 0.6, top_k 5, max_new_tokens 7" in cli("info", folder).out
    assert "sampling       says nothing" in cli("info", tiny).out


def test_threads(cli: Cli, tiny: Path) -> None:
    before = torch.get_num_threads()
    try:
        assert cli("generate", "-m", tiny, "-n", "1", "--threads", str(before + 1), "hi").code == 0
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_dtype_and_context_count(cli: Cli, tiny: Path) -> None:
    run = cli("generate", "-m", tiny, "-n", "2", "--dtype", "float16", "--json", "hi")
    assert json.loads(run.out)["dtype"] == "float16"
    run = cli("generate", "-m", tiny, "--max-context", "16", "-n", "20", "hi")
    assert run.code == 2
    assert "16" in run.error


def test_json(cli: Cli, tiny: Path, gemma: Gemma) -> None:
    run = cli("generate", "-m", tiny, *SEED, "--json", "--logprobs", "2", "--show-prompt", "The sky is")
    report = json.loads(run.out)
    expected = gemma.stream("The sky is", seed=7, max_new_tokens=12, logprobs=2).result
    assert report["text"] == expected.text
    assert report["prompt"] == "The sky is"
    assert report["prompt_tokens"] == expected.prompt_tokens
    assert report["completion_tokens"] == len(expected.token_ids)
    assert report["finish_reason"] == expected.finish_reason
    assert [entry["token_id"] for entry in report["logprobs"]] == list(expected.token_ids)
    assert all(len(entry["top"]) == 2 for entry in report["logprobs"])
    assert report["timings"]["load_seconds"] > 0
    assert report["timings"]["decode_tokens_per_second"] > 0


def test_show_prompt_and_stats(cli: Cli, tiny: Path) -> None:
    plain = cli("generate", "-m", tiny, *SEED, "The sky is").out
    run = cli("generate", "-m", tiny, *SEED, "--show-prompt", "--stats", "The sky is")
    assert run.out == "The sky is" + plain
    rows = dict(line.split(maxsplit=1) for line in run.err.splitlines() if line)
    assert list(rows) == ["model", "load", "prefill", "decode", "finish", "sampling"]
    assert "tok/s" in rows["prefill"]
    assert "12 tokens" in rows["decode"]
    assert rows["finish"].startswith("length")


def test_text_on_a_terminal_is_made_safe() -> None:
    assert output.safe("a\x1b[31mred\x1b[0m\r\x07\x9b2J\tb\n é 😀") == "a[31mred[0m2J\tb\n é 😀"


@pytest.mark.slow
def test_typed_bos_warns_in_one_line(tiny: Path) -> None:
    run = process("generate", "-m", tiny, *SEED, "<bos>The sky is")
    assert run.code == 0
    assert run.error.startswith("warning: ")
