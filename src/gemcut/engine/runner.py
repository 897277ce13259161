"""Runner: one step's batch through the network, to the logits that are needed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from gemcut.engine import decode_graph, prefill_graph
from gemcut.engine.cache import PagedCache, Tables
from gemcut.engine.diagnosis import explain_bad_logits
from gemcut.engine.draw import DrawParams
from gemcut.engine.draw_graphs import drawing_of
from gemcut.engine.edits import changes_logits
from gemcut.engine.followers import Followers
from gemcut.engine.logprobs import prompt_scores
from gemcut.engine.paged import PagedKeyValues
from gemcut.engine.request import RowError
from gemcut.engine.request import Sequence as EngineSequence
from gemcut.engine.sampler import uniform
from gemcut.engine.scheduler import Scheduled
from gemcut.engine.tensors import indices
from gemcut.model import Model
from gemcut.model.key_values import Span


class Runner:
    """Owns the model on its device; turns scheduled tokens into logits."""

    def __init__(
        self, model: Model, cache: PagedCache, device: torch.device, followers: Followers | None = None
    ) -> None:
        self.model, self.cache, self.device = model, cache, device
        self.followers = followers
        if followers is not None:
            followers.open(cache.shape)
        #: Why steps of single tokens do not run as CUDA graphs; None: they do.
        self.graph_refusal = decode_graph.refusal(model, cache.block_size, device)
        #: Whether a single sequence's layers run in one launch where they can; set it before the first step.
        self.one_launch = True
        self._graphs: decode_graph.DecodeGraphs | None = None
        #: Why short prompts do not run as CUDA graphs; None: they do.
        self.prefill_refusal = prefill_graph.refusal(model.ops.varlen, self.graph_refusal)
        self._prefills: prefill_graph.PrefillGraphs | None = None
        self._explanation: str | None = None

    @torch.inference_mode()
    def tokens(self, batch: list[Scheduled], tables: list[Tables]) -> Sequence[int | RowError] | None:
        """The next token of each sequence as CUDA graphs, where all have one token to compute and want nothing else.

        A RowError stands in place of a token where the logits are not finite. None where this step or this device needs
        the general way.
        """
        graphs = self._graphs_for(batch)
        params = [scheduled.sequence.request.params for scheduled in batch]
        greedy = all(p.greedy for p in params)
        drawing = None if greedy else drawing_of(params, self.model.config.vocab_size, self.device)
        if graphs is None or not all(map(_wants_tokens, batch)) or (drawing is None and not greedy):
            return None

        def row(ahead: int) -> list[DrawParams]:
            return [
                DrawParams.of(p, uniform(s.sequence.seed, s.sequence.output_length + ahead))
                for p, s in zip(params, batch, strict=True)
            ]

        sequences = [_last(scheduled) for scheduled in batch]
        tokens = graphs.tokens(sequences, tables) if greedy else graphs.tokens(sequences, tables, drawing, row)
        if tokens is None:
            return None
        return [RowError(self.explain()) if token is None else token for token in tokens]

    def computed_ahead(self, batch: list[Scheduled], tables: list[Tables]) -> dict[int, int | RowError]:
        """The next tokens, by place in the batch, of those that the last step has begun to compute; asked once."""
        if self._graphs is None:
            return {}
        places = {s.sequence.id: i for i, s in enumerate(batch) if s.length == 1 and s.samples and _wants_tokens(s)}
        found = self._graphs.computed_ahead(
            [_last(batch[i]) for i in places.values()], [tables[i] for i in places.values()]
        )
        return {
            places[identity]: RowError(self.explain()) if token is None else token for identity, token in found.items()
        }

    def _graphs_for(self, batch: list[Scheduled]) -> decode_graph.DecodeGraphs | None:
        """The decode graphs where they serve this device and step: one token of each sequence, its logits wanted."""
        if self.graph_refusal is not None or len(batch) > decode_graph.SIZES[-1]:
            return None
        if not all(s.length == 1 and s.samples and not s.scored and not s.embedded for s in batch):
            return None
        if self._graphs is None:
            limit = self.model.config.max_position_embeddings
            self._graphs = decode_graph.DecodeGraphs(
                self.model, self.cache, self.device, limit, one_launch=self.one_launch
            )
        return self._graphs

    @torch.inference_mode()
    def run(self, batch: list[Scheduled], tables: list[Tables]) -> Tensor:
        """Run one step.

        Args:
            batch: what to compute.
            tables: the block tables of the batch's sequences, with room for the new tokens.

        Returns:
            fp32 [m, V]: the logits after the last token of each sequence that ``samples``, in order.
        """
        graphs = self._graphs_for(batch)
        if graphs is not None:
            logits = graphs.logits([(s.sequence.tokens[-1], s.sequence.computed) for s in batch], tables)
            if logits is not None:
                return self.model.softcap(logits.clone())
        hidden = self._ends(batch, tables)
        if hidden is None:
            return torch.empty((0, self.model.config.vocab_size), device=self.device)
        return self.model.head(hidden)

    @torch.inference_mode()
    def likeliest(self, batch: list[Scheduled], tables: list[Tables]) -> list[int | RowError] | None:
        """Run one step where the head's tokens are on several devices and all that is wanted are greedy choices.

        The token of each sequence that ``samples``, in order; None where this step needs its logits.
        """
        part, sampling = self.model.embed.part, [scheduled for scheduled in batch if scheduled.samples]
        if part is None or not all(_wants_tokens(s) and s.sequence.request.params.greedy for s in sampling):
            return None
        hidden = self._ends(batch, tables)
        if hidden is None:
            return []
        x = self.model.norm(hidden).to(self.model.dtype)
        found = part.best(x, self.model.embed.product, self.model.softcap)
        finite = found.isfinite().all(dim=-1).tolist()
        return [
            int(token) if sound else RowError(self.explain())
            for (token, _, _), sound in zip(found.tolist(), finite, strict=True)
        ]

    def _ends(self, batch: list[Scheduled], tables: list[Tables]) -> Tensor | None:
        """Run one step through the layers: the hidden state of the last token of each sequence that ``samples``.

        fp32 [m, d], before the final norm; None where there is none.
        """
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for scheduled in batch:
            sequence, start = scheduled.sequence, scheduled.sequence.computed
            end = start + scheduled.length
            spans.append(Span(len(ids), scheduled.length, end))
            ids += sequence.tokens[start:end]
            positions += range(start, end)
        # The rows that are wanted: those that score a prompt's tokens, those of embeddings, then each sequence's last.
        scored = [list(scheduled.scored) for scheduled in batch]
        rows = [
            span.start + place - 1 - scheduled.sequence.computed
            for scheduled, span, places in zip(batch, spans, scored, strict=True)
            for place in places
        ]
        embedded = [
            [span.start + place - scheduled.sequence.computed for place in scheduled.embedded]
            for scheduled, span in zip(batch, spans, strict=True)
        ]
        embedded_rows = [row for own in embedded for row in own]
        wanted = [*rows, *embedded_rows, *(span.start + span.length - 1 for span in spans)]
        hidden = self._hidden(ids, positions, spans, tables, wanted)
        scores, states, ends = torch.split(hidden, [len(rows), len(embedded_rows), len(batch)])
        self._score([s.sequence for s in batch], scored, scores)
        self._embed([s.sequence for s in batch], [len(own) for own in embedded], states)
        # The head shows what is not finite in the others.
        others = [i for i, scheduled in enumerate(batch) if not scheduled.samples]
        if not others:
            return ends
        self._check_parts([batch[i] for i in others], ends[indices(others, self.device)])
        sampling = [i for i, scheduled in enumerate(batch) if scheduled.samples]
        return ends[indices(sampling, self.device)] if sampling else None

    def _check_parts(self, batch: list[Scheduled], hidden: Tensor) -> None:
        """End the sequences whose prompt chunk gave NaN or infinity. ``hidden`` fp32 [n, d]: each chunk's last row.

        They have no logits yet, or want none.
        The logits at the prompt's end would show it, too. But until then other requests could share the chunk's
        blocks, and attention kernels spread a NaN over its whole tile, to the tokens before it as well.
        """
        for scheduled, finite in zip(batch, hidden.isfinite().all(dim=-1).tolist(), strict=True):
            if not finite and scheduled.sequence.failure is None:
                scheduled.sequence.failure = RowError(self.explain())

    def _hidden(
        self,
        ids: list[int],
        positions: list[int],
        spans: list[Span],
        tables: list[Tables],
        wanted: list[int],
    ) -> Tensor:
        """Hidden states before the final norm, fp32 [n, d], of the n ``wanted`` rows, n > 0.

        The next step may overwrite them.
        """
        if self.prefill_refusal is None:
            if self._prefills is None:
                self._prefills = prefill_graph.PrefillGraphs(self.model, self.cache, self.device)
            hidden = self._prefills.hidden(ids, positions, spans, tables, wanted)
            if hidden is not None:
                return hidden
        kv = PagedKeyValues(self.model.config, self.cache, tables, spans)
        every = None if wanted == list(range(len(ids))) else indices(wanted, self.device)
        led = nullcontext() if self.followers is None else self.followers.step(ids, positions, spans, tables, wanted)
        with led:
            rows: Tensor = self.model(
                torch.tensor(ids, device=self.device), torch.tensor(positions, device=self.device), kv, every
            )
        return rows

    def forget(self) -> None:
        """After a step that failed: take nothing over that it has begun."""
        if self._graphs is not None:
            self._graphs.forget()
        if self.followers is not None:
            self.followers.forget()

    def cause(self, error: Exception) -> Exception:
        """What to say of an exception of a step: that of another process, where it is the cause."""
        return error if self.followers is None else self.followers.explain(error)

    def explain(self) -> str:
        """Why logits are not finite, in one line; weights do not change, so they are searched once."""
        if self._explanation is None:
            self._explanation = explain_bad_logits(self.model)
        return self._explanation

    def _score(self, sequences: Sequence[EngineSequence], places: list[list[int]], hidden: Tensor) -> None:
        """Add the scores of prompt tokens to their sequences.

        Args:
            sequences: the batch's.
            places: of each, those of its prompt tokens to be scored.
            hidden: fp32 [n, d], the hidden state before each of them, one sequence's after another's.
        """
        targets = [sequence.tokens[place] for sequence, own in zip(sequences, places, strict=True) for place in own]
        found = prompt_scores(self.model, hidden, targets)
        start = 0
        for sequence, own in zip(sequences, places, strict=True):
            scores, start = found[start : start + len(own)], start + len(own)
            good = [score for score in scores if score is not None]
            if len(good) < len(scores):
                sequence.failure = RowError(self.explain())
            else:
                sequence.prompt_scores += good

    def _embed(self, sequences: Sequence[EngineSequence], counts: list[int], hidden: Tensor) -> None:
        """Add hidden states behind the final norm to their sequences' sums.

        Args:
            sequences: the batch's.
            counts: how many rows of ``hidden`` are each one's, one sequence's after another's.
            hidden: fp32 [n, d], before the final norm.
        """
        for sequence, rows in zip(sequences, torch.split(hidden, counts), strict=True):
            if not len(rows):
                continue
            total = self.model.norm(rows).sum(dim=0, dtype=torch.float64).cpu()
            if not total.isfinite().all():
                sequence.failure = RowError(self.explain())
            # One assignment: where an exception strikes this step, the next one goes on behind these rows or before.
            before, count = sequence.embedded
            sequence.embedded = (before + total, count + len(rows))


def _last(scheduled: Scheduled) -> tuple[int, int, int]:
    """(id, last token, its position) of a sequence with one token to compute."""
    sequence = scheduled.sequence
    return sequence.id, sequence.tokens[-1], sequence.computed


def _wants_tokens(scheduled: Scheduled) -> bool:
    """Whether the next token is all that is wanted, and nothing comes between the logits and the choice."""
    sequence = scheduled.sequence
    params = sequence.request.params
    plain = params.logprobs is None and params.watermark is None
    return params.max_new_tokens > 0 and plain and not changes_logits(sequence)
