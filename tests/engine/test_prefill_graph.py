"""Where the inputs of a prompt's graph stand, without a GPU."""

from __future__ import annotations

import pytest

from gemcut.engine.prefill_graph import input_sizes


@pytest.mark.parametrize("rows", [16, 96, 512])
@pytest.mark.parametrize("blocks", [0, 1, 3, 512])
@pytest.mark.parametrize("tiles", [9, 10])
def test_tiles_of_a_graph_begin_where_16_bytes_are_read_at_once(rows: int, blocks: int, tiles: int) -> None:
    sizes, at = input_sizes(rows, blocks, tiles), 0
    for name, size in sizes.items():
        if name.endswith("tiles"):
            assert size * 8 == tiles * 16
            assert at * 8 % 16 == 0, name
        at += size
    assert set(sizes) == {"ids", "positions"} | {
        f"{g} {x}" for g in ("full", "sliding") for x in ("slots", "blocks", "tiles")
    }
