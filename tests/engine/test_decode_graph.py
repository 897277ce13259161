"""Which sequences a step computed ahead serves, without a GPU."""

from __future__ import annotations

from typing import Any

from gemcut.engine.cache import Tables
from gemcut.engine.decode_graph import _Flight

TABLES = [Tables([block], [block]) for block in range(3)]
FLIGHT = _Flight(None, {i: (i + 5, 40 + i, 7, TABLES[i]) for i in range(3)}, drawn=False)  # type: ignore[arg-type]


def rows(*asked: tuple[int, int, int, Tables]) -> Any:
    return FLIGHT.rows([one[:3] for one in asked], [one[3] for one in asked])


def test_those_that_go_on_have_their_rows() -> None:
    assert rows((0, 40, 7, TABLES[0]), (1, 41, 7, TABLES[1]), (2, 42, 7, TABLES[2])) == [5, 6, 7]
    assert rows((2, 42, 7, TABLES[2]), (0, 40, 7, TABLES[0])) == [7, 5]


def test_one_that_is_not_in_it_is_not_served() -> None:
    known = (0, 40, 7, TABLES[0])
    for other in (
        (3, 41, 7, TABLES[1]),  # somebody else
        (1, 99, 7, TABLES[1]),  # another token was taken
        (1, 41, 8, TABLES[1]),  # it stands elsewhere
        (1, 41, 7, Tables([1], [1])),  # a new request with an old one's id, token and place: it has blocks of its own
    ):
        assert rows(known, other) is None
