"""GemmaForCausalLM: gemcut's model with transformers' methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.errors import ContextLengthError, ParameterError, UnsupportedError
from gemcut.gemma import Gemma
from gemcut.hf import generation, scores
from gemcut.hf.common import find_device, named_folder, refuse, warn_once
from gemcut.hf.inputs import read_rows, split_mapping
from gemcut.hf.loading import CALL, CALL_IDLE, FORWARD, ModelConfig, moved, save, shard_bytes
from gemcut.hf.module_access import ModuleAccess
from gemcut.hf.options import FIXED, HONOURED, GenerationConfig, merge_options
from gemcut.hf.outputs import CausalLMOutput, GenerateOutput
from gemcut.hf.public_names import MODEL
from gemcut.hf.quantization_config import BitsAndBytesConfig
from gemcut.model.quantized import QuantizedOwner
from gemcut.placement.devices import parse_dtype


class GemmaForCausalLM(ModuleAccess):
    """A Gemma model with transformers' methods. It is for inference: nothing here computes gradients.

    Attributes:
        gemma: gemcut's own model underneath.
        name_or_path: what ``from_pretrained`` was given.
        generation_config: defaults of ``generate``; it may be changed. Its eos_token_id is the union of what config,
            generation_config and tokenizer call an end, ``<end_of_turn>`` included.
    """

    def __init__(self, gemma: Gemma, name_or_path: str = "", generation_config: GenerationConfig | None = None) -> None:
        self.gemma, self.name_or_path = gemma, name_or_path
        if generation_config is None:
            generation_config = GenerationConfig.from_dict(gemma.generation_config)
            generation_config.update(eos_token_id=sorted(gemma.stop_ids))
            for name, value in (("bos", gemma.bos_id), ("pad", gemma.pad_id)):
                stored = getattr(generation_config, f"{name}_token_id")
                if stored is None or (type(stored) is int and stored < 0):  # -1 says "none"
                    generation_config.update(**{f"{name}_token_id": value})
        self.generation_config = generation_config

    def __repr__(self) -> str:
        return f"GemmaForCausalLM({self.name_or_path!r}, dtype={self.dtype}, device='{self.device}')"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.gemma.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.gemma.dtype

    @property
    def config(self) -> ModelConfig:
        """The network's shape under transformers' names; read-only."""
        return ModelConfig(self.gemma.config, self.dtype, self.name_or_path)

    @property
    def training(self) -> bool:
        """Always False."""
        return False

    def eval(self) -> GemmaForCausalLM:
        """This model; it is always in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> GemmaForCausalLM:
        """Refused: this front door is for inference."""
        if mode:
            raise UnsupportedError("train: gemcut.hf models are for inference; they compute no gradients")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> GemmaForCausalLM:
        """This model for False, which is always so; True is refused."""
        if requires_grad:
            raise UnsupportedError(f"requires_grad_: {MODEL['zero_grad']}")
        return self

    def can_generate(self) -> bool:
        """Always True."""
        return True

    @property
    def main_input_name(self) -> str:
        """What the model takes first."""
        return "input_ids"

    @property
    def quantization_config(self) -> BitsAndBytesConfig | None:
        """How the weights are cut; None where they are whole."""
        spec = self.gemma.model.quantization
        return None if spec is None else BitsAndBytesConfig.from_quantization(spec)

    @property
    def is_quantized(self) -> bool:
        """Whether linear layers are cut."""
        return self.gemma.model.quantization is not None

    @property
    def is_loaded_in_4bit(self) -> bool:
        """Whether linear layers are cut to 4 bits."""
        return self.is_quantized and not self.is_loaded_in_8bit

    @property
    def is_loaded_in_8bit(self) -> bool:
        """Whether linear layers are cut to 8 bits."""
        spec = self.gemma.model.quantization
        return spec is not None and spec.format == "int8"

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of all weights, block statistics included (transformers leaves those out of a quantized model's).

        ``return_buffers`` changes nothing: gemcut's networks hold no buffers that a checkpoint would.
        """
        network = self.gemma.model
        packed = sum(
            weight.nbytes
            for module in network.modules()
            if isinstance(module, QuantizedOwner)
            for weight in module.weights
        )
        return packed + sum(parameter.nbytes for parameter in network.parameters())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of distinct parameters; the output head shares the embedding."""
        config = self.gemma.config
        if only_trainable:
            return 0
        return config.num_parameters() - (config.vocab_size * config.hidden_size if exclude_embeddings else 0)

    def to(self, *args: Any, device: Any = None, dtype: Any = None) -> GemmaForCausalLM:
        """Move the model and return it: ``to("cuda")``, ``to(0)``, ``to("cpu")``.

        "cuda" on a machine without a GPU warns once and keeps the CPU. The dtype is chosen when loading; another one
        here is refused. Answers that are being generated must have ended.
        """
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            else:
                device = value
        if dtype is not None and parse_dtype(dtype, self.dtype) != self.dtype:
            raise UnsupportedError(f"to: the model computes in {self.dtype}; load it with dtype={dtype} instead")
        if device is not None and (where := find_device(device)) != self.device:
            self.gemma = moved(self.gemma, where)
        return self

    def cuda(self, device: int = 0) -> GemmaForCausalLM:
        """``to(device)``."""
        return self.to(device)

    def cpu(self) -> GemmaForCausalLM:
        """``to("cpu")``."""
        return self.to("cpu")

    def half(self) -> GemmaForCausalLM:
        """``to(torch.float16)``."""
        return self.to(torch.float16)

    def bfloat16(self) -> GemmaForCausalLM:
        """``to(torch.bfloat16)``."""
        return self.to(torch.bfloat16)

    def float(self) -> GemmaForCausalLM:
        """``to(torch.float32)``."""
        return self.to(torch.float32)

    # ---- forward -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        **others: Any,
    ) -> CausalLMOutput:
        """Logits of every position.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], zero at padding; padding may be on either side.
            labels: int64 [B, T]; -100, and padding, do not count. The loss is the mean over all that do.
            logits_to_keep: only the last so many columns; 0 keeps all.
            output_hidden_states: give [B, T, d] after the embedding and after each layer too, the last one normed.
            others: transformers' other arguments; refused by name unless they change nothing.

        Returns:
            ``logits`` fp32 [B, T, V], zero at padding; ``loss`` with labels; and ``hidden_states``, also zero at
            padding, in the model's dtype.
        """
        refuse("the model", others, FORWARD)
        input_ids, attention_mask = split_mapping(input_ids, attention_mask)
        if input_ids is None:
            raise ParameterError("the model needs input_ids, int64 [B, T]")
        config = self.gemma.config
        batch = read_rows(input_ids, attention_mask, pad_id=None, vocab_size=config.vocab_size)
        rows, width = batch.ids.shape
        longest, limit = max(map(len, batch.rows)), config.max_position_embeddings
        if longest > limit:
            raise ContextLengthError(f"input_ids has {longest} tokens in a row; this model takes {limit}: shorten it")
        if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ParameterError(f"logits_to_keep is {logits_to_keep!r}; expected a whole number of at least 0")
        if labels is not None and (labels.shape != batch.ids.shape or logits_to_keep):
            raise ParameterError(
                f"labels has shape {list(labels.shape)}; expected that of input_ids, {list(batch.ids.shape)}, "
                "and logits_to_keep=0"
            )
        first = max(0, width - logits_to_keep) if logits_to_keep else 0
        logits = torch.zeros(rows, width - first, config.vocab_size, device=self.device)
        states = scores.empty_states(self.gemma, rows, width) if output_hidden_states else None
        for i, (row, (start, stop), ids) in enumerate(zip(logits, batch.spans, batch.rows, strict=True)):
            kept = max(start, first)
            hidden = scores.hidden_states(self.gemma, ids, None if states is None else states[:, i, start:stop])
            if kept < stop:
                row[kept - first : stop - first] = self.gemma.model.head(hidden[kept - start :])
        loss = None
        if labels is not None:
            targets = labels.to(self.device).long().clone()
            for row, (start, stop) in zip(targets, batch.spans, strict=True):
                row[: start + 1], row[stop:] = -100, -100  # nothing predicts a row's first token
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()).to(batch.ids.device)
        where = batch.ids.device
        layers = None if states is None else tuple(states.to(where).unbind())
        return CausalLMOutput(loss=loss, logits=logits.to(where), hidden_states=layers)

    forward = __call__

    # ---- generate ------------------------------------------------------------------------------------------------

    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        streamer: Any = None,
        seed: int | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> Any:
        """Continue a batch of prompts.

        Options are those of transformers' GenerationConfig; each is honoured, or refused by name. What differs:

        - Where neither ``max_new_tokens`` nor ``max_length`` is given anywhere, an answer may have 1024 tokens, or as
          many as the context has room for (transformers: 20).
        - ``seed`` is gemcut's own; without it the draws follow ``torch.manual_seed``, one seed a sequence, so a
          sequence does not depend on its neighbours. Draws are not those of transformers.
        - Padding on the right is understood too: the new tokens come after it.
        - ``output_logits`` and ``output_scores`` are computed by a second pass over prompt and answer.

        Args:
            inputs: int64 [B, T], or what the tokenizer returned. None starts from ``<bos>`` alone.
            generation_config: a GenerationConfig (transformers' own works too) between the model's and ``options``.
            input_ids: the same as ``inputs``.
            attention_mask: [B, T], zero at padding. Without it, pad tokens at the start of a row are padding.
            streamer: gets the prompts, then each token, then the end (``put``, ``end``).
            seed: makes this call repeatable.
            tokenizer: accepted beside ``stop_strings``, as transformers needs it; the model's own is used.
            options: fields of GenerationConfig.

        Returns:
            int64 [B, T + new] on the device of the inputs: the prompts as they came, the new tokens, padding; or a
            `GenerateOutput` with ``return_dict_in_generate=True``.

        Raises:
            ParameterError: an option is unknown, out of range, or contradicts another.
            UnsupportedError: an option gemcut does not have.
            ContextLengthError: prompt and answer do not fit the context.
        """
        try:
            return self._generate(inputs, generation_config, input_ids, attention_mask, streamer, seed, options)
        except BaseException as error:
            # A reader in another thread would wait for ever.
            if hasattr(streamer, "fail"):
                streamer.fail(error)
            raise

    def _generate(
        self,
        inputs: Any,
        config: Any,
        input_ids: Any,
        mask: Any,
        streamer: Any,
        seed: int | None,
        given: dict[str, Any],
    ) -> Any:
        gemma = self.gemma
        known = {name: value for name, value in given.items() if name in HONOURED or name in FIXED}
        refuse("generate", {name: value for name, value in given.items() if name not in known}, CALL, CALL_IDLE)
        options, asked = merge_options(self.generation_config, config, known)
        if inputs is not None and input_ids is not None:
            raise ParameterError("generate was given both inputs and input_ids; they are the same, give one")
        ids, mask = split_mapping(input_ids if inputs is None else inputs, mask)
        if ids is None:
            ids = torch.tensor([[options.get("bos_token_id", gemma.bos_id)]])
        pad_id = options.get("pad_token_id", gemma.pad_id)
        rows = read_rows(ids, mask, pad_id=pad_id, vocab_size=gemma.config.vocab_size)
        job = generation.make_job(gemma, rows, options, asked, seed)
        extra = [name for name in ("output_logits", "output_scores") if options.get(name)]
        as_dict = options.get("return_dict_in_generate", False)
        if extra and not as_dict:
            warn_once(f"{extra[0]} has no effect without return_dict_in_generate=True")
        new = generation.run(gemma, job, streamer)
        sequences = generation.assemble(job.inputs.ids, new, job.pad_id)
        if not as_dict:
            return sequences
        output = GenerateOutput(sequences)
        if extra:
            logits = scores.step_logits(gemma, job, new)
            if "output_logits" in extra:
                output.logits = scores.by_step(logits, sequences.device)
            if "output_scores" in extra:
                changed = scores.step_scores(logits, job, new, renormalize=bool(options.get("renormalize_logits")))
                output.scores = scores.by_step(changed, sequences.device)
        return output

    def compute_transition_scores(
        self, sequences: Tensor, scores: Any, beam_indices: Any = None, normalize_logits: bool = False
    ) -> Tensor:
        """The score of each new token, fp32 [B, new], from ``generate``'s sequences and scores (or logits).

        ``normalize_logits`` makes log-probabilities of them. What stands behind a row's end has no meaning.
        """
        if beam_indices is not None:
            raise UnsupportedError("compute_transition_scores: beam search is not in this version; leave beam_indices")
        if not scores:
            raise ParameterError("compute_transition_scores needs scores: generate(..., output_scores=True)")
        stacked = torch.stack(tuple(scores), dim=1)  # [B, new, V]
        if normalize_logits:
            stacked = stacked.log_softmax(dim=-1)
        tokens = sequences[:, -stacked.shape[1] :, None]
        return stacked.gather(2, tokens.to(stacked.device)).squeeze(2)

    def save_pretrained(self, save_directory: str | Path, *, max_shard_size: int | str = "5GB", **others: Any) -> None:
        """Write config.json, generation_config.json and safetensors in Hugging Face layout; not the tokenizer.

        A model in that layout that is there already is replaced once the new one is written.

        Raises:
            ParameterError: ``save_directory`` is empty.
            CheckpointError: the folder holds a GGUF file, or the disk is full; nothing half-written is left.
        """
        refuse("save_pretrained", others, {"safe_serialization": ((True,), "only safetensors are written")})
        save(self.gemma, named_folder(save_directory), shard_bytes(max_shard_size), self.generation_config.to_dict())
