"""What users build on, as plain values: names, signatures, arguments with their defaults, commands, error types.

    python tests/public_api.py > tests/public_api.json    # or: make api

`test_public_api.py` compares this with the committed file, so that no name or default changes unnoticed.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import sys
from enum import Enum
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # run from anywhere in this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import Trainer

import hf_dpvision
from hf_dpvision import DPTrainer, DPTrainingArguments, errors
from hf_dpvision.cli import parser


MODULES = ("accounting", "clipping", "data", "heads", "verify")


def current() -> dict[str, Any]:
    """The public surface of this checkout."""
    return {
        "hf_dpvision": {name: described(getattr(hf_dpvision, name)) for name in sorted(hf_dpvision.__all__)},
        **{name: offered(importlib.import_module(f"hf_dpvision.{name}")) for name in MODULES},
        "errors": {name: bases(value) for name, value in vars(errors).items() if isinstance(value, type)},
        "DPTrainingArguments": arguments(),
        "DPTrainer": methods(),
        "commands": commands(),
    }


def offered(module: Any) -> dict[str, str]:
    """Names in `__all__`, each with its signature."""
    return {name: described(getattr(module, name)) for name in sorted(module.__all__)}


def described(value: Any) -> str:
    """A signature, or what kind of thing it is."""
    if inspect.ismodule(value):
        return "module"
    if isinstance(value, type) and issubclass(value, Enum):
        return f"one of {sorted(member.value for member in value)}"
    if value is DPTrainingArguments:
        return "see DPTrainingArguments"
    if not callable(value):
        return type(value).__name__
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", str(inspect.signature(value)))  # an address changes every time


def bases(error: type) -> list[str]:
    """Names of the classes that an error can be caught as."""
    return [base.__name__ for base in error.__mro__[1:] if base not in (object, BaseException, Exception)]


def arguments() -> dict[str, str]:
    """Arguments that are declared here, also where TrainingArguments of some version has them; with their defaults."""
    ours = [cls for cls in DPTrainingArguments.__mro__ if cls.__module__.startswith("hf_dpvision.")]
    declared = {name for cls in ours for name in vars(cls).get("__annotations__", {})}
    fields = sorted(dataclasses.fields(DPTrainingArguments), key=lambda field: field.name)
    return {field.name: default(field) for field in fields if field.name in declared}


def default(field: Any) -> str:
    """What an argument is if it is not given."""
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "needed"


def methods() -> dict[str, str]:
    """Public methods of the trainer that it adds or changes, from whichever class of ours."""
    ours = [cls for cls in DPTrainer.__mro__ if cls.__module__.startswith("hf_dpvision.")]
    names = {name for cls in ours for name in vars(cls) if not name.startswith("_")}
    found = {name: getattr(DPTrainer, name) for name in sorted(names) if callable(getattr(DPTrainer, name))}
    return {name: described(value) + ("" if hasattr(Trainer, name) else ", new") for name, value in found.items()}


def commands() -> dict[str, list[str]]:
    """Commands of the console script and their options."""
    (choices,) = [action.choices for action in parser()._actions if action.dest == "command"]
    return {
        name: sorted(option for action in command._actions for option in action.option_strings or [action.dest])
        for name, command in sorted(choices.items())
    }


if __name__ == "__main__":
    print(json.dumps(current(), indent=1))
