"""Something to see on a terminal while a command computes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


_PATIENCE = 2.0  # seconds
_TICK = 0.5


@contextmanager
def waiting(what: str | None, patience: float = _PATIENCE) -> Iterator[None]:
    """Show `what` and the time that has passed on standard error, if the block takes longer than `patience` seconds.

    For commands that do not know how long they will take. Nothing is shown where standard error is no terminal.

    Args:
        what: is going on; None for a command that shows progress of its own.
        patience: seconds.
    """
    if what is None or not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()
    shower = threading.Thread(target=_show, args=(what, patience, ended), daemon=True)
    shower.start()
    try:
        yield
    finally:
        ended.set()
        shower.join()


def _show(what: str, patience: float, ended: threading.Event) -> None:
    if ended.wait(patience):
        return
    with tqdm(desc=what, bar_format="{desc}: {elapsed}", file=sys.stderr, leave=False) as line:
        while not ended.wait(_TICK):
            line.refresh()
