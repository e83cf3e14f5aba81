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
    """

    report: Any
    text: str
    code: int = 0


def add_command(
    commands: Any, name: str, text: str, answer: Callable[[argparse.Namespace], Answer]
) -> argparse.ArgumentParser:
    """Register a command whose help is `text`, examples included, and return its parser."""
    command = commands.add_parser(
        name,
        help=text.partition(".")[0],
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.set_defaults(answer=answer)
    return command
