"""The card's rows: what is asked, how it is scored, and the runner. Needs no torch until a model is asked."""

from gemcut.evaluation.folder import DataFolder, SetOfData
from gemcut.evaluation.registry import CARD, find_rows, row
from gemcut.evaluation.requests import Answer, Choices, Generate, Letters, Message, Pair, Request, Rolling, user
from gemcut.evaluation.row import CardValues, Figure, Item, Records, Row, Score, ScoreOptions, Setup, each

__all__ = [
    "CARD",
    "Answer",
    "CardValues",
    "Choices",
    "DataFolder",
    "Figure",
    "Generate",
    "Item",
    "Letters",
    "Message",
    "Pair",
    "Records",
    "Request",
    "Rolling",
    "Row",
    "Score",
    "ScoreOptions",
    "SetOfData",
    "Setup",
    "each",
    "find_rows",
    "row",
    "user",
]
