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
from ..waiting import waiting
from . import audits, costs, planning, plans, statements, training


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
    words, behind = split_words(sys.argv[1:] if argv is None else argv)
    arguments, unknown = parser().parse_known_args(words)
    if unknown and not arguments.hands_on:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if behind and not arguments.hands_on_behind:
        arguments.parser.error(f"unrecognized arguments: -- {' '.join(behind)}")
    arguments.rest = [*unknown, *behind]
    try:
        with waiting(arguments.waits or "", quiet=arguments.waits is None):
            answer = arguments.answer(arguments)
    except DPVisionError as error:
        print(f"hf-dpvision {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentRefused) else 1
    if not answer.silent:
        print(json.dumps(answer.report, indent=2, allow_nan=False) if arguments.json else answer.text)
    return answer.code


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words before the first `--`, and those behind it, which are not for our parser."""
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    return words[:end], words[end + 1 :]


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
