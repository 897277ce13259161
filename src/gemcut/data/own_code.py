"""Functions of a user's own that a recipe names. Importing their file runs it."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from gemcut.errors import ParameterError


def load_function(path: Path, name: str, arguments: str, modules: dict[Path, ModuleType]) -> Callable[..., Any]:
    """The function ``name`` of the file at ``path``, callable with ``arguments`` such as "(document)".

    ``modules`` holds files that were imported before. Raises ParameterError where there is no such function.
    """
    if path not in modules:
        modules[path] = _import(path)
    function = getattr(modules[path], name, None)
    if not callable(function):
        raise ParameterError(f"{path} has no function {name}")
    try:
        inspect.signature(function).bind(*arguments.split(","))
    except TypeError:
        raise ParameterError(f"{name} of {path} cannot be called with {arguments}") from None
    found: Callable[..., Any] = function
    return found


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gemcut_recipe_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ParameterError(f"cannot import {path}; expected a file of Python")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ParameterError(f"{path} raised {type(error).__name__} when it was imported: {error}") from error
    return module
