"""Tokenizers under test beside transformers' on the same files, and texts that tokenizers get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoTokenizer

import support
from gemcut.text import Tokenizer

Vocabulary = tuple[list[str], list[float], list[int]]

HARD_TEXTS = [
    "",
    " ",
    "The capital of France is Paris.",
    " leading and trailing ",
    *(" " * n + "x" + " " * n for n in (2, 3, 5, 16, 30, 31, 32, 33, 47, 62, 63, 64, 100)),
    *("\t" * n + "x" for n in (1, 2, 3, 31, 32, 40)),
    *("a" + "\n" * n + "b" for n in (1, 2, 3, 30, 31, 32, 65)),
    "mixed \t \n \r\n \t\t  \n\n   end",
    "\r\n\r\n\v\f\x1c\x85\u2028\u2029\u00a0\u2003\u3000\ufeff",
    "<h1>Title</h1><table><tr><td>1</td></tr></table><code> x</code> < h1 > <b><i><u></s>",
    "<div class='a'><span>no</span></div><img src=x><bbox>",
    "def f(x):\n    if x:\n        return {'a': [1, 2.5e-3]}\n\n\n#" + "-" * 77,
    "👨‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪🇫🇷 ❤️ 🫠🪿🫨 🧑🏿‍🚀",
    "日本語の文章です。中文，简体与繁體。한국어 문장입니다。",
    "עברית العربية हिन्दी ไทย ქართული አማርኛ Ελληνικά русский",
    "naïve cafe\u0301 Å\u030a ﬁ ½ ℌ 𝔹 ｆｕｌｌ　ｗｉｄｔｈ",
    "".join(map(chr, range(0, 32))) + "\x7f\x80\x9f\xad",
    "𒀀𒁀 𓀀𓂀 𐍈 𝄞 \U0010fffd \ue000 \ufffd \ufffe\uffff \U000e0041",
    "rare 㐀𠀀𪚥 in the middle 𒀀word",
    "<0x0A><0xE2> <0x09>",
    "▁ ▁▁ a▁b ▁▁▁ x",
    "marks <bos> in the middle <eos><pad><unk>",
    "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "hi<end_of_turn>\n<start_of_turn>model\nsure",
    "<start_of_turn> <START_OF_TURN> <start_of_turn <<end_of_turn>> <end_of_turn",
    "<unused0><unused98><mask>[@BOS@]<2mass>[multimodal]<start_of_image>",
    "0 1 12 123 1234 12345 3.14159 1,000,000 0x1F 1e-9 ²³ ①②",
    "https://example.org/a?b=c&d=%20#e  user@example.org C:\\dir\\file",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 3,
    "=" * 37 + "~" * 41 + "." * 53 + "_" * 29 + "*" * 17 + "ha" * 23,
    "lorem ipsum " * 400,
]


#: Fixtures that take five to twenty seconds, whichever test is the first to ask for them.
SLOW = {"gemma3_vocab", "hf_gemma3", "tuned"}


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def hard_texts() -> list[str]:
    return HARD_TEXTS


@pytest.fixture(scope="session")
def gemma2() -> Tokenizer:
    return Tokenizer.from_folder(support.tokenizer_dir())


@pytest.fixture(scope="session")
def hf_gemma2() -> Any:
    return AutoTokenizer.from_pretrained(support.tokenizer_dir())


@pytest.fixture(scope="session")
def gemma3_vocab() -> Vocabulary:
    fields = gguf.GGUFReader(support.gguf_path()).fields
    tokens, scores, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    return tokens, scores, types


@pytest.fixture(scope="session")
def gemma3(gemma3_vocab: Vocabulary) -> Tokenizer:
    return Tokenizer.from_gguf_vocab(*gemma3_vocab)


@pytest.fixture(scope="session")
def hf_gemma3() -> Any:
    path = support.gguf_path()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="session")
def small_vocab() -> Vocabulary:
    """A whole vocabulary of Gemma's kind in 300 pieces: enough to be valid, quick to write, break and read."""
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    user = ["\n", "\n\n", "  ", "   ", "<b>"]
    normal = ["▁t", "he", "▁the", "▁", *"abcdefgh"]
    normal += [*"ijklmnopqrstuvwxyz", *"ABC.,!<>_/0123456789:[]"]
    tokens = control + user + [f"<0x{byte:02X}>" for byte in range(256)] + normal
    types = [3] * len(control) + [4] * len(user) + [6] * 256 + [1] * len(normal)
    scores = [-1000.0] * (len(control) + len(user)) + [0.0] * 256 + [-float(i) for i in range(len(normal))]
    return tokens, scores, types


@pytest.fixture(scope="session")
def small(small_vocab: Vocabulary) -> Tokenizer:
    return Tokenizer.from_gguf_vocab(*small_vocab)


@pytest.fixture
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("GEMCUT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
