"""The Gemma 2 model card's runnable snippets, as printed, with the import line and the model's name changed."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import support

MODEL = "google/gemma-2-27b-it"
IMPORT = "from transformers import AutoTokenizer, AutoModelForCausalLM"

SINGLE = """
# pip install accelerate
from transformers import AutoTokenizer, AutoModelForCausalLM
import torch

tokenizer = AutoTokenizer.from_pretrained("google/gemma-2-27b-it")
model = AutoModelForCausalLM.from_pretrained(
    "google/gemma-2-27b-it",
    device_map="auto",
    torch_dtype=torch.bfloat16
)

input_text = "Write me a poem about Machine Learning."
input_ids = tokenizer(input_text, return_tensors="pt").to("cuda")

outputs = model.generate(**input_ids)
print(tokenizer.decode(outputs[0]))
"""
FLOAT16 = """
# pip install accelerate
from transformers import AutoTokenizer, AutoModelForCausalLM
import torch

tokenizer = AutoTokenizer.from_pretrained("google/gemma-2-27b-it")
model = AutoModelForCausalLM.from_pretrained(
    "google/gemma-2-27b-it",
    device_map="auto",
    torch_dtype=torch.float16,
    revision="float16",
)

input_text = "Write me a poem about Machine Learning."
input_ids = tokenizer(input_text, return_tensors="pt").to("cuda")

outputs = model.generate(**input_ids)
print(tokenizer.decode(outputs[0]))
"""
BFLOAT16 = """
# pip install accelerate
from transformers import AutoTokenizer, AutoModelForCausalLM

tokenizer = AutoTokenizer.from_pretrained("google/gemma-2-27b-it")
model = AutoModelForCausalLM.from_pretrained(
    "google/gemma-2-27b-it",
    device_map="auto",
    torch_dtype=torch.bfloat16)

input_text = "Write me a poem about Machine Learning."
input_ids = tokenizer(input_text, return_tensors="pt").to("cuda")

outputs = model.generate(**input_ids)
print(tokenizer.decode(outputs[0]))
"""
FLOAT32 = """
# pip install accelerate
from transformers import AutoTokenizer, AutoModelForCausalLM

tokenizer = AutoTokenizer.from_pretrained("google/gemma-2-27b-it")
model = AutoModelForCausalLM.from_pretrained(
    "google/gemma-2-27b-it",
    device_map="auto"
)

input_text = "Write me a poem about Machine Learning."
input_ids = tokenizer(input_text, return_tensors="pt").to("cuda")

outputs = model.generate(**input_ids)
print(tokenizer.decode(outputs[0]))
"""
CHAT = """
from transformers import AutoTokenizer, AutoModelForCausalLM
import transformers
import torch

model_id = "google/gemma-2-27b-it"
dtype = torch.bfloat16

tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(
    model_id,
    device_map="cuda",
    torch_dtype=dtype,
)

chat = [
    { "role": "user", "content": "Write a hello world program" },
]
prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
"""
CHAT_PROMPT = """<bos><start_of_turn>user
Write a hello world program<end_of_turn>
<start_of_turn>model
"""
CHAT_GENERATE = """
inputs = tokenizer.encode(prompt, add_special_tokens=False, return_tensors="pt")
outputs = model.generate(input_ids=inputs.to(model.device), max_new_tokens=150)
print(tokenizer.decode(outputs[0]))
"""


def ported(snippet: str, folder: Path | str = MODEL, imports: str = "") -> str:
    """The snippet with its import line changed. The card's bf16 snippet forgets ``import torch``, hence ``imports``."""
    assert IMPORT in snippet
    changed = snippet.replace(IMPORT, f"from gemcut import AutoTokenizer, AutoModelForCausalLM{imports}")
    return changed.replace("import transformers\n", "import gemcut\n").replace(MODEL, str(folder))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this machine has no GPU", "ignore:.* has no effect")
@pytest.mark.parametrize(
    ("snippet", "imports", "dtype"),
    [
        (SINGLE, "", torch.bfloat16),
        (FLOAT16, "", torch.float16),
        (BFLOAT16, "; import torch", torch.bfloat16),
        (FLOAT32, "", torch.float32),
    ],
    ids=["single", "float16", "bfloat16", "float32"],
)
def test_snippet(snippet: str, imports: str, dtype: torch.dtype, folder: Path, capsys: Any) -> None:
    names: dict[str, Any] = {}
    exec(ported(snippet, folder, imports), names)
    assert names["model"].dtype == dtype
    assert names["outputs"].shape == (1, 64)  # to the end of the tiny context, not transformers' 20 tokens
    assert capsys.readouterr().out.startswith("<bos>Write me a poem about Machine Learning.")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this machine has no GPU")
def test_float32_snippet_prints_what_transformers_would(
    folder: Path, capsys: Any, reference: Any, reference_tokenizer: Any
) -> None:
    exec(ported(FLOAT32, folder), {})
    inputs = reference_tokenizer("Write me a poem about Machine Learning.", return_tensors="pt")
    expected = reference.generate(**inputs, max_length=64, do_sample=False)
    assert capsys.readouterr().out == reference_tokenizer.decode(expected[0]) + "\n"


def test_chat_snippets(reference: Any, tmp_path: Path, capsys: Any) -> None:
    # The card asks for 150 new tokens, which the 64 of the other tests' context do not hold.
    reference.config.max_position_embeddings = 256
    folder = support.save_checkpoint(tmp_path / "chat", reference, tokenizer=True)
    reference.config.max_position_embeddings = 64
    names: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        exec(ported(CHAT, folder), names)
    said = [str(warning.message) for warning in seen if "no GPU" in str(warning.message)]
    assert len(said) == (0 if torch.cuda.is_available() else 1)
    assert names["model"].device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert names["prompt"] == CHAT_PROMPT
    exec(CHAT_GENERATE, names)
    assert names["inputs"].tolist()[0].count(2) == 1
    assert names["inputs"].shape == (1, 14)
    assert names["outputs"].shape == (1, 14 + 150)
    assert capsys.readouterr().out.startswith(CHAT_PROMPT)


@pytest.mark.slow
def test_float16_snippet_from_the_hub_cache(folder: Path, reference: Any, tmp_path: Path) -> None:
    """The snippet with the card's own model name, as a program, offline, the revision found in the hub's cache."""
    repo = tmp_path / "hub" / f"models--{MODEL.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    for name, commit in (("main", "a" * 40), ("float16", "b" * 40)):
        (repo / "refs" / name).write_text(commit)
        (repo / "snapshots" / commit).mkdir(parents=True)
        for file in folder.iterdir():
            (repo / "snapshots" / commit / file.name).symlink_to(file)
    # Only the revision that is asked for has weights.
    (repo / "snapshots" / ("a" * 40) / "model.safetensors").unlink()
    program = tmp_path / "program.py"
    program.write_text(ported(FLOAT16) + "print(model.dtype, model.gemma.source.revision)\n")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(support.ROOT / "src"), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<bos>Write me a poem about Machine Learning.")
    assert done.stdout.endswith(f"torch.float16 {'b' * 40}\n")
