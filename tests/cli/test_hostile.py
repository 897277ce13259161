"""Command lines that are mistaken or hostile: one line of error and exit code 2, and no file made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .conftest import Cli

HUGE = "9" * 5000
BYTES = os.fsdecode(b"ab\xff")  # an argument that is not UTF-8
COMMANDS = ("generate", "chat", "info", "plan", "quantize", "config")

#: (command line, a part of the error). {dir}: an empty folder, {file}: a text file, {gguf}: a file that is no GGUF,
#: {cut}: a GGUF that is cut off, {missing}: nothing there, {full}: a folder with a file in it, {ro}: cannot be written.
REFUSED: list[tuple[list[str], str]] = [
    # what no command has
    (["frobnicate"], "no such command 'frobnicate'"),
    ([""], "no such command ''"),
    (["--frob"], "no such option: --frob"),
    (["-x"], "no such option: -x"),
    (["generate", "--frob"], "no such option: --frob"),
    (["generate", "--temperatur", "1", "x"], "--temperatur"),
    (["chat", "--prompt", "x"], "no such option: --prompt"),
    (["info", "--temperature", "1"], "no such option"),
    (["plan", "2b", "--seed", "1"], "no such option"),
    (["quantize", "a", "b", "--threads", "2"], "no such option"),
    (["Generate", "x"], "no such command 'Generate'"),
    (["generate", "a", "b"], "unexpected extra argument"),
    (["chat", "a", "b"], "unexpected extra argument"),
    (["info", "a", "b"], "unexpected extra argument"),
    (["plan", "a", "b"], "unexpected extra argument"),
    (["quantize", "a", "b", "c"], "unexpected extra argument"),
    (["quantize"], "missing argument 'MODEL'"),
    (["quantize", "a"], "missing argument 'OUT'"),
    # no value, no model, no prompt
    (["generate", "-m"], "requires an argument"),
    (["generate", "-t"], "requires an argument"),
    (["generate", "x"], "no model given"),
    (["generate", "-m", "", "x"], "no model given"),
    (["chat"], "no model given"),
    (["chat", ""], "no model given"),
    (["chat", "a", "-m", "b"], "the model was given twice"),
    (["plan"], "no model given"),
    (["plan", ""], "no model given"),
    (["info", ""], "no checkpoint called ''"),
    (["generate", "-m", "{dir}"], "the prompt is empty"),
    (["generate", "-m", "{dir}", ""], "the prompt is empty"),
    (["generate", "-m", "{dir}", " \n"], "the prompt is empty"),
    (["generate", "-m", "{dir}", BYTES], "is not UTF-8"),
    (["generate", "-m", "{dir}", "x", "-f", "{file}"], "given twice"),
    (["generate", "-m", "{dir}", "-f", "{missing}"], "No such file"),
    (["generate", "-m", "{dir}", "-f", "{dir}"], "{dir}"),
    (["generate", "-m", "{dir}", "-f", ""], "cannot read"),
    (["generate", "-m", "{dir}", "-f", "a\0b"], "a"),
    (["generate", "-m", "{dir}", "-f", "{gguf}"], "is not UTF-8"),
    (["chat", "{dir}"], "the message is empty"),
    (["chat", "{dir}", "--once", ""], "the message is empty"),
    (["chat", "{dir}", "--once", BYTES], "is not UTF-8"),
    (["chat", "{dir}", "--system", BYTES, "--once", "x"], "--system is not UTF-8"),
    (["chat", "{dir}", "--load", "{missing}", "--once", "x"], "cannot read"),
    (["chat", "{dir}", "--load", "{dir}", "--once", "x"], "{dir}"),
    (["chat", "{dir}", "--load", "{file}", "--once", "x"], "is not JSON"),
    (["chat", "{dir}", "--load", "a\0b", "--once", "x"], "invalid value for '--load'"),
    (["chat", "{dir}", "--load", "/dev/zero", "--once", "x"], "is not a file"),
    # models that are none
    (["generate", "-m", "{dir}", "x"], "no config.json"),
    (["generate", "-m", "{missing}", "x"], "does not exist"),
    (["generate", "-m", "{file}", "x"], "{file}"),
    (["generate", "-m", "{gguf}", "x"], "{gguf}"),
    (["generate", "-m", "{cut}", "x"], "{cut}"),
    (["generate", "-m", "llama-3-8b", "x"], "no checkpoint called 'llama-3-8b'"),
    (["generate", "-m", "a\0b", "x"], "no checkpoint called"),
    (["generate", "-m", "a/b/c", "x"], "no checkpoint called"),
    (["generate", "-m", "../x", "x"], "does not exist"),
    (["generate", "-m", "x" * 5000, "x"], "no checkpoint called"),
    (["generate", "-m", "someone/some-gemma", "x"], "someone/some-gemma"),
    (["generate", "-m", BYTES, "x"], "no checkpoint called"),
    (["generate", "-m", "https://huggingface.co/google/gemma-2-2b", "x"], "no checkpoint called"),
    (["generate", "-m", "gemma-3-270m", "--revision", "main", "x"], "revision"),
    (["info", "{dir}"], "no config.json"),
    (["info", "{missing}"], "does not exist"),
    (["info", "{gguf}"], "{gguf}"),
    (["info", "{cut}"], "{cut}"),
    (["info", "/dev/null"], "/dev/null"),
    (["info", "{dir}", "--kernels"], "no config.json"),
    (["plan", "{dir}", "--memory", "1GB"], "no config.json"),
    (["plan", "{gguf}", "--memory", "1GB"], "{gguf}"),
    (["quantize", "{dir}", "{missing}"], "no config.json"),
    (["quantize", "{missing}", "{dir}/out"], "does not exist"),
    # values of the wrong type, or out of range
    *(
        (["generate", "-m", "{dir}", "x", option, "many"], option)
        for option in ("-n", "--top-k", "--seed", "--logprobs")
    ),
    *((["generate", "-m", "{dir}", "x", option, "1.5"], option) for option in ("-n", "--top-k", "--seed", "--threads")),
    *((["generate", "-m", "{dir}", "x", option, ""], option) for option in ("-n", "-t", "--top-p", "--seed")),
    *((["generate", "-m", "{dir}", "x", option, HUGE], "") for option in ("-n", "--seed", "--threads", "--top-k")),
    (["generate", "-m", "{dir}", "x", "-t", HUGE], "temperature is inf"),
    (["generate", "-m", "{dir}", "x", "-t", "-1"], "temperature is -1"),
    (["generate", "-m", "{dir}", "x", "-t", "nan"], "temperature is nan"),
    (["generate", "-m", "{dir}", "x", "-t", "1e999"], "temperature is inf"),
    (["generate", "-m", "{dir}", "x", "-t", "0,7"], "temperature"),
    (["generate", "-m", "{dir}", "x", "-n", "-1"], "max_new_tokens is -1"),
    (["generate", "-m", "{dir}", "x", "--top-k", "-1"], "top_k is -1"),
    (["generate", "-m", "{dir}", "x", "--top-p", "0"], "top_p is 0"),
    (["generate", "-m", "{dir}", "x", "--top-p", "1.1"], "top_p is 1.1"),
    (["generate", "-m", "{dir}", "x", "--min-p", "-0.1"], "min_p is -0.1"),
    (["generate", "-m", "{dir}", "x", "--repetition-penalty", "0"], "repetition_penalty is 0"),
    (["generate", "-m", "{dir}", "x", "--presence-penalty", "2.1"], "presence_penalty is 2.1"),
    (["generate", "-m", "{dir}", "x", "--frequency-penalty", "-2.1"], "frequency_penalty is -2.1"),
    (["generate", "-m", "{dir}", "x", "--seed", str(2**64)], "seed is 18446744073709551616"),
    (["generate", "-m", "{dir}", "x", "--stop", ""], "stop is"),
    (["generate", "-m", "{dir}", "x", *["--stop", "y"] * 65], "stop has 65 texts"),
    (["generate", "-m", "{dir}", "x", "--stop", BYTES], "--stop is not UTF-8"),
    (["generate", "-m", "{dir}", "x", "--logprobs", "1"], "add --json"),
    (["generate", "-m", "{dir}", "x", "--json", "--logprobs", "101"], "logprobs is 101"),
    (["generate", "-m", "{dir}", "x", "--threads", "0"], "--threads is 0"),
    (["generate", "-m", "{dir}", "x", "--threads", "-3"], "--threads is -3"),
    (["generate", "-m", "{dir}", "x", "--max-context", "0"], "max-context is 0"),
    (["generate", "-m", "{dir}", "x", "--max-context", "-1"], "max-context is -1"),
    (["generate", "-m", "{dir}", "x", "--dtype", "int4"], "int4"),
    (["generate", "-m", "{dir}", "x", "--dtype", ""], "dtype is ''"),
    (["generate", "-m", "{dir}", "x", "--device", "tpu"], "tpu"),
    (["generate", "-m", "{dir}", "x", "--device", ""], "device is ''"),
    (["generate", "-m", "{dir}", "x", "--device", "cuda:-1"], "cuda:-1"),
    (["generate", "-m", "{dir}", "x", "--quantization", "int4"], "--quantization is 'int4'"),
    (["generate", "-m", "{dir}", "x", "--quantization", ""], "--quantization is ''"),
    (["generate", "-m", "{dir}", "x", "--head", "int8"], "--head needs --quantization"),
    (["generate", "-m", "{dir}", "x", "--no-double-quant"], "--no-double-quant needs --quantization"),
    (["generate", "-m", "{dir}", "x", "--quantization", "nf4", "--head", "int4"], "int4"),
    (["chat", "{dir}", "--once", "x", "-t", "-1"], "temperature is -1"),
    (["chat", "{dir}", "--once", "x", "-n", "x"], "-n"),
    (["chat", "{dir}", "--once"], "requires an argument"),
    (["plan", "2b", "--memory", "much"], "memory is 'much'"),
    (["plan", "2b", "--memory", ""], "memory is ''"),
    (["plan", "2b", "--memory", "-1GB"], "memory is '-1GB'"),
    (["plan", "2b", "--memory", "0"], "memory is '0'"),
    (["plan", "2b", "--memory", "nanGB"], "memory is 'nanGB'"),
    (["plan", "2b", "--memory", f"{HUGE}GB"], "memory is"),
    (["plan", "2b", "--memory", "1GB", "--batch", "0"], "batch is 0"),
    (["plan", "2b", "--memory", "1GB", "--batch", HUGE], ""),
    (["plan", "2b", "--memory", "1GB", "--context", "0"], "context is 0"),
    (["plan", "2b", "--memory", "1GB", "--context", "8193"], "context is 8193"),
    (["plan", "2b", "--memory", "1GB", "--dtype", "bf15"], "bf15"),
    (["plan", "2b", "--memory", "1GB", "--device", "tpu"], "tpu"),
    (["plan", "2b", "--memory", "1GB", "--quantization", "q4"], "--quantization is 'q4'"),
    (["plan", "2b", "--memory", "1GB", "--head", "int8"], "--head needs --quantization"),
    (["plan", "2b", "--memory", "1GB", "--quantization", "nf4", "--block-size", "63"], "--block-size is 63"),
    (
        ["plan", "2b", "--memory", "1GB", "--quantization", "int8", "--block-size", "128"],
        "--block-size is for nf4 and fp4",
    ),
    (["plan", "2b", "--memory", "1GB", "--quantization", "int8", "--no-double-quant"], "--no-double-quant is for nf4"),
    (["plan", "frob", "--memory", "1GB"], "no checkpoint called 'frob'"),
    (["quantize", "2b", "{dir}/out", "--to", "q4"], "--to is 'q4'"),
    (["quantize", "2b", "{dir}/out", "--to", ""], "--to is ''"),
    (["quantize", "2b", "{dir}/out", "--block-size", "63"], "63"),
    (["quantize", "2b", "{dir}/out", "--head", "int4"], "int4"),
    (["quantize", "2b", "{dir}/out", "--max-shard-size", "big"], "max-shard-size is 'big'"),
    (["quantize", "2b", "{dir}/out", "--max-shard-size", "0"], "max-shard-size is '0'"),
    (["quantize", "2b", "{dir}/out", "--to", "int8", "--calibrate", "{file}"], "--calibrate is for nf4"),
    (["quantize", "2b", "{dir}/out", "--to", "int8", "--no-double-quant"], "--no-double-quant is for nf4"),
    (["quantize", "2b", "{dir}/out", "--to", "int8", "--block-size", "128"], "--block-size is for nf4"),
    (["quantize", "2b", "{dir}/out", "--calibrate", "{missing}"], "cannot read"),
    (["quantize", "2b", "{dir}/out", "--calibrate", "{dir}"], "{dir}"),
    (["quantize", "2b", "{file}"], "{file}"),
    (["quantize", "2b", "{full}"], "{full}"),
    (["quantize", "2b", ""], "is no name for a new folder"),
    (["quantize", "2b", "a\0b"], "a"),
    (["quantize", "{dir}", "{dir}"], ""),
    # config
    (["config", "frob"], "no such command 'frob'"),
    (["config", "set"], "missing argument"),
    (["config", "set", "seed"], "missing argument"),
    (["config", "set", "sead", "1"], "did you mean seed?"),
    (["config", "set", "seed", HUGE], "seed is '999"),
    (["config", "set", "seed", "1", "2"], "seed takes one value"),
    (["config", "set", "temperature", "hot"], "expected a number from 0 to 100"),
    (["config", "set", "model", "a\0b"], "model is"),
    (["config", "set", "stop", BYTES], "stop is"),
    (["config", "set", "model", BYTES], "model is"),
    (["config", "unset"], "missing argument"),
    (["config", "unset", "seed"], "does not set seed"),
    (["config", "path", "--json"], "no such option"),
]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "dir").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("a text\n")
    (tmp_path / "no.gguf").write_bytes(b"no such \xff\x00 thing")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 16)
    paths = {"dir": "dir", "full": "full", "file": "file", "gguf": "no.gguf", "cut": "cut.gguf", "missing": "./none"}
    return {name: f"{tmp_path}/{path}" for name, path in paths.items()}


def _filled(text: str, places: dict[str, str]) -> str:
    for name, path in places.items():
        text = text.replace(f"{{{name}}}", path)
    return text


@pytest.mark.parametrize(
    ("line", "part"), REFUSED, ids=[f"{i}-{' '.join(a)[:40]!a}" for i, (a, _) in enumerate(REFUSED)]
)
def test_what_is_refused(
    cli: Cli, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: list[str], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    before = sorted(tmp_path.rglob("*"))
    run = cli(*(_filled(argument, places) for argument in line))
    assert run.code == 2, run
    assert run.out == ""
    assert run.error.startswith("error: ")
    assert "bug in gemcut" not in run.error
    assert len(run.error) < 1000
    assert _filled(part, places) in run.error
    assert [path for path in sorted(tmp_path.rglob("*")) if "hub" not in path.parts] == before


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), ["config", "set"], ["config", "unset"]])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(cli: Cli, command: list[str], flag: str) -> None:
    run = cli(*command, flag)
    assert (run.code, run.err) == (0, "")
    assert "Usage: gemcut" in run.out
    assert "pip install 'gemcut" not in run.out
