"""The console script `hf-dpvision`: costs, plans, training, truth of a statement, audits.

Every command has `--help` with examples, and `--json`. Errors are one line on standard error. Exit codes:

* 0: answered, and verified where that was asked.
* 1: the question is well formed, and the answer is no: a model or data that is refused, accountants that disagree, a
  statement that is not verified, an audit that contradicts a claim, a run that could not go on.
* 2: the command line, or one of its values, is wrong.
* 143: SIGTERM ended a training run, behind a step of which there is a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import ArgumentRefused, DPVisionError
from . import audits, costs, planning, plans, statements, training
from .waiting import waiting


_CODES = """\
Every command has --help with examples, and --json.

exit codes:
  0    answered; verified, where that was asked
  1    refused, not verified, or a finding
  2    the command line, or one of its values, is wrong
  143  SIGTERM ended a training run, of which there is a checkpoint
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script and return its exit code.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Raises:
        SystemExit: code 2 from argparse for a malformed command line, code 0 after `--help`, code 143 as said above.
    """
    arguments, arguments_of_run = parser().parse_known_args(argv)
    if arguments_of_run and not arguments.hands_on:
        arguments.parser.error(f"unrecognized arguments: {' '.join(arguments_of_run)}")
    arguments.rest = arguments_of_run
    try:
        with waiting(arguments.waits):
            answer = arguments.answer(arguments)
    except DPVisionError as error:
        print(f"hf-dpvision {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentRefused) else 1
    if not answer.silent:
        print(json.dumps(answer.report, indent=2, allow_nan=False) if arguments.json else answer.text)
    return answer.code


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, all commands registered."""
    whole = argparse.ArgumentParser(
        prog="hf-dpvision",
        description="Differentially private fine-tuning, accounted.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"hf_dpvision {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    for group in (costs, planning, plans, training, statements, audits):
        group.register(commands)
    return whole
