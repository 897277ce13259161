"""The half of the model that is looked at: transformers' and torch's methods that list modules, parameters, state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from torch import Tensor, nn

from gemcut.errors import ParameterError, UnsupportedError
from gemcut.gemma import Gemma
from gemcut.hf.missing import missing
from gemcut.hf.modules import CausalLM, module_tree
from gemcut.hf.outputs import BaseModelOutput
from gemcut.hf.public_names import MODEL
from gemcut.prompts import refuse_pickle

_COMPILE = f"torch.compile: {MODEL['compile']}"


class ModuleAccess:
    """Names, shapes and numbers as in transformers, to be read; see `gemcut.hf.modules`."""

    gemma: Gemma

    def __getattr__(self, name: str) -> Any:  # only called where there is no such attribute
        if name.startswith("_torchdynamo"):
            raise UnsupportedError(_COMPILE)
        raise missing(self, name, MODEL)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("forward", "__call__"):  # model.forward = torch.compile(model.forward)
            raise UnsupportedError(f"model.{name} cannot be replaced; {_COMPILE}")
        object.__setattr__(self, name, value)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_pickle(
            "a GemmaForCausalLM",
            "its engine and cache belong to this process; call from_pretrained in each process",
        )

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.gemma.config.vocab_size

    @property
    def _tree(self) -> CausalLM:
        held: tuple[Gemma, CausalLM] | None = self.__dict__.get("_held_tree")
        if held is None or held[0] is not self.gemma:  # to() makes another
            held = self.gemma, module_tree(self.gemma, self._run_decoder)
            object.__setattr__(self, "_held_tree", held)
        return held[1]

    def _run_decoder(self, *args: Any, output_hidden_states: bool = False, **options: Any) -> BaseModelOutput:
        if options.get("labels") is not None or options.get("logits_to_keep"):
            raise ParameterError("model.model gives hidden states alone; labels and logits_to_keep are for model(...)")
        out = self(*args, output_hidden_states=True, **options)  # type: ignore[operator]
        return BaseModelOutput(out.hidden_states[-1], out.hidden_states if output_hidden_states else None)

    @property
    def model(self) -> nn.Module:
        """The network without its head; calling it gives ``last_hidden_state``."""
        return self.get_submodule("model")

    @property
    def lm_head(self) -> nn.Module:
        """The output head, which shares the embedding."""
        return self.get_submodule("lm_head")

    base_model = model

    def get_decoder(self) -> nn.Module:
        """``model``."""
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        """The embedding: ids to rows times √d, as in transformers."""
        return self.get_submodule("model.embed_tokens")

    def get_output_embeddings(self) -> nn.Module:
        """The head: hidden states to logits before the final soft-cap."""
        return self.lm_head

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name, as in a checkpoint; quantized ones under bitsandbytes' names. Views where they can be."""
        return dict(self._tree.state_dict())

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters of ``named_parameters``."""
        return self._tree.parameters(recurse)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter); the head's is the embedding's and stands once. None requires a gradient."""
        return self._tree.named_parameters(prefix, recurse, remove_duplicate)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """None: rotary angles are computed."""
        return self._tree.buffers(recurse)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """None: rotary angles are computed."""
        return self._tree.named_buffers(prefix, recurse, remove_duplicate)

    def modules(self) -> Iterator[nn.Module]:
        """The modules of ``named_modules``."""
        return self._tree.modules()

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) under transformers' names; whole matrices are torch.nn.Linear."""
        yield from self._tree.named_modules(memo, prefix, remove_duplicate)

    def children(self) -> Iterator[nn.Module]:
        """``model`` and ``lm_head``."""
        return self._tree.children()

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """``model`` and ``lm_head`` with their names."""
        return self._tree.named_children()

    def get_submodule(self, target: str) -> nn.Module:
        """The module of that name, or torch's AttributeError."""
        return self._tree.get_submodule(target)

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter of that name, or torch's AttributeError."""
        return self._tree.get_parameter(target)

    def get_buffer(self, target: str) -> Tensor:
        """torch's AttributeError: there are no buffers."""
        return self._tree.get_buffer(target)
