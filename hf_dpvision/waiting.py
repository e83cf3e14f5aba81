"""Something to see on a terminal while something computes that cannot say how long it will take."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


_PATIENCE = 2.0  # seconds
_TICK = 0.5


@contextmanager
def waiting(what: str, patience: float = _PATIENCE, quiet: bool = False) -> Iterator[None]:
    """Show `what` and the time that has passed on standard error, if the block takes longer than `patience` seconds.

    Nothing is shown where standard error is no terminal.

    Args:
        what: is going on.
        patience: seconds.
        quiet: whether nothing is to be shown anyway, because bars were switched off or another process shows it.
    """
    if quiet or not sys.stderr.isatty():
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
