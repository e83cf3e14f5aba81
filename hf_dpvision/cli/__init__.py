"""The console script `hf-dpvision`: costs, plans of runs and of models, whether a statement is true, an audit.

Exit codes: 0 answered, and verified where that was asked; 1 the question is well formed but has no answer (a model
that is refused, accountants that disagree), a statement is not verified, or an audit contradicts a claim; 2 the
command line, or one of its values, is wrong. Errors are one line on standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ..errors import ArgumentRefused, DPVisionError
from . import audits, costs, planning, plans, statements


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script and return its exit code.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Raises:
        SystemExit: code 2 from argparse for a malformed command line, code 0 after `--help`.
    """
    arguments = _parser().parse_args(argv)
    try:
        answer = arguments.answer(arguments)
    except DPVisionError as error:
        print(f"hf-dpvision {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentRefused) else 1
    print(json.dumps(answer.report, indent=2, allow_nan=False) if arguments.json else answer.text)
    return answer.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-dpvision", description="Differentially private fine-tuning, accounted.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for group in (costs, planning, plans, statements, audits):
        group.register(commands)
    return parser
