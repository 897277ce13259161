"""AutoTokenizer and AutoModelForCausalLM: where programs written for transformers begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gemcut.checkpoint.resolve import checked_name, resolve
from gemcut.errors import CapacityError, ParameterError, UnsupportedError
from gemcut.gemma import Gemma
from gemcut.hf.common import CODE_IDLE, NO_CODE, Refusal, refuse, usable_revision, warn_once
from gemcut.hf.loading import LOAD, LOAD_IDLE, wanted_dtype
from gemcut.hf.model import GemmaForCausalLM
from gemcut.hf.options import GenerationConfig
from gemcut.hf.placement import SEVERAL, gpu_rooms, gpus_for, placement
from gemcut.hf.quantization_config import BitsAndBytesConfig, read_quantization_config
from gemcut.hf.tokenizer import GemmaTokenizer
from gemcut.loading import effective_quantization
from gemcut.paths import expand
from gemcut.placement.devices import parse_dtype
from gemcut.placement.memory import check_memory
from gemcut.placement.plan import MemoryPlan
from gemcut.text import Tokenizer
from gemcut.text import files as text_files

#: Tokens of a request for which there must be room beside the weights where "auto" chooses GPUs.
_CONTEXT = 1024
_TOKENIZER: dict[str, Refusal] = {
    "force_download": ((False,), "delete the cached files instead"),
    "subfolder": (("",), "give the folder's own path"),
    "gguf_file": ((), "give the .gguf file's own path as the name"),
    "proxies": ((), "set HTTPS_PROXY instead"),
    "tokenizer_type": ((), "there is one tokenizer"),
    "config": ((), "the checkpoint's own is read"),
    "resume_download": ((True, False), ""),
    "legacy": ((True, False), ""),
    "clean_up_tokenization_spaces": ((False,), "Gemma's spaces are exact"),
}


class AutoTokenizer:
    """``AutoTokenizer.from_pretrained`` makes a `GemmaTokenizer`."""

    def __init__(self) -> None:
        raise ParameterError("AutoTokenizer is not built directly; use AutoTokenizer.from_pretrained(name)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        use_fast: bool = True,
        padding_side: str | None = None,
        truncation_side: str | None = None,
        model_max_length: int | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        **others: Any,
    ) -> GemmaTokenizer:
        """The tokenizer of a checkpoint: folder, ``.gguf`` file, short name or hub id.

        Args:
            pretrained_model_name_or_path: the checkpoint; no weights are read or downloaded.
            revision, token, cache_dir, local_files_only: for the hub, as in ``Gemma.load``.
            use_fast: there is one tokenizer; False warns.
            padding_side, truncation_side: "left" or "right"; by default what the checkpoint says, or left and right.
            model_max_length: the length ``truncation=True`` cuts at.
            add_bos_token, add_eos_token: whether encoding puts ``<bos>`` in front and ``<eos>`` behind.

        Raises:
            UnsupportedError: a known option of transformers that gemcut does not have.
            ParameterError: an unknown one.
            GemcutError: the checkpoint cannot be found or read.
        """
        own_code = others.pop("trust_remote_code", None)
        refuse("AutoTokenizer.from_pretrained", others, _TOKENIZER)
        if not use_fast:
            warn_once("use_fast=False has no effect: gemcut has one tokenizer, with the same ids")
        name = pretrained_model_name_or_path
        folder = expand(checked_name(name))
        if (folder / "tokenizer.json").is_file():  # also a folder that holds a tokenizer alone
            usable_revision(name, revision)
            tokenizer = Tokenizer.from_folder(folder)
        else:
            source = resolve(
                name,
                revision=usable_revision(name, revision),
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                weights=False,
            )
            tokenizer, folder = source.tokenizer(), source.path
        stored = text_files.read_json_object(folder / "tokenizer_config.json") if folder.is_dir() else {}
        if own_code is not None:
            _check_code(own_code, folder / "tokenizer_config.json", cls.__name__)
        given = {
            "padding_side": padding_side,
            "truncation_side": truncation_side,
            "model_max_length": model_max_length,
            "add_bos_token": add_bos_token,
            "add_eos_token": add_eos_token,
        }
        options: dict[str, Any] = {key: stored.get(key) if value is None else value for key, value in given.items()}
        named = {key: value for key, value in options.items() if value is not None}
        return GemmaTokenizer(tokenizer, name_or_path=str(name), **named)


class AutoModelForCausalLM:
    """``AutoModelForCausalLM.from_pretrained`` makes a `GemmaForCausalLM`."""

    def __init__(self) -> None:
        raise ParameterError("AutoModelForCausalLM is not built directly; use from_pretrained(name)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device_map: Any = None,
        max_memory: Any = None,
        torch_dtype: str | torch.dtype | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        attn_implementation: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        generation_config: GenerationConfig | None = None,
        quantization_config: BitsAndBytesConfig | dict[str, Any] | None = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool | None = None,
        **others: Any,
    ) -> GemmaForCausalLM:
        """Load a model: folder, ``.gguf`` file, short name or hub id.

        Args:
            pretrained_model_name_or_path: the checkpoint.
            device_map: "auto" takes one GPU if the model fits there, else splits every layer over the fewest that it
                fits on; "balanced" over as many as divide it; "sequential" takes the first GPU alone. "cuda",
                "cuda:N", a number, "cpu" or {"": device} take that device; None the CPU, as in transformers. A GPU
                that the machine does not have is replaced by the CPU, with one warning.
            max_memory: bytes by device, as in {0: "20GB", "cpu": "30GB"}. Where the weights need more than is allowed,
                the model is refused before anything is loaded.
            torch_dtype, dtype: compute dtype under either name; "auto" is the checkpoint's own. Skipped, it is
                float32, as the Gemma 2 model card says (transformers 5 takes the checkpoint's own); for a quantized
                model it is the checkpoint's own.
            revision, token, cache_dir, local_files_only: for the hub, as in ``Gemma.load``.
            attn_implementation: name of an attention implementation; None takes the best there is.
            generation_config: used in place of the checkpoint's.
            quantization_config: cut the linear layers while loading: a BitsAndBytesConfig (transformers' own works
                too) or its dictionary. A checkpoint that is quantized already keeps its own numbers: a config of the
                same format then only chooses the compute dtype, one of another format is refused.
            load_in_4bit, load_in_8bit: the same as ``BitsAndBytesConfig(load_in_4bit=True)``, as in transformers 4.
            others: transformers' other arguments; refused by name unless they change nothing.

        Raises:
            UnsupportedError: a known option that gemcut does not have (several devices, …).
            ParameterError: an unknown one, or torch_dtype and dtype that differ.
            GemcutError: the checkpoint cannot be found, read, or held in memory.
        """
        own_code = others.pop("trust_remote_code", None)
        refuse("AutoModelForCausalLM.from_pretrained", others, LOAD, LOAD_IDLE)
        attention = "auto" if attn_implementation is None else attn_implementation
        if not isinstance(attention, str):
            raise ParameterError(f"attn_implementation is of type {type(attention).__name__}; expected a name")
        config = read_quantization_config(
            quantization_config, {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
        )
        spec = None if config is None else config.to_quantization()
        device, allowed = placement(device_map, max_memory)
        compute = wanted_dtype(torch_dtype, dtype, default=torch.float32 if config is None else "auto")
        where: dict[str, Any] = {
            "revision": usable_revision(pretrained_model_name_or_path, revision),
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        count = 1
        several = (
            isinstance(device_map, str)
            and device_map in SEVERAL
            and device.type == "cuda"
            and torch.cuda.device_count() > 1
        )
        try:
            if own_code is not None or allowed is not None or several:
                source = resolve(pretrained_model_name_or_path, weights=False, **where)
                if own_code is not None:
                    _check_code(own_code, source.path / "config.json", cls.__name__)
                stored = parse_dtype(source.config().torch_dtype, torch.bfloat16)
                kind, cut = parse_dtype(compute, stored), effective_quantization(source, spec)
                if several:
                    plan = MemoryPlan.make(
                        source.config(),
                        dtype=str(kind).removeprefix("torch."),
                        quantization=cut,
                        context=min(_CONTEXT, source.config().max_position_embeddings),
                    )
                    first, count = gpus_for(device_map, plan, gpu_rooms(max_memory), kind)
                    device = torch.device("cuda", first)
                if allowed is not None and count == 1:
                    check_memory(source, kind, device, cut, allowed=allowed)
            gemma = Gemma.load(
                pretrained_model_name_or_path,
                dtype=compute,
                quantization=spec,
                device=device,
                gpus=count,
                attn_implementation=attention,
                **where,
            )
        except CapacityError as error:
            raise error.at("facade") from None
        if max_memory and count == 1:
            warn_once("max_memory changes nothing: the whole model fits its one device", key="max_memory")
        model = GemmaForCausalLM(gemma, str(pretrained_model_name_or_path), generation_config)
        if device_map is not None:
            model.hf_device_map = {"": list(range(count)) if count > 1 else device.index if device.index is not None
                                   else device.type}  # fmt: skip
        return model


def _check_code(trust: object, file: Path, name: str) -> None:
    """What trust_remote_code means: nothing, with a warning, unless ``file`` names code of its own for an Auto class.

    Raises UnsupportedError there, since transformers would run that code, which may compute something else.
    """
    own = text_files.read_json_object(file).get("auto_map") if trust and file.parent.is_dir() else None
    if isinstance(own, dict) and own.get(name):
        raise UnsupportedError(
            f"trust_remote_code={trust}: {file} names code of its own for {name} (auto_map), and {NO_CODE}; leave "
            "trust_remote_code out to take gemcut's own"
        )
    option = {"trust_remote_code": trust}
    refuse(
        f"{name}.from_pretrained", option, {"trust_remote_code": ((False,), NO_CODE)}, {"trust_remote_code": CODE_IDLE}
    )
