"""Pictures that commands write: what kinds there are, and a file that is whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from gemcut.errors import ParameterError, UnsupportedError

KINDS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise, before anything is measured or read, what would keep a picture from being written."""
    if path.suffix.lower() not in KINDS:
        raise ParameterError(f"--plot is {str(path)!r}; expected a name that ends in {', '.join(KINDS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            "--plot needs matplotlib: pip install 'gemcut[plot]' (in the clone: pip install -e '.[plot]')"
        ) from None


def pyplot() -> Any:
    """matplotlib.pyplot, which draws into files and needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write ``figure`` and close it. Raises ParameterError where the file cannot be written; the old one then stays."""
    try:
        with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".gemcut-") as folder:
            part = Path(folder) / path.name
            figure.savefig(part, dpi=dpi)
            os.replace(part, path)
    except OSError as error:
        raise ParameterError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        pyplot().close(figure)
