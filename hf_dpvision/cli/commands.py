"""What all commands share: how one is registered, and what it answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a command answers.

    Args:
        report: plain values for `--json`.
        text: the same for people.
        code: exit code; 0 unless what was asked about is not as it should be.
        silent: whether everything has been said already, or another process says it.
    """

    report: Any
    text: str
    code: int = 0
    silent: bool = False


def add_command(
    commands: Any,
    name: str,
    text: str,
    answer: Callable[[argparse.Namespace], Answer],
    waits: str | None = None,
) -> argparse.ArgumentParser:
    """Register a command and return its parser.

    Args:
        commands: the subparsers of the console script.
        name: of the command.
        text: its help, examples included, each on a line of its own that starts with `hf-dpvision`.
        answer: what it does.
        waits: what is said on a terminal while it computes; None if it shows progress of its own.
    """
    command = commands.add_parser(
        name,
        help=text.partition(".")[0],
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    # a command that hands on what our parser does not know, anywhere or behind `--`, says so itself
    command.set_defaults(answer=answer, parser=command, waits=waits, hands_on=False, hands_on_behind=False)
    return command
