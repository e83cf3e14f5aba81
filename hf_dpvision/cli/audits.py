"""`hf-dpvision audit`: train a recipe with canaries in it, and see what their losses betray."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentRefused
from .commands import Answer, add_command


if TYPE_CHECKING:
    from ..audit import Finding
    from ..trainer import DPTrainer

_AUDIT_HELP = """\
Audit a training recipe in one run. Canaries, examples with wrong labels, go into its training set, each with
probability 1/2; the recipe is trained once; and an auditor who sees the weights before and after guesses which were
in. The guesses give a lower bound of epsilon, which is compared with the claim (Steinke, Nasr, Jagielski 2023). The
trained model is thrown away. Exit code 1 if the bound exceeds the claim.

A bound below the claim proves nothing: see what is printed. The trainer comes from a function of yours,
function(folder, arguments) -> DPTrainer, which returns it untrained, with folder as its output_dir; arguments are
those behind --, which come last, a list of words.

examples:
  hf-dpvision audit recipes/finetune_image_classification.py:audited_trainer
  hf-dpvision audit recipes/linear_probe.py:audited_trainer -- --config recipes/probing/cifar10.yaml
  hf-dpvision audit --canaries 1000 --plot audit.png my_package.training:make_trainer
  hf-dpvision audit --json recipes/finetune_image_classification.py:audited_trainer -- --target_epsilon 8
  hf-dpvision audit hf_dpvision.recipe:audited_trainer -- --config run.yaml
"""
_WEAK = (
    "Such an audit is weak. One run gives one answer per canary; the canaries hide one another, most of them are "
    "never learnt, and only the weights at the two ends were looked at. Noise of half the size usually passes. It "
    "finds gross faults, such as noise that is missing. recipes/audit.py tests the mechanism itself, sampling "
    "included, and finds noise that is a tenth too small."
)
_PRIVATE = (
    "This answer is computed from the training data and is not covered by epsilon: whoever may not see the data "
    "should not see it."
)


def register(commands: Any) -> None:
    """Add the command."""
    audit = add_command(commands, "audit", _AUDIT_HELP, _audit)
    audit.add_argument("factory", help="file.py:function or package.module:function")
    audit.usage = "hf-dpvision audit [options] factory [-- arguments of the function]"
    audit.set_defaults(hands_on_behind=True)
    audit.add_argument("--canaries", type=int, default=400, help="how many (default %(default)s)")
    audit.add_argument("--confidence", type=float, default=0.95, help="of the lower bound (default %(default)s)")
    audit.add_argument("--plot", type=Path, metavar="PNG", help="picture of the scores (needs the extra `audit`)")


def _audit(arguments: argparse.Namespace) -> Answer:
    if not 0 < arguments.confidence < 1:
        raise ArgumentRefused(f"--confidence {arguments.confidence:g} is no probability between 0 and 1. Use 0.95.")
    from ..audit import audit_run, plot  # here: it loads torch and the model libraries

    if arguments.plot is not None:
        plot.refuse_missing()
        if not arguments.plot.absolute().parent.is_dir():
            raise ArgumentRefused(f"--plot {arguments.plot}: there is no such folder, and the picture comes last.")
    factory = _function(arguments.factory)
    # what training prints is not the answer
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        found = audit_run(_made(factory, folder, arguments), arguments.canaries, arguments.confidence)
    if arguments.plot is not None:
        plot.draw(found, arguments.plot)
    return Answer(found.to_dict(), _told(found), 1 if found.violated else 0)


def _made(factory: Callable[[str, list[str]], DPTrainer], folder: str, arguments: argparse.Namespace) -> DPTrainer:
    from ..trainer import DPTrainer

    trainer = factory(folder, arguments.rest)
    if not isinstance(trainer, DPTrainer):
        raise ArgumentRefused(f"{arguments.factory} returned a {type(trainer).__name__} and not a DPTrainer.")
    return trainer


def _function(name: str) -> Callable[[str, list[str]], DPTrainer]:
    where, _, function = name.rpartition(":")
    if not where:
        raise ArgumentRefused(f"{name!r} names no function. Write file.py:function or package.module:function.")
    module = _loaded(Path(where)) if where.endswith(".py") else _imported(where)
    found = getattr(module, function, None)
    if not callable(found):
        raise ArgumentRefused(f"{where} has no function {function!r} that returns a trainer.")
    return found


def _loaded(file: Path) -> ModuleType:
    if not file.is_file():
        raise ArgumentRefused(f"There is no file {file}.")
    name = f"audited_{file.stem}"  # no module that is already there
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ArgumentRefused(f"{file} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look themselves up
    with _importable(file.resolve().parent):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """A block in which what lies in the folder can be imported, as by a script that is run from there."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ArgumentRefused(f"{name} cannot be imported ({error}). Is its folder on the path?") from error


def _told(found: Finding) -> str:
    from ..accounting.claim import round_down, round_up

    lines = [
        f"Audit in one training run: {found.canaries} canaries, {found.included} of them in.",
        f"  claimed      epsilon <= {round_up(found.claimed)} at delta = {found.delta:g}",
        f"  lower bound  epsilon >= {round_down(found.lower)} with confidence {found.confidence:.1%} "
        f"({found.right} of {found.guesses} guesses right)",
        "",
    ]
    if found.violated:
        lines.append(
            "VIOLATION: the run betrays more than it claims, or this is one of the "
            f"{1 - found.confidence:.1%} of audits that err. Repeat it; if it happens again, do not release the model."
        )
    else:
        lines += ["No violation detected.", _WEAK]
    return "\n".join([*lines, _PRIVATE])
