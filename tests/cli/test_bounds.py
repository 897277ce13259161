"""Streams without end or closed, prompts too large, and advice that exists at the front door where it is read."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gemcut.gemma
import gemcut.placement.memory
import support
from gemcut import AutoModelForCausalLM, Gemma
from gemcut.cli.generate import MAX_PROMPT_BYTES, read_stdin
from gemcut.cli.options import TOKEN_BYTES
from gemcut.errors import CapacityError, GemcutError, ParameterError
from gemcut.placement.plan import weight_bytes
from gemcut.quantization.spec import Quantization
from gemcut.text import Tokenizer

from .conftest import Cli, environment


def shell(line: str, seconds: int = 100) -> tuple[int, str, str]:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, env=environment(), timeout=seconds, check=False
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_a_prompt_without_end_is_read_no_further_than_the_models_context_is_long(
    cli: Cli, tiny: Path, tmp_path: Path
) -> None:
    gemcut = f"{sys.executable} -m gemcut"
    code, out, err = shell(f"{gemcut} generate -m gemma-3-270m < /dev/zero")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "more than 1,572,864 bytes, more than 32,768 tokens of context" in err  # the bundled model's, 48 bytes each
    for command in (("generate", "-m", tiny), ("chat", tiny)):
        for more, limit in (((), 8192), (("--max-context", "6000"), 6000), (("--max-context", "9000"), 8192)):
            run = cli(*command, *more, stdin=b"a" * (40 << 20))
            assert (run.code, run.out) == (2, "")
            assert f"more than {48 * limit:,} bytes, more than {limit:,} tokens of context can hold" in run.error
            assert sys.stdin.buffer.tell() == 48 * limit + 1  # and no byte more was read
        run = cli(*(str(part).replace(str(tiny), "no/such/model") for part in command), stdin=b"a" * (40 << 20))
        assert "no checkpoint called 'no/such/model'" in run.error
        assert sys.stdin.buffer.tell() == 1 << 18
    os.mkfifo(tmp_path / "fifo")
    for file, what in (("/dev/zero", "a device"), (tmp_path / "fifo", "a FIFO")):
        run = cli("generate", "-m", "x", "--file", file)
        assert run.code == 2
        assert f"is {what}; expected a regular file" in run.error
    (tmp_path / "large").write_bytes(b"a" * (MAX_PROMPT_BYTES + 1))
    assert "larger than" in cli("generate", "-m", "x", "--file", tmp_path / "large").error


def test_a_long_prompt_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, most in ((0, 0), (1000, 0), ((1 << 18) - 1, 0), (1 << 18, 1 << 18), (300_000, 300_000), (300_000, 10**9)):
        data = bytes(range(256)) * (size // 256) + b"a" * (size % 256)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert read_stdin(lambda most=most: most) == data  # type: ignore[misc]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    with pytest.raises(ParameterError, match="more than 299,999 bytes"):
        read_stdin(lambda: 299_999)


def test_no_token_has_more_bytes_than_is_counted_on() -> None:
    vocabulary = Tokenizer.from_folder(support.tokenizer_dir())
    assert max(len(vocabulary.token_bytes(i)) for i in range(vocabulary.vocab_size)) == TOKEN_BYTES


@pytest.mark.slow
def test_closed_streams() -> None:
    gemcut = f"{sys.executable} -m gemcut"
    code, _, err = shell(f"{gemcut} generate -m gemma-3-270m <&-")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "standard input is closed" in err
    assert shell(f"{gemcut} plan 2b --memory 24GB >&-") == (0, "", "")
    assert shell(f"{gemcut} plan nothing/here/x >&- 2>&-") == (2, "", "")
    code, _, err = shell(f"{gemcut} plan 2b --memory 24GB | true")
    assert (code in (0, 141), err) == (True, "")


def test_what_does_not_fit_is_told_what_does_in_the_words_of_each_front_door(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9B in fp32 where there are 24 GB: bf16, int8 and nf4 fit, with the memory that each needs."""
    config = gemcut.config.FAMILY["gemma-2-9b"].replace(torch_dtype="float32")
    folder = support.save_checkpoint(tmp_path / "9b", support.hf_model(support.tiny_config()))
    monkeypatch.setattr(gemcut.config.GemmaConfig, "from_file", classmethod(lambda cls, path: config))
    monkeypatch.setattr(gemcut.placement.memory, "free_memory", lambda device: 24 * 10**9)
    sizes = [weight_bytes(config, "bfloat16", cut) / 1e9 for cut in (None, Quantization("int8"), Quantization("nf4"))]
    assert [round(size, 1) for size in sizes] == [
        18.5,
        10.2,
        6.1,
    ]  # 42 × 198.18M × 4.127 bits + 256,000 × 3,584 × 2 bytes in nf4
    numbers = [f"({size:.1f} GB)" for size in sizes]

    with pytest.raises(CapacityError) as caught:
        Gemma.load(folder, progress=False)  # an fp32 checkpoint
    for words in ('dtype="bfloat16"', 'quantization="int8"', 'quantization="nf4"', "37.0 GB", *numbers):
        assert words in str(caught.value)
    with pytest.raises(CapacityError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    for words in ("dtype=torch.bfloat16", "load_in_8bit=True", 'bnb_4bit_quant_type="nf4"', *numbers):
        assert words in str(caught.value)
    assert 'quantization="' not in str(caught.value)
    run = cli("generate", "-m", folder, "hi")
    assert run.code == 2
    for words in ("--dtype bfloat16", "--quantization int8", "--quantization nf4", *numbers):
        assert words in run.error
    monkeypatch.setattr(gemcut.placement.memory, "free_memory", lambda device: 10**9)
    assert (
        "even --quantization nf4 (6.1 GB) is too much: choose a smaller model"
        in cli("chat", folder, "--once", "a").error
    )
    monkeypatch.setattr(gemcut.placement.memory, "free_memory", lambda device: 8 * 10**9)
    error = cli("generate", "-m", folder, "--dtype", "bfloat16", "hi").error
    assert "--quantization nf4 (6.1 GB)" in error
    assert "--dtype" not in error
    # The embedding stays in the fp32 of the checkpoint: 256,000 × 3,584 × 2 bytes more than in bf16.
    with pytest.raises(GemcutError, match=r"need 12\.0 GB in int8; 8\.0 GB are free"):
        Gemma.load(folder, quantization="int8", progress=False)
