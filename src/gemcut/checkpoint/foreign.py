"""What people bring that is no checkpoint gemcut reads: told by its file names, and what to take instead.

Nothing is opened here but an adapter's small JSON file; pickled files (.bin, .pth) are never read, since reading them
can run code.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gemcut.files import UnreadableError, read_json, shown

_WHOLE = "take the model's safetensors variant (on the hub: the repository without a suffix), or a GGUF file"
ADAPTER_CONFIG = "adapter_config.json"

# Ends and names of files, what they are, and what to do. The first that a folder has is told.
_KINDS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((".gguf",), "a GGUF file", "give that file's own path"),
    (
        (".bin", ".pth", ".pt", ".ckpt"),
        "pickled PyTorch weights, which can run code and are never opened",
        "take the safetensors variant, or convert them where you trust them: "
        "AutoModelForCausalLM.from_pretrained(…).save_pretrained(OUT) of transformers writes safetensors",
    ),
    (
        (
            ".msgpack",
            "flax_model.msgpack",
            "_METADATA",
            "_CHECKPOINT_METADATA",
            "checkpoint",
            "_sharding",
            "d",
            "ocdbt.process_0",
        ),
        "Flax or Orbax weights (Kaggle's flax variant)",
        "take Kaggle's transformers variant (safetensors), or google/gemma-2-… on the hub",
    ),
    ((".h5", ".keras", "saved_model.pb", ".tflite", ".task"), "TensorFlow, Keras or LiteRT weights", _WHOLE),
    ((".onnx", ".onnx_data"), "an ONNX graph", _WHOLE),
    ((".npz",), "MLX or NumPy weights", _WHOLE),
    ((".sbs",), "weights of gemma.cpp", _WHOLE),
    ((".engine", ".plan"), "a TensorRT engine", _WHOLE),
)


def hint(folder: Path) -> str:
    """ " (it has …: …)" where a folder without safetensors holds something that tells what it is; else ""."""
    try:
        names = sorted(path.name for path in folder.iterdir())
        # Kaggle's archives hold the weights in a folder of their own beside the tokenizer.
        deeper = sorted(f"{d.name}/{path.name}" for d in folder.iterdir() if d.is_dir() for path in d.iterdir())
    except OSError:
        return ""
    if ADAPTER_CONFIG in names:
        return f" ({adapter(folder)})"
    for ends, what, instead in _KINDS:
        for name in [*names, *deeper]:
            last = name.rpartition("/")[2]
            if any(last == end or (end.startswith(".") and last.lower().endswith(end)) for end in ends):
                return f" (it has {name}, {what}; {instead})"
    return ""


def file_hint(path: Path) -> str | None:
    """What one file is that was given alone and is no GGUF file; None where its name tells nothing."""
    if path.suffix in (".safetensors", ".json"):
        return f"{path} is one file of a checkpoint; give its folder, {path.parent}"
    for ends, what, instead in _KINDS[1:]:
        if any(end.startswith(".") and path.name.lower().endswith(end) for end in ends):
            return f"{path} is {what}; {instead}"
    return None


def is_adapter(names: Iterable[str]) -> bool:
    """Whether files of these names are an adapter: no weights of their own beside it."""
    there = set(names)
    whole = any(n.endswith(".safetensors") and not n.startswith("adapter") for n in there)
    return ADAPTER_CONFIG in there and not whole


def adapter(folder: Path) -> str:
    """What an adapter's folder is, of which base, and what to do."""
    try:
        data = read_json(folder / ADAPTER_CONFIG)
    except (OSError, UnreadableError):
        data = {}
    base = data.get("base_model_name_or_path") if isinstance(data, dict) else None
    kind = data.get("peft_type") if isinstance(data, dict) else None
    whose = f"of {shown(base, 100).strip(chr(39))}" if isinstance(base, str) and base else "of a base it does not name"
    return (
        f"{kind[:20] if isinstance(kind, str) else 'LoRA'} adapter {whose}: gemcut does not apply adapters; merge it "
        "into its base first (peft: model.merge_and_unload().save_pretrained(OUT)) and give OUT, or take the base"
    )
