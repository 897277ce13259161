"""A batch's view of the paged cache."""

from __future__ import annotations

import gc
import weakref

import torch

from gemcut.config import GemmaConfig
from gemcut.engine.cache import PagedCache, Tables, shape_for_tokens
from gemcut.engine.paged import PagedKeyValues
from gemcut.model.key_values import Span
from support import tiny_config


def _view(spans: list[Span]) -> PagedKeyValues:
    config = GemmaConfig.from_dict(tiny_config().to_dict())
    shape = shape_for_tokens(config, sequences=len(spans), context=64, chunk=64, block_size=16)
    cache, tables = PagedCache(config, shape, torch.float32, torch.device("cpu")), [Tables() for _ in spans]
    for table, span in zip(tables, spans, strict=True):
        cache.extend(table, span.context_length - span.length, span.length)
    return PagedKeyValues(config, cache, tables, spans)


def test_what_a_batch_offers() -> None:
    """Any spans as pages; one new token for each sequence also to decode kernels, those of the cache's device."""
    some, one_each = _view([Span(0, 1, 5), Span(1, 3, 3)]), _view([Span(0, 1, 5), Span(1, 1, 3)])
    assert (some.paged, some.decode, some.host_decode) == (some, None, None)
    assert (one_each.paged, one_each.decode, one_each.host_decode) == (one_each, None, one_each)
    assert one_each.positions.tolist() == [4, 2]


def test_a_steps_view_is_let_go_with_the_step() -> None:
    """Each step makes one; left to the collector of cycles, they would pile up with their tensors."""
    gc.disable()
    try:
        view = _view([Span(0, 1, 5)])
        gone = weakref.ref(view)
        del view
        assert gone() is None
    finally:
        gc.enable()
