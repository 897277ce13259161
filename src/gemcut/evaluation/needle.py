"""How far back a model finds a sentence: a number hidden at every depth of texts of every length.

The question is asked by log-probability alone: of ten numbers, is the hidden one the likeliest behind "The number of
the … is"? Chance is one in ten, and a base model can be asked as well as a tuned one. Beside it stands the position
curve: what tokens cost at each place of a long text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemcut.engine import SamplingParams
from gemcut.engine.results import run_together
from gemcut.errors import ParameterError
from gemcut.evaluation.asking import Asker
from gemcut.evaluation.requests import Choices
from gemcut.gemma import Gemma
from gemcut.picture import pyplot, save_figure

LENGTHS = (512, 1024, 2048, 4096, 8192)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_THINGS = ("lighthouse", "orchard", "violin", "harbour", "glacier", "pavilion", "compass", "lantern", "meadow", "anvil")
_SUBJECTS = ("The baker", "A sailor", "My neighbour", "The old teacher", "A young painter", "The gardener", "Our guide")
_VERBS = ("walked past", "wrote about", "looked at", "painted", "remembered", "talked of", "drew a map of")
_OBJECTS = ("the river", "a wooden bridge", "the quiet market", "some grey clouds", "the town hall", "a row of poplars")
_TIMES = ("in the morning", "after lunch", "on a rainy day", "before winter", "last spring", "late in the evening")


@dataclass(frozen=True, kw_only=True)
class NeedleCell:
    """Trials of one length and depth: how many found the number, and the mean margin to the best other one in nats."""

    length: int
    depth: float
    found: int
    trials: int
    margin: float


def haystack(count: int, chance: random.Random) -> list[str]:
    """Sentences of no meaning and no number."""
    return [
        f"{chance.choice(_SUBJECTS)} {chance.choice(_VERBS)} {chance.choice(_OBJECTS)} {chance.choice(_TIMES)}."
        for _ in range(count)
    ]


def trial(asker: Asker, length: int, depth: float, chance: random.Random) -> tuple[Choices, int]:
    """A text of at most ``length`` tokens with the sentence at ``depth`` (0: first), and the right choice's place."""
    thing, numbers = chance.choice(_THINGS), chance.sample(range(1000, 10_000), 10)
    right = chance.randrange(10)
    needle = f"The number of the {thing} is {numbers[right]}."
    question = f"\n\nThe number of the {thing} is"

    def tokens(text: str) -> int:
        return len(asker.gemma.tokenizer.encode(text, add_bos=False))

    room = length - 1 - tokens(needle + question) - 8
    sentences = haystack(max(1, room // 6), chance)
    sizes = np.cumsum([tokens(" " + sentence) for sentence in sentences])
    sentences = sentences[: int(np.searchsorted(sizes, room, side="right"))]
    place = round(depth * len(sentences))
    text = " ".join([*sentences[:place], needle, *sentences[place:]])
    return Choices(context=text + question, continuations=tuple(f" {number}" for number in numbers)), right


def measure_needle(
    gemma: Gemma,
    *,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    trials: int = 5,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[NeedleCell]:
    """Cells of all lengths and depths. Raises ParameterError where a length fits no context or holds no sentence."""
    most = gemma.engine.max_context
    for length in lengths:
        if not 128 <= length <= most:
            raise ParameterError(f"a length is {length}; expected 128 to {most}, the model's context")
    if trials < 1:
        raise ParameterError(f"trials is {trials}; expected at least 1")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ParameterError(f"a depth is {depth:g}; expected 0 (first sentence) to 1 (last)")
    asker = Asker(gemma, seed=seed)
    cells: list[NeedleCell] = []
    total = len(lengths) * len(depths) * trials
    for length in lengths:
        for depth in depths:
            found, margins = 0, []
            for number in range(trials):
                request, right = trial(asker, length, depth, random.Random(f"{seed} {length} {depth} {number}"))
                logprobs = asker.answer(request).logprobs
                other = max(value for place, value in enumerate(logprobs) if place != right)
                margins.append(logprobs[right] - other)
                found += logprobs[right] > other
                progress(len(cells) * trials + number + 1, total)
            margin = float(np.mean(margins))
            cells.append(NeedleCell(length=length, depth=depth, found=found, trials=trials, margin=margin))
    return cells


def position_curve(gemma: Gemma, text: str, length: int, buckets: int = 16) -> list[tuple[int, float]]:
    """(place, mean negative log-probability) over stretches of places of a text's first ``length`` tokens.

    Where a model uses what went before, the cost falls with the place; where its positions break down, it rises.
    """
    ids = gemma.encode(text)[:length]
    if len(ids) < 2 * buckets:
        raise ParameterError(f"the text has {len(ids)} tokens; expected at least {2 * buckets}")
    stream = gemma.prepare_stream(ids, SamplingParams(max_new_tokens=0), prompt_logprobs_from=1)
    scores = run_together([stream])[0].checked().prompt_scores or ()
    costs = np.array([-score.logprob for score in scores])
    parts = np.array_split(np.arange(len(costs)), buckets)
    return [(int(part.mean()) + 1, float(costs[part].mean())) for part in parts]


def plot(path: Path, cells: Sequence[NeedleCell], curve: Sequence[tuple[int, float]], title: str) -> None:
    """A picture: found by length and depth, and the position curve where there is one."""
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        grid[depths.index(cell.depth), lengths.index(cell.length)] = cell.found / cell.trials
    figure, axes = pyplot().subplots(1, 2 if curve else 1, figsize=(11 if curve else 6, 4), layout="constrained")
    first: Any = axes[0] if curve else axes
    image = first.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    first.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    first.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    first.set_xlabel("tokens of the text")
    first.set_ylabel("depth of the sentence")
    for row in range(len(depths)):
        for column in range(len(lengths)):
            first.text(column, row, f"{grid[row, column]:.0%}", ha="center", va="center")
    figure.colorbar(image, ax=first, label="found (chance: 10 %)")
    if curve:
        axes[1].plot([place for place, _ in curve], [cost for _, cost in curve], "-o")
        axes[1].set_xlabel("place in the text")
        axes[1].set_ylabel("nats a token")
        axes[1].grid(alpha=0.3)
    figure.suptitle(title)
    save_figure(figure, path, 150)
