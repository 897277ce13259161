"""Loading, moving and saving a model: what transformers' arguments mean here."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gemcut.checkpoint.write import save_folder
from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError, ParameterError, UnsupportedError
from gemcut.gemma import Gemma
from gemcut.hf.common import CODE_IDLE, NO_CODE, Idle, Refusal
from gemcut.hf.missing import missing
from gemcut.hf.placement import byte_size
from gemcut.hf.public_names import CONFIG
from gemcut.loading import export_network, move_network
from gemcut.placement.devices import parse_dtype

_DEVICES = "a model is on one device in this version"
_OFFLOAD = "nothing is offloaded in this version"
_ANY = (True, False)

#: Arguments of from_pretrained beside those it names.
LOAD: dict[str, Refusal] = {
    "low_cpu_mem_usage": ((True,), "expected True or False"),  # always so
    "use_safetensors": ((True,), "only safetensors and GGUF are read; pickled weights can run code"),
    "weights_only": ((True,), "gemcut reads weights alone"),
    "force_download": ((False,), "delete the cached files instead"),
    "resume_download": (_ANY, ""),
    "ignore_mismatched_sizes": ((False,), "every tensor must fit"),
    "output_loading_info": ((False,), "a checkpoint either fits exactly or is refused"),
    "use_auth_token": ((), "use token= instead"),
    "use_cache": ((True,), "expected True or False"),
    "config": ((), "the checkpoint's own config.json is read"),
    "state_dict": ((), "save the weights as a checkpoint folder first"),
    "gguf_file": ((), "give the .gguf file's own path as the name"),
    "subfolder": (("",), "give the folder's own path"),
    "variant": ((), "use revision= to choose other files"),
    "proxies": ((), "set HTTPS_PROXY instead"),
    "mirror": ((), "set HF_ENDPOINT instead"),
    "from_tf": ((False,), "only safetensors and GGUF are read"),
    "from_flax": ((False,), "only safetensors and GGUF are read"),
    "offload_folder": ((), _OFFLOAD),
    "offload_state_dict": ((False,), _OFFLOAD),
    "offload_buffers": ((False,), _OFFLOAD),
    "tp_plan": ((), _DEVICES),
    "tp_size": ((1,), _DEVICES),
    "device_mesh": ((), _DEVICES),
    "distributed_config": ((), _DEVICES),
    "adapter_name": ((), "adapters are not in this version"),
    "adapter_kwargs": ((), "adapters are not in this version"),
    "use_kernels": ((False,), "no kernels are taken from the hub"),
    "allow_all_kernels": ((False,), "no kernels are taken from the hub"),
    "kernel_config": ((), "no kernels are taken from the hub"),
    "key_mapping": ((), "tensor names are fixed"),
    "experts_implementation": ((), "Gemma 2 has no experts"),
    "fusion_config": ((), "gemcut fuses what it can by itself"),
    "disable_mmap": ((False,), "files are memory-mapped"),
    "tqdm_class": ((), "the progress bar is gemcut's own"),
}
_STREAMED = "gemcut reads one tensor after the other, straight to its device"
_WHOLE = "nothing is offloaded, the whole model is on its device"
#: Of these, the values with which transformers gives the same model.
LOAD_IDLE: dict[str, Idle] = {
    "low_cpu_mem_usage": ((False,), _STREAMED),
    "weights_only": ((False,), "no file is unpickled, weights alone are read"),
    "use_cache": ((False,), "gemcut keeps keys and values in its own paged cache; the tokens are the same"),
    "offload_folder": ((str, Path), _WHOLE),
    "offload_state_dict": ((True,), _STREAMED),
    "offload_buffers": ((True,), _WHOLE),
    "disable_mmap": ((True,), _STREAMED),
}
#: Arguments of the forward call beside those it names.
FORWARD: dict[str, Refusal] = {
    "position_ids": ((), "positions follow from attention_mask"),
    "past_key_values": ((), "generate keeps keys and values itself"),
    "inputs_embeds": ((), "give input_ids"),
    "use_cache": ((False,), "the forward call returns no keys and values"),
    "cache_position": ((), "the forward call has no cache"),
    "token_type_ids": ((), "Gemma has no token types"),
    "output_attentions": ((False,), "attention weights are never whole in memory"),
    "return_dict": ((True,), "use .to_tuple() on the output"),
    "num_items_in_batch": ((), "divide the loss yourself"),
}
#: Arguments of generate that are no fields of GenerationConfig.
CALL: dict[str, Refusal] = {
    "logits_processor": ((), "use the options of GenerationConfig"),
    "stopping_criteria": ((), "use eos_token_id, stop_strings, max_new_tokens or max_time"),
    "prefix_allowed_tokens_fn": ((), "constrained generation is not in this version"),
    "synced_gpus": ((False,), "a model is on one device in this version"),
    "assistant_model": ((), "assisted generation is not in this version"),
    "assistant_tokenizer": ((), "assisted generation is not in this version"),
    "negative_prompt_ids": ((), "guidance is not in this version"),
    "negative_prompt_attention_mask": ((), "guidance is not in this version"),
    "custom_generate": ((), "gemcut runs no code from the hub"),
    "trust_remote_code": ((False,), NO_CODE),
    "use_model_defaults": ((True,), "change model.generation_config instead"),
    "inputs_embeds": ((), "give input_ids"),
    "position_ids": ((), "positions follow from attention_mask"),
    "past_key_values": ((), "a prompt seen before is found in the cache by itself"),
    "token_type_ids": ((), "Gemma has no token types"),
}
#: Of these, the values with which transformers gives the same tokens.
CALL_IDLE: dict[str, Idle] = {
    "synced_gpus": ((True,), "a model is on one device"),
    "trust_remote_code": CODE_IDLE,
}


def wanted_dtype(
    torch_dtype: str | torch.dtype | None, dtype: str | torch.dtype | None, *, default: str | torch.dtype
) -> str | torch.dtype:
    """The dtype under either of its two names; ``default`` where neither is given."""
    if torch_dtype is None or dtype is None:
        either = torch_dtype if dtype is None else dtype
        return default if either is None else either
    same = torch_dtype == dtype == "auto" or (
        "auto" not in (torch_dtype, dtype)
        and parse_dtype(torch_dtype, torch.float32) == parse_dtype(dtype, torch.float32)
    )
    if not same:
        raise ParameterError(f"torch_dtype={torch_dtype} contradicts dtype={dtype}; they are the same option, give one")
    return dtype


def moved(gemma: Gemma, device: torch.device) -> Gemma:
    """The same model on another device, its weights moved one at a time, with a fresh cache."""
    if gemma.loop.busy:
        raise ParameterError("the model is still generating; wait for it, or cancel it, before moving it")
    result = Gemma(
        move_network(gemma.model, device),
        gemma._tokenizer,
        device,
        engine=gemma.engine.config,
        generation_config=gemma.generation_config,
        source=gemma.source,
    )
    result.load_seconds = gemma.load_seconds
    return result


def shard_bytes(size: int | str) -> int:
    """Bytes from "5GB", "500MB", "2GiB" or a number. Raises ParameterError where they are none."""
    number = byte_size("max_shard_size", size)
    if number < 1:
        raise ParameterError(f"max_shard_size is {size!r}; expected at least one byte")
    return number


def save(gemma: Gemma, folder: Path, max_shard_bytes: int, generation_config: dict[str, Any]) -> None:
    """Write the model into ``folder``. A model in Hugging Face layout that is there is replaced; other files stay."""
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        raise CheckpointError(f"{folder} already holds a model ({ggufs[0].name}); choose another name or remove it")
    tensors, cut = export_network(gemma.model), gemma.model.quantization
    if not folder.is_dir() or not any(folder.iterdir()):
        save_folder(
            folder, gemma.config, tensors, None, max_shard_bytes, generation_config=generation_config, quantization=cut
        )
        return
    part = folder / f".model.{os.getpid()}"
    try:
        save_folder(
            part, gemma.config, tensors, None, max_shard_bytes, generation_config=generation_config, quantization=cut
        )
        # Of the old model config.json goes first, of the new one it comes last: where it is, everything is. Weights
        # that are still mapped into memory stay readable: their files are replaced and not written over.
        (folder / "config.json").unlink(missing_ok=True)
        for old in folder.iterdir():
            if _WEIGHTS.fullmatch(old.name):
                old.unlink()
        for file in sorted(part.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


#: Files of a model in Hugging Face layout that hold its weights.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


class ModelConfig:
    """A checkpoint's config.json as attributes, under transformers' names. Read-only."""

    def __init__(self, config: GemmaConfig, dtype: torch.dtype, name_or_path: str) -> None:
        values = {**config.to_dict(), "torch_dtype": dtype, "dtype": dtype, "name_or_path": name_or_path}
        object.__setattr__(self, "_values", {**values, "_name_or_path": name_or_path})

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values", {})
        if name not in values:
            raise missing(self, name, CONFIG)
        return values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnsupportedError(
            f"config.{name} cannot be changed: the network is built; edit config.json and load again"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __repr__(self) -> str:
        return f"ModelConfig({self.to_dict()})"

    @property
    def is_encoder_decoder(self) -> bool:
        """Always False."""
        return False

    def get_text_config(self, *args: Any, **options: Any) -> ModelConfig:
        """This config: the model is a text model."""
        return self

    def to_json_string(self, use_diff: bool = True) -> str:
        """``to_dict`` as JSON; ``use_diff`` changes nothing."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_diff_dict(self) -> dict[str, Any]:
        """``to_dict``: config.json is written whole."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        values = {k: v for k, v in self.__dict__["_values"].items() if k not in ("dtype", "name_or_path")}
        return {**values, "torch_dtype": str(values["torch_dtype"]).removeprefix("torch.")}
