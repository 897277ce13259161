"""Where tests find benchmark data, and rows on invented records."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import support
from gemcut.evaluation import DataFolder


def real_data() -> DataFolder:
    """The folder of real benchmark sets, or skip."""
    folder = Path(os.environ.get("GEMCUT_BENCHMARKS") or support.ROOT.parent / "shared" / "data" / "benchmarks")
    if not folder.is_dir():
        pytest.skip("needs benchmark sets: set GEMCUT_BENCHMARKS to their folder")
    return DataFolder(folder)
