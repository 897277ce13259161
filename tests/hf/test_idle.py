"""Options that change nothing: transformers gives the same with and without them, and gemcut warns and goes on."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import support
from gemcut import hf
from gemcut.errors import CapacityError, ParameterError, UnsupportedError
from gemcut.hf.placement import byte_size, placement

#: transformers sets up a GPU for caches that are offloaded, so those are not run beside it.
IDS = torch.tensor([[2, 10, 11, 12, 13], [2, 20, 21, 22, 23]])
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def reference() -> Any:
    """A network alone: reading a tokenizer takes longer than all else here."""
    return support.hf_model(support.tiny_config())


@pytest.fixture(scope="module")
def folder(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.save_checkpoint(tmp_path_factory.mktemp("idle") / "m", reference, use_cache=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder)


def idle(seen: Any) -> int:
    """How many warnings say that an option changes nothing; there may be others, of the machine."""
    return sum("changes nothing" in str(one.message) for one in seen)


#: (argument, value, words of the warning)
GENERATE: list[tuple[str, Any, str]] = [
    ("use_cache", False, "its own paged cache"),
    ("cache_implementation", "static", "its own paged cache"),
    ("cache_implementation", "sliding_window", "its own paged cache"),
    ("max_cache_len", 64, "grows with the text"),
    ("prefill_chunk_size", 2, "in chunks by itself"),
    ("early_stopping", True, "one beam"),
    ("length_penalty", 2.0, "one beam"),
]


@pytest.mark.parametrize(("name", "value", "words"), GENERATE)
def test_generate_warns_once_and_gives_what_transformers_gives(
    name: str, value: Any, words: str, model: Any, reference: Any
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        theirs = reference.generate(IDS, **GREEDY, **{name: value})
    with pytest.warns(UserWarning, match=f"{name}={value!r} changes nothing: .*{words}") as seen:
        ours = model.generate(IDS, **GREEDY, **{name: value})
    assert [str(one.filename) for one in seen] == [__file__]
    assert torch.equal(ours, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(IDS, **GREEDY, generation_config=hf.GenerationConfig(**{name: value}))


def test_in_a_checkpoints_generation_config(folder: Path, tmp_path: Path, reference: Any) -> None:
    shutil.copytree(folder, tmp_path / "m")
    file = tmp_path / "m" / "generation_config.json"
    stored = json.loads(file.read_text()) | {"cache_implementation": "static", "use_cache": False}
    file.write_text(json.dumps(stored))
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with pytest.warns(UserWarning, match="changes nothing") as seen:
        ours = model.generate(IDS, **GREEDY)
    assert idle(seen) == 2
    assert torch.equal(ours, reference.generate(IDS, **GREEDY))


def test_what_would_change_the_tokens_is_refused_still(model: Any) -> None:
    for name, value in (("cache_implementation", "quantized"), ("cache_implementation", "fast"), ("num_beams", 2)):
        with pytest.raises(UnsupportedError, match=f"{name}={value!r}"):
            model.generate(IDS, **GREEDY, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("trust_remote_code", True, "runs no code"),
        ("offload_folder", "somewhere", "nothing is offloaded"),
        ("offload_state_dict", True, "one tensor after the other"),
        ("offload_buffers", True, "nothing is offloaded"),
        ("low_cpu_mem_usage", False, "one tensor after the other"),
        ("use_cache", False, "its own paged cache"),
        ("max_memory", {"cpu": "1GB"}, "fits its one device"),
    ],
)
def test_loading_warns_once(name: str, value: Any, words: str, folder: Path, model: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"{name}.* changes nothing.*{words}") as seen:
        loaded = hf.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **{name: value})
    assert idle(seen) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* changes nothing")
        hf.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **{"low_cpu_mem_usage": True, name: value})
    assert torch.equal(loaded.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
    assert not Path("somewhere").exists()


def test_code_of_a_checkpoint_is_refused_where_it_would_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    for file, name, load in (
        ("config.json", "AutoModelForCausalLM", hf.AutoModelForCausalLM.from_pretrained),
        ("tokenizer_config.json", "AutoTokenizer", hf.AutoTokenizer.from_pretrained),
    ):
        if name == "AutoTokenizer":
            shutil.copyfile(support.tokenizer_dir() / "tokenizer.json", tmp_path / "m" / "tokenizer.json")
        path = tmp_path / "m" / file
        stored = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(stored | {"auto_map": {name: "theirs.Own"}}))
        with pytest.raises(UnsupportedError, match=f"{file} names code of its own for {name}"):
            load(tmp_path / "m", trust_remote_code=True)
        path.write_text(json.dumps(stored))
        with pytest.warns(UserWarning, match=f"{name}.*trust_remote_code=True changes nothing") as seen:
            load(tmp_path / "m", trust_remote_code=True)
        assert idle(seen) == 1
        with pytest.raises(UnsupportedError, match="trust_remote_code='yes'"):
            load(tmp_path / "m", trust_remote_code="yes")


def test_less_memory_than_the_model_needs_is_refused_with_numbers(folder: Path, reference: Any) -> None:
    def load(limit: Any, **options: Any) -> Any:
        return hf.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", max_memory={"cpu": limit}, **options)

    weights = sum(p.numel() * 4 for p in reference.parameters())
    with pytest.warns(UserWarning, match="max_memory"):
        load(weights)
    words = (
        f"need {weights / 1e6:.3f} MB in float32; {(weights - 1) / 1e6:.3f} MB are allowed on cpu (max_memory): choose"
    )
    with pytest.raises(CapacityError, match=re.escape(words)):
        load(weights - 1)
    load(weights - 1, dtype=torch.bfloat16)  # half as much
    with pytest.raises(CapacityError, match="max_memory"):
        load("1 KiB", quantization_config=hf.BitsAndBytesConfig(load_in_4bit=True))
    hf.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", max_memory={0: 1, "disk": "1TB"})


@pytest.mark.parametrize("size", ["1MiB", "1 GB", "2.5GiB", "10KB", 77, 0])
def test_sizes_are_accelerates(size: Any) -> None:
    from accelerate.utils.modeling import convert_file_size_to_int

    theirs = convert_file_size_to_int(size.replace(" ", "") if isinstance(size, str) else size)
    assert byte_size("max_memory", size) == theirs


@pytest.mark.parametrize("size", ["much", "-1GB", -1, True, 1.5, None, "9" * 400 + "GB"])
def test_what_is_no_size(size: Any) -> None:
    with pytest.raises(ParameterError, match=r"max_memory is .*expected a number of bytes"):
        byte_size("max_memory", size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.filterwarnings("ignore:.*no GPU|.*max_memory")
def test_spellings_of_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for one in (None, "auto", "cpu", "cuda", "cuda:0", 0, torch.device("cpu"), torch.device("cuda:0")):
        assert placement(one)[0] == cpu
        assert placement({"": one})[0] == cpu
    assert placement({"model": "cpu", "lm_head": torch.device("cpu")})[0] == cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu, other = torch.device("cuda", 0), torch.device("cuda", 1)
    for one in ("auto", "cuda", "cuda:0", 0, torch.device("cuda"), {"": 0}, {"model": 0, "lm_head": "cuda:0"}):
        assert placement(one)[0] == gpu
    for one in ("cuda:1", 1, {"": torch.device("cuda:1")}):
        assert placement(one)[0] == other
    assert placement("auto", {0: "1GB", 1: "2GB"}) == (gpu, 10**9)
    assert placement("auto", {0: 0, 1: "2GB", "cpu": "9GB"}) == (other, 2 * 10**9)
    assert placement("auto", {5: "1GB", "cpu": "9GB"}) == (cpu, 9 * 10**9)
    assert placement(0, {1: "2GB"}) == (gpu, None)
    for several in ("balanced_low_0", "disk", {"a": 0, "b": 1}, {"a": 0, "b": "disk"}):
        with pytest.raises(UnsupportedError, match=r'device_map.*use "auto", "balanced", "cpu", "cuda", "cuda:N"'):
            placement(several)


@pytest.mark.parametrize(
    ("device_map", "max_memory", "words"),
    [
        ("everywhere", None, "device_map: device is 'everywhere'"),
        (True, None, "device_map: device is True"),
        (-1, None, "device_map: device is -1"),
        (1.5, None, "device_map: device is 1.5"),
        ({}, None, "device_map is empty"),
        ("cpu", "10GB", "max_memory is of type str"),
        ("cpu", {"cpu": "much"}, r"max_memory\['cpu'\] is 'much'"),
        ("cpu", {"cpu": -1}, r"max_memory\['cpu'\] is -1"),
        ("cpu", {"cpu": True}, r"max_memory\['cpu'\] is True"),
        ("cpu", {"the gpu": "1GB"}, r"max_memory\['the gpu'\]: expected 'cpu' or the number"),
        ("cpu", {"mps": "1GB"}, r"max_memory\['mps'\]: expected 'cpu' or the number"),
        ("cpu", {-1: "1GB"}, r"max_memory\[-1\]: expected 'cpu' or the number"),
    ],
)
def test_places_that_are_none(device_map: Any, max_memory: Any, words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        placement(device_map, max_memory)


def test_transformers_takes_these_cache_implementations() -> None:
    """Each name that transformers has is known here: done, warned of or, where it changes the tokens, refused."""
    known = transformers.generation.configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    idle, done = hf.options.IDLE["cache_implementation"][0], hf.options.FIXED["cache_implementation"][0]
    assert set(known) - {*idle, *done} == {"quantized"}
