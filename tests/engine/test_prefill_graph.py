"""Where the inputs of a prompt's graph stand, without a GPU."""

from __future__ import annotations

import pytest

from gemcut.engine.prefill_graph import GraphSize, input_sizes


@pytest.mark.parametrize("rows", [16, 96, 512])
@pytest.mark.parametrize("blocks", [0, 1, 3, 512])
@pytest.mark.parametrize("tiles", [9, 10])
@pytest.mark.parametrize("answers", [0, 8])
def test_tiles_of_a_graph_begin_where_16_bytes_are_read_at_once(
    rows: int, blocks: int, tiles: int, answers: int
) -> None:
    sizes, at = input_sizes(GraphSize(rows, blocks * 16, answers, 3 * answers), blocks, tiles), 0
    for name, size in sizes.items():
        if name.endswith("tiles"):
            assert size * 8 == tiles * 16
            assert at * 8 % 16 == 0, name
        at += size
    groups = "full", "sliding"
    names = {"ids", "positions"} | {f"{g} {x}" for g in groups for x in ("slots", "blocks", "tiles")}
    if answers:
        names |= {"answers' positions", *(f"answers' {g} table" for g in groups)}
        assert [sizes[f"answers' {g} table"] * 8 for g in groups] == [8 * 24 * 4] * 2
    assert set(sizes) == names
    assert sizes["ids"] == sizes["positions"] == rows + answers
