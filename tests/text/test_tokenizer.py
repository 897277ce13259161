"""Token ids against transformers on the real Gemma 2 tokenizer; damaged files and hostile texts."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import AutoTokenizer

import support
from gemcut.errors import CheckpointError, ParameterError, TokenizerError
from gemcut.text import Detokenizer, Tokenizer

many = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
fragments = st.sampled_from(
    [" ", "  ", "\t", "\n", "\n\n", "<h1>", "</td>", "<unused3>", "<eos>", "<end_of_turn>", "▁", "é", "中", "👍🏽", "𒀀"]
)
characters = st.characters(exclude_categories=["Cs"])
texts = st.lists(st.one_of(fragments, st.text(characters, max_size=8)), max_size=20).map("".join)


def test_ids_equal_transformers_on_hard_texts(gemma2: Tokenizer, hf_gemma2: Any, hard_texts: list[str]) -> None:
    for text in hard_texts:
        assert gemma2.encode(text) == hf_gemma2(text).input_ids, repr(text)
        assert gemma2.encode(text, add_bos=False) == hf_gemma2(text, add_special_tokens=False).input_ids, repr(text)


@many
@given(text=texts.filter(lambda text: not text.startswith("<bos>")))
def test_ids_equal_transformers_on_generated_texts(gemma2: Tokenizer, hf_gemma2: Any, text: str) -> None:
    assert gemma2.encode(text) == hf_gemma2(text).input_ids


@many
@given(text=texts)
def test_special_tokens_as_text_equal_transformers(gemma2: Tokenizer, hf_gemma2: Any, text: str) -> None:
    ids = gemma2.encode(text, add_bos=False, parse_special=False)
    # transformers 5 counts <mask> among the special tokens though tokenizer.json does not, hence not in these texts.
    assert ids == hf_gemma2(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert not gemma2.special_ids & set(ids)


def test_special_tokens_typed_by_a_user(gemma2: Tokenizer, gemma3: Tokenizer, hard_texts: list[str]) -> None:
    for tokenizer in (gemma2, gemma3):
        for name in ("<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>"):
            token_id = tokenizer.token_to_id(name)
            assert token_id in tokenizer.special_ids
            assert token_id in tokenizer.encode(f"a{name}b", add_bos=False)
            for text in (name, f"a{name}b", f" {name}\n", name * 3):
                plain = tokenizer.encode(text, add_bos=False, parse_special=False)
                assert not tokenizer.special_ids & set(plain)
                assert tokenizer.decode(plain) == text
        for text in hard_texts:
            assert not tokenizer.special_ids & set(tokenizer.encode(text, add_bos=False, parse_special=False))


def test_the_markers_ids_are_found_by_name(gemma2: Tokenizer, gemma3: Tokenizer) -> None:
    assert (gemma2.start_of_turn_id, gemma2.end_of_turn_id) == (106, 107)
    assert (gemma3.start_of_turn_id, gemma3.end_of_turn_id) == (105, 106)
    for tokenizer in (gemma2, gemma3):
        assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert gemma2.vocab_size == 256_000
    assert gemma3.vocab_size == 262_144


@many
@given(data=st.data())
def test_decode_equals_transformers(gemma2: Tokenizer, hf_gemma2: Any, data: st.DataObject) -> None:
    # 0 to 8 are special and control tokens, 217 to 472 bytes. Not 4: transformers 5 calls <mask> special, the file not.
    token = st.one_of(
        st.sampled_from([0, 1, 2, 3, 5, 7, 106, 107, 139]), st.integers(217, 472), st.integers(5, 255_999)
    )
    ids = data.draw(st.lists(token, max_size=30))
    for skip in (True, False):
        expected = hf_gemma2.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert gemma2.decode(ids, skip_special_tokens=skip) == expected


@many
@given(text=texts.map(lambda text: text.replace("▁", "_")))
def test_text_survives_encode_and_decode(gemma2: Tokenizer, text: str) -> None:
    ids = gemma2.encode(text, add_bos=False, parse_special=False)
    assert gemma2.decode(ids) == text
    assert b"".join(map(gemma2.token_bytes, ids)) == text.encode()


def test_token_bytes_and_names(gemma2: Tokenizer, gemma3: Tokenizer) -> None:
    for tokenizer in (gemma2, gemma3):
        assert tokenizer.token_bytes(_id(tokenizer, "▁the")) == b" the"
        assert tokenizer.token_bytes(_id(tokenizer, "<0xE2>")) == b"\xe2"
        assert tokenizer.token_bytes(tokenizer.bos_id) == b"<bos>"
        assert tokenizer.id_to_token(_id(tokenizer, "▁the")) == "▁the"
        assert tokenizer.token_to_id("no such token") is None
    assert gemma2.token_bytes(226) == b"\t"  # Gemma 2's tokenizer.json has a plain tab in place of <0x09>


def test_exactly_one_bos(gemma2: Tokenizer) -> None:
    plain = gemma2.encode("Hello", add_bos=False)
    assert gemma2.encode("Hello") == [gemma2.bos_id, *plain]
    for text in ("<bos>Hello", "<bos><bos>Hello"):
        with pytest.warns(UserWarning, match="already begins with <bos>") as caught:
            assert gemma2.encode(text) == [gemma2.bos_id, *plain]
        assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gemma2.encode("") == [gemma2.bos_id]
        assert gemma2.encode("<bos>Hello", add_bos=False) == [gemma2.bos_id, *plain]
        assert gemma2.encode("<bos>Hello", parse_special=False).count(gemma2.bos_id) == 1


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "ok \ud83d"])
def test_half_a_surrogate_pair_is_refused(small: Tokenizer, text: str) -> None:
    with pytest.raises(
        ParameterError, match=r"half of a surrogate pair \(U\+D[89ABCDEF]..\) at character \d"
    ) as caught:
        small.encode(text)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # the message itself can be printed


@pytest.mark.parametrize("text", [None, b"bytes", 3, ["list"]])
def test_text_must_be_str(small: Tokenizer, text: Any) -> None:
    with pytest.raises(ParameterError, match="expected str"):
        small.encode(text)


@pytest.mark.parametrize("token_id", [-1, 2**32, 2**40, -(2**70), 1.5, "1", None])
def test_ids_outside_the_vocabulary_are_refused(small: Tokenizer, token_id: Any) -> None:
    for call in (lambda: small.decode([token_id]), lambda: small.token_bytes(token_id)):
        with pytest.raises(ParameterError, match=r"token id .*(not in the vocabulary|expected a whole number)"):
            call()


def test_an_id_that_the_vocabulary_lacks_decodes_to_nothing(gemma2: Tokenizer, hf_gemma2: Any) -> None:
    """Rows that pad an embedding can be sampled; transformers is the reference."""
    ids = [gemma2.bos_id, *gemma2.encode("a €", add_bos=False), 256_003, 10**6, *gemma2.encode(" b", add_bos=False)]
    for skip in (True, False):
        assert gemma2.decode(ids, skip_special_tokens=skip) == hf_gemma2.decode(ids, skip_special_tokens=skip)
    assert gemma2.decode([256_003]) == gemma2.token_text(256_003) == ""
    assert gemma2.token_bytes(256_003) == b""
    detokenizer = Detokenizer(gemma2)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == gemma2.decode(ids)
    with pytest.raises(ParameterError, match="token id 256003 is not in the vocabulary"):
        gemma2.id_to_token(256_003)


def test_ids_may_be_a_tensor(small: Tokenizer) -> None:
    ids = small.encode("the cat", add_bos=False)
    assert small.decode(torch.tensor(ids)) == "the cat"


@pytest.fixture
def _frequent_thread_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_frequent_thread_switches")
def test_both_ways_of_encoding_from_many_threads(gemma2: Tokenizer) -> None:
    wrong: list[object] = []

    def work(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(200):
            parse = generator.random() < 0.5
            try:
                ids = gemma2.encode("a <end_of_turn> b" * generator.randint(1, 20), parse_special=parse)
                gemma2.decode(ids)
                if (gemma2.end_of_turn_id in ids) != parse:
                    wrong.append(parse)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
def test_transformers_loads_what_save_writes(
    gemma2: Tokenizer, gemma3: Tokenizer, hard_texts: list[str], tmp_path: Path
) -> None:
    for name, tokenizer in (("two", gemma2), ("three", gemma3)):
        tokenizer.save(tmp_path / name)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        for text in hard_texts:
            assert loaded(text).input_ids == tokenizer.encode(text), repr(text)
        assert loaded.chat_template == tokenizer.chat_template
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (2, 1, 0)
        again = Tokenizer.from_folder(tmp_path / name)
        assert again.backend.to_str() == tokenizer.backend.to_str()
        assert again.chat_template == tokenizer.chat_template
        assert again.special_ids == tokenizer.special_ids
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_save_where_one_cannot_write(small: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write .*file"):
        small.save(tmp_path / "file")


def test_a_full_disk_leaves_nothing_behind(small: Tokenizer, tmp_path: Path) -> None:
    """A real limit on file size stands for the full disk: the kernel refuses the write in the middle."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from gemcut.text import Tokenizer; from gemcut.errors import CheckpointError\n"
        "tokenizer = Tokenizer.from_folder(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "try: tokenizer.save(sys.argv[2])\n"
        "except CheckpointError as error: print(error); sys.exit(2)\n"
    )
    small.save(tmp_path / "good")
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "good", tmp_path / "full"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("cannot write ")
    assert done.stdout.count("\n") == 1
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["tokenizer_config.json"]


def _broken(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder


def test_missing_and_damaged_folders(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    cases = {
        "truncated": whole[: len(whole) // 2],
        "empty": "",
        "other JSON": '{"hello": 1}',
        "not JSON": "version https://git-lfs.github.com/spec/v1",
        "another vocabulary": Backend(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).to_str(),
        "no bytes": whole.replace("<0xE2>", "<0xZZ>"),
        "no bos": whole.replace("<bos>", "<s>"),
        "other decoder": json.dumps({**json.loads(whole), "decoder": None}),
    }
    for case, content in cases.items():
        _broken(tmp_path, "tokenizer.json", content)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json") as caught:
            Tokenizer.from_folder(tmp_path)
        assert "\n" not in str(caught.value), case
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TokenizerError, match="damaged"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json in .*; download"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json in .*nowhere"):
        Tokenizer.from_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_damaged_tokenizer_config(small: Tokenizer, tmp_path: Path, content: str) -> None:
    small.save(tmp_path)
    _broken(tmp_path, "tokenizer_config.json", content)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(tmp_path)


def test_where_the_chat_template_comes_from(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).chat_template is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    _broken(tmp_path, "tokenizer_config.json", json.dumps({"chat_template": named, "bos_token": {"content": "<bos>"}}))
    assert Tokenizer.from_folder(tmp_path).chat_template == "yes"
    _broken(tmp_path, "chat_template.jinja", "{{ own }}")
    assert Tokenizer.from_folder(tmp_path).chat_template == "{{ own }}"


def test_saved_truncation_and_padding_are_switched_off(small: Tokenizer, tmp_path: Path) -> None:
    backend = Backend.from_str(small.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "the cat the cat the cat"
    assert Tokenizer.from_folder(tmp_path).encode(text) == small.encode(text)


def test_a_marker_that_the_file_does_not_call_special(small: Tokenizer, tmp_path: Path) -> None:
    data = json.loads(small.backend.to_str())
    for token in data["added_tokens"]:
        token["special"] = False
    _broken(tmp_path, "tokenizer.json", json.dumps(data))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.special_ids == {0, 1, 2, 3, 4, 5}
    assert tokenizer.vocab_size == small.vocab_size
    assert 5 not in tokenizer.encode("a<end_of_turn>", parse_special=False)
    assert tokenizer.decode([5]) == ""


def test_truncated_real_tokenizer(tmp_path: Path) -> None:
    source = support.tokenizer_dir()
    shutil.copyfile(source / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    with (source / "tokenizer.json").open("rb") as file:
        (tmp_path / "tokenizer.json").write_bytes(file.read(5_000_000))
    with pytest.raises(TokenizerError, match="damaged"):
        Tokenizer.from_folder(tmp_path)


def test_text_imports_neither_torch_nor_transformers() -> None:
    script = "import sys, gemcut.text; print([m for m in ('torch', 'transformers', 'jax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _id(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id
