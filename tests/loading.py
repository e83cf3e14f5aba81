"""Recipes as modules, for the tests of recipes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest


RECIPES = Path(__file__).parents[1] / "recipes"


@contextmanager
def loaded_recipe(name: str) -> Iterator[ModuleType]:
    """`recipes/<name>.py` with what lies beside it importable, as when it is run as a script; forgotten afterwards."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, name, module)  # where dataclasses, and processes that it starts, look for it
        spec.loader.exec_module(module)
        yield module
        for other in set(sys.modules) - before - {name}:
            if RECIPES in Path(getattr(sys.modules[other], "__file__", None) or "/").parents:
                del sys.modules[other]
