"""How answers become values: the normalisations of multiple choice, one place for all rows."""

from __future__ import annotations

from collections.abc import Sequence

from gemcut.evaluation.requests import Answer, Choices, Letters, Pair
from gemcut.evaluation.row import Item, Score


def best(values: Sequence[float]) -> int:
    """The place of the largest; of the first where several are."""
    return max(range(len(values)), key=lambda i: values[i])


def choice_score(item: Item, answer: Answer) -> Score:
    """Whether the right choice is the likeliest one. ``item.target`` is its place, or a list of right places.

    ``acc``: by summed log-probability; ``acc_norm``: divided by the choice's characters (its leading space is not
    counted); ``acc_bytes``: by UTF-8 bytes; ``acc_token``: by tokens; ``acc_uncond``: minus the log-probability that
    the choice has without its question, where that was asked for.
    """
    right = item.target if isinstance(item.target, list) else [item.target]
    request = item.request
    values = {"acc": answer.logprobs}
    if isinstance(request, Choices):
        texts = [text.removeprefix(" ") for text in request.continuations]
        if not request.contexts:
            values["acc_norm"] = tuple(
                value / max(1, len(text)) for value, text in zip(answer.logprobs, texts, strict=True)
            )
            values["acc_bytes"] = tuple(
                value / max(1, len(text.encode())) for value, text in zip(answer.logprobs, texts, strict=True)
            )
            values["acc_token"] = tuple(
                value / max(1, count) for value, count in zip(answer.logprobs, answer.tokens, strict=True)
            )
        if answer.unconditional:
            values["acc_uncond"] = tuple(
                value - alone for value, alone in zip(answer.logprobs, answer.unconditional, strict=True)
            )
        shown = request.continuations if not request.contexts else request.contexts
    elif isinstance(request, Letters):
        shown = request.letters
    elif isinstance(request, Pair):
        shown = request.texts
    else:
        raise TypeError(f"a {type(request).__name__} has no choices")
    taken = best(answer.logprobs)
    return Score(
        values={name: float(best(each) in right) for name, each in values.items()}, extracted=shown[taken].strip()
    )
