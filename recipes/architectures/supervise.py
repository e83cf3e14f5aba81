"""Architectures one after another in a child process with limits, so that a crash costs one of them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil


# A child is replaced after so many architectures, since what a library caches is never given back.
LIFETIME = 60
SECONDS_BETWEEN_LOOKS = 0.2


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
    """A process that reads one JSON line per architecture and answers with one."""

    def __init__(self, command: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self.served = 0

    def ask(self, request: dict[str, Any], limits: Limits) -> dict[str, Any] | str:
        """The answer, or why there is none; after the latter the child is gone."""
        self.served += 1
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        before, _ = self._spent()
        while not self._selector.select(SECONDS_BETWEEN_LOOKS):
            seconds, used = self._spent()
            if seconds - before > limits.seconds:
                return self._gone(f"takes more than {limits.seconds:.0f} s of processor time")
            if used > limits.bytes:
                return self._gone(f"needs more than {limits.bytes / 2**30:.0f} GiB")
        line = self._process.stdout.readline()
        return json.loads(line) if line else self._gone("the process ended")

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def _gone(self, why: str) -> str:
        self._process.kill()
        self._process.wait()
        return why

    def _spent(self) -> tuple[float, int]:
        """Processor time so far, and bytes of memory now; zeros where the child has ended."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self._process.pid)
            times, memory = process.cpu_times(), process.memory_info()
            return times.user + times.system, memory.rss - memory.shared
        return 0.0, 0


def checked(requests: Iterable[dict[str, Any]], script: str, limits: Limits) -> Iterator[dict[str, Any]]:
    """The answer to each request; one that was stopped or crashed is answered with its name and a reason.

    Args:
        requests: each with a `name`; one with a `status` is an answer already.
        script: run with `--child`.
        limits: of one request.
    """
    child = None
    for request in requests:
        if "status" in request:
            yield request
            continue
        child = child or Child([sys.executable, script, "--child"])
        answer = child.ask(request, limits)
        if isinstance(answer, str):
            child = None
            answer = {"name": request["name"], "status": "too large", "reason": answer}
        yield answer
        if child is not None and child.served >= LIFETIME:
            child.close()
            child = None
    if child is not None:
        child.close()


def serve(check: Any) -> None:
    """Answer requests from standard input until it ends; whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        answers.write(json.dumps(asdict(check(**json.loads(line)))) + "\n")
        answers.flush()
