"""Compiles the CPU kernels when gemcut is installed or packed. Without a compiler it says so and goes on."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface[Any]):
    """Puts the kernels' library into the wheel, or beside its sources for an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the files are collected; ``version`` is "standard" or "editable"."""
        if self.target_name != "wheel":
            return
        build = _load(Path(self.root) / "src/gemcut/kernels/cpu/build.py")
        try:
            library = build.build(report=self.app.display_info)
        except Exception as error:
            self.app.display_warning(
                f"CPU kernels were not built: {error}\ngemcut works without them, more slowly on a CPU; with a C++ "
                "compiler, `python -m gemcut.kernels.cpu.build` adds them later"
            )
            for path in (build.library_path(), build.record_path(build.library_path())):
                path.unlink(missing_ok=True)
            return
        build_data["pure_python"] = False
        if version == "standard":
            for path in (library, build.record_path(library)):
                build_data["force_include"][str(path)] = path.relative_to(Path(self.root) / "src").as_posix()
            # Not bound to a version of Python: the library is plain C.
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def _load(path: Path) -> ModuleType:
    """build.py alone: importing gemcut would need torch, which a build environment lacks."""
    spec = importlib.util.spec_from_file_location("gemcut_cpu_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
