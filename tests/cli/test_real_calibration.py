"""``gemcut quantize --calibrate`` on real weights, of a GGUF file and of a folder, in both 4-bit formats: the first two
layers of Gemma 3 270M. tests/calibration/test_layerwise.py calibrates all of them.

What a folder lost is measured here from the logits of loaded models, in float64: another way than the command's own,
which goes layer by layer.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gemcut.calibration.layerwise
import gemcut.cli.quantize
from gemcut.calibration.samples import read_calibration_text
from gemcut.gemma import Gemma
from gemcut.model.dense import dense_logits
from gemcut.quantization.calibrate import Method
from gemcut.quantization.spec import FORMATS
from support import ROOT

from . import real_forms as real
from .conftest import Cli, Run
from .documented import commands, split

pytestmark = pytest.mark.slow

COMMANDS = [c for c in commands() if c.reason is None and "--calibrate" in c.line]
#: Short documents, so that a short text is enough to hold one of nine out.
CONTEXT = 128
TEXT = (ROOT / "LICENSE").read_text()[:6500]


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to work in. Rounds after error feedback take as long again and go no other way: tests on small
    checkpoints make them."""
    monkeypatch.chdir(tmp_path)
    real.share_loads(monkeypatch)
    monkeypatch.setattr(gemcut.cli.quantize, "CONTEXT", CONTEXT)
    monkeypatch.setattr(gemcut.calibration.layerwise, "Method", partial(Method, sweeps=0))


def _calibrate(cli: Cli, line: str, source: Path, form: str, out: str) -> Run:
    """A documented command with another source, format and text."""
    arguments, _ = split(re.sub(r"--to \w+", f"--to {form}", line), source)
    arguments[2] = out
    text = arguments[arguments.index("--calibrate") + 1]
    Path(text).write_text(TEXT)
    return cli(*arguments, "--json")


@torch.inference_mode()
def _divergence(whole: Gemma, cut: Gemma, ids: list[int]) -> float:
    """Mean KL divergence over the tokens of a document, in nats."""
    p, q = (_log_probabilities(gemma, ids) for gemma in (whole, cut))
    return float((p.exp() * (p - q)).sum(-1).mean())


def _log_probabilities(gemma: Gemma, ids: list[int]) -> Tensor:
    return dense_logits(gemma.model, torch.tensor(ids[:-1])).double().log_softmax(-1)


def _written(cli: Cli, source: Path, form: str, out: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Calibrate; the digests of the files, and the report."""
    run = _calibrate(cli, COMMANDS[0].line, source, form, out)
    assert run.code == 0, run.err
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(out).glob("*.safetensors")}
    assert digests
    return digests, json.loads(run.out)


def _check(cli: Cli, report: dict[str, Any], source: Path, form: str, out: str) -> None:
    """What the command says it won is what loaded models say."""
    whole = Gemma.load(source)
    every = read_calibration_text(Path("my-texts.txt"), whole.tokenizer, tokens=18432, context=CONTEXT)
    (held_out,) = every[8::9]
    calibrated = _divergence(whole, Gemma.load(out), held_out)
    plain = _divergence(whole, Gemma.load(source, quantization=form), held_out)
    assert calibrated < 0.8 * plain
    # The command computes in bf16 on decoded weights, a loaded model by kernels for 4 bits.
    assert report["held_out"]["kl"] == pytest.approx(calibrated, rel=0.1)
    assert report["held_out_nearest_codes"]["kl"] == pytest.approx(plain, rel=0.1)
    written = cli("generate", "-m", out, "-t", "0", "-n", "4", "The capital of France is")
    assert written.code == 0, written.err
    assert written.out.strip()
    real.forget()


@pytest.fixture(scope="module")
def two_layers(real_forms: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The first two layers of the real weights as a file and as a folder: all take too long for each format."""
    where = tmp_path_factory.mktemp("two")
    gguf = real.first_layers(real_forms["gguf"], where / "two.gguf", 2)
    return [gguf, real.as_folder(gguf, where / "two")]


@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_what_it_won_is_what_loaded_models_say(cli: Cli, two_layers: list[Path], form: str) -> None:
    """NF4 from a file and from a folder, which give the same bytes; FP4 from a folder."""
    sources = two_layers if form == "nf4" else two_layers[1:]
    (digests, report), *others = (_written(cli, source, form, f"out{i}") for i, source in enumerate(sources))
    for other_digests, other in others:
        assert other_digests == digests
        for name in ("held_out", "held_out_nearest_codes"):
            assert other[name] == report[name]
    _check(cli, report, sources[0], form, "out0")
    for i in range(len(sources)):
        shutil.rmtree(f"out{i}")  # hundreds of MB


@pytest.mark.parametrize("form", sorted({*FORMATS} - {"nf4", "fp4"}))
def test_other_formats_are_refused(cli: Cli, real_forms: dict[str, Path], form: str) -> None:
    for source in real_forms.values():
        run = _calibrate(cli, COMMANDS[0].line, source, form, "out")
        assert run.code == 2
        assert "--calibrate is for nf4 and fp4" in run.error
        assert not Path("out").exists()
