"""How far a cut network is from the whole one: KL divergence and perplexity over held-out text.

``KL = Σ_v p(v) · log(p(v) / q(v))`` at each position, p of the whole network and q of the cut one, in nats: 0 where
both predict alike. It sees every change of a prediction, of which perplexity shows only the sum of ups and downs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcut.errors import ParameterError
from gemcut.model import Model
from gemcut.model.dense import DenseKeyValues

#: Rows of logits at a time: 32 rows of 256,000 fp32 are 33 MB, of which a few copies live.
_ROWS = 32


@dataclass(frozen=True)
class Divergence:
    """What ``compare`` measured. All means are over predicted tokens.

    Attributes:
        tokens: predictions compared.
        perplexity: of the cut network.
        reference_perplexity: of the whole network.
        kl: mean KL divergence, nats a token.
        kl_p99: its 99th percentile over tokens.
        same_top: share of positions where both find the same token likeliest.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    kl: float
    kl_p99: float
    same_top: float


class Reference:
    """The whole network's predictions for held-out documents, kept as final hidden states: a few kB a token.

    The head is not stored: ``whole`` is asked for it again, so it must stay alive.
    """

    def __init__(self, whole: Model, documents: Sequence[Sequence[int]]) -> None:
        """Run ``documents`` (token ids, ``<bos>`` included, two at least each) through ``whole``."""
        if not documents or any(len(document) < 2 for document in documents):
            raise ParameterError("comparison needs documents of at least two tokens each")
        self.whole = whole
        self.documents = [list(document) for document in documents]
        self.hidden = [_hidden(whole, document) for document in self.documents]

    @torch.inference_mode()
    def compare(self, cut: Model) -> Divergence:
        """Measure ``cut`` on the same documents; it may be on another device and of another dtype."""
        ours = torch.cat([_hidden(cut, document) for document in self.documents])
        targets = torch.cat([torch.tensor(document[1:]) for document in self.documents])
        return measure(torch.cat(self.hidden), ours, targets, self.whole.head, cut.head)


def measure(
    expected: Tensor,
    found: Tensor,
    targets: Tensor,
    whole_head: Callable[[Tensor], Tensor],
    cut_head: Callable[[Tensor], Tensor],
) -> Divergence:
    """Compare two networks' predictions from their final states [T, d], a few rows of logits at a time.

    ``targets`` int64 [T] are the tokens that came; a head gives fp32 logits [n, V], which are overwritten.
    """
    return measure_all(expected, [found], targets, whole_head, [cut_head])[0]


@torch.inference_mode()
def measure_all(
    expected: Tensor,
    found: Sequence[Tensor],
    targets: Tensor,
    whole_head: Callable[[Tensor], Tensor],
    cut_heads: Sequence[Callable[[Tensor], Tensor]],
) -> list[Divergence]:
    """``measure`` for several cut networks, with the whole one's logits computed once."""
    sums = [_Sums() for _ in found]
    reference_loss = 0.0
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        p = _log_probabilities(whole_head(expected[rows]).cpu())
        likelihood, likeliest, wanted = p.exp(), p.argmax(dim=1), targets[rows, None]
        reference_loss -= p.gather(1, wanted).sum().item()
        for each, states, head in zip(sums, found, cut_heads, strict=True):
            q = _log_probabilities(head(states[rows]).cpu())
            each.loss -= q.gather(1, wanted).sum().item()
            each.same += int((likeliest == q.argmax(dim=1)).sum())
            each.kl.append(torch.linalg.vecdot(likelihood, p - q))
    return [each.divergence(reference_loss) for each in sums]


class _Sums:
    """What is summed over tokens for one cut network."""

    def __init__(self) -> None:
        self.kl: list[Tensor] = []
        self.loss, self.same = 0.0, 0

    def divergence(self, reference_loss: float) -> Divergence:
        every = torch.cat(self.kl)
        count = every.numel()
        return Divergence(
            tokens=count,
            perplexity=math.exp(self.loss / count),
            reference_perplexity=math.exp(reference_loss / count),
            kl=every.mean(dtype=torch.float64).item(),
            kl_p99=every.quantile(0.99).item(),
            same_top=self.same / count,
        )


@torch.inference_mode()
def _hidden(model: Model, document: Sequence[int]) -> Tensor:
    """Hidden states fp32 [T - 1, d] at every position that predicts a token of the document."""
    device = model.norm.scale.device
    ids = torch.tensor(document[:-1], device=device)
    hidden: Tensor = model(ids, torch.arange(len(ids), device=device), DenseKeyValues(len(ids)))
    return hidden


def _log_probabilities(logits: Tensor) -> Tensor:
    """log softmax of fp32 logits, in place: vocabularies are large."""
    logits -= logits.amax(dim=1, keepdim=True)
    return logits.sub_(logits.exp().sum(dim=1, keepdim=True).log_())
