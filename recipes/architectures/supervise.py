"""Architectures one after another in a child process with limits, so that a crash costs one of them."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import psutil

from .check import Result, family


# A child is replaced after so many architectures, since what a library caches is never given back.
LIFETIME = 100
SECONDS_BETWEEN_LOOKS = 0.5
# Forked, so that a new child need not import the libraries again; nothing here uses threads or a device.
FORKED = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Limits:
    """Of one architecture.

    Args:
        seconds: of the child's processor time; what else the machine does must not decide.
        bytes: of memory of the child that is not shared with files.
    """

    seconds: float
    bytes: int


class Child:
    """A process that answers one architecture after another."""

    def __init__(self, check: Callable[[str], Result]) -> None:
        self._connection, other = FORKED.Pipe()
        self._process = FORKED.Process(target=_serve, args=(other, check), daemon=True)
        self._process.start()
        other.close()
        self.served = 0

    def ask(self, name: str, limits: Limits) -> Result | str:
        """The answer, or why there is none; after the latter the child is gone."""
        self.served += 1
        self._connection.send(name)
        before, _ = self._spent()
        while not self._connection.poll(SECONDS_BETWEEN_LOOKS):
            seconds, used = self._spent()
            if seconds - before > limits.seconds:
                return self._gone(f"takes more than {limits.seconds:.0f} s of processor time")
            if used > limits.bytes:
                return self._gone(f"needs more than {limits.bytes / 2**30:.0f} GiB")
        try:
            return self._connection.recv()
        except EOFError:
            return self._gone("the process ended")

    def close(self) -> None:
        self._connection.send(None)  # closing is not enough: a forked child holds this end as well
        self._process.join()
        self._connection.close()

    def _gone(self, why: str) -> str:
        self._process.kill()
        self._process.join()
        return why

    def _spent(self) -> tuple[float, int]:
        """Processor time so far, and bytes of memory now; zeros where the child has ended."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self._process.pid)
            times, memory = process.cpu_times(), process.memory_info()
            return times.user + times.system, memory.rss - memory.shared
        return 0.0, 0


def checked(
    wanted: Iterable[str | Result], check: Callable[[str], Result], limits: Limits
) -> Iterator[Result]:
    """The result of each; one whose process was stopped or crashed is "too large", with a reason.

    Args:
        wanted: names, and results that are known already and passed on.
        check: run in the child.
        limits: of one architecture.
    """
    child = None
    for name in wanted:
        if isinstance(name, Result):
            yield name
            continue
        child = child or Child(check)
        answer = child.ask(name, limits)
        if isinstance(answer, str):
            child = None
            answer = Result(name, family(name), "too large", answer)
        yield answer
        if child is not None and child.served >= LIFETIME:
            child.close()
            child = None
    if child is not None:
        child.close()


def _serve(connection: Connection, check: Callable[[str], Result]) -> None:
    while (name := connection.recv()) is not None:
        connection.send(check(name))
