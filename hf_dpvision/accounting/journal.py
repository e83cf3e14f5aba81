"""The durable ledger: an append-only, chained file that has every step before anything of the step is used.

One JSON record per line, each with `chain` = SHA-256 of the chain of the line before and of its own content:

    {"kind": "run", ...}    first line: format, run id, unit of privacy, neighbouring relation
    {"kind": "train", ...}  one per call of `train()`: the public facts that fix the mechanism, see `run.py`
    {"kind": "step", ...}   one per charged step: sample rate and noise multiplier

Nothing in it depends on who was sampled, and there is no key, no seed and no time. The chain shows accidents and
careless edits; whoever rewrites the whole file on purpose can rewrite the chain as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_dpvision.errors import ArgumentRefused, LedgerError, LedgerRefused

from .events import Event
from .ledger import Ledger
from .lock import FolderLock


FOLDER = "privacy"
FILE = "ledger.jsonl"
LOCK = "lock"
_FORMAT, _VERSION = "hf_dpvision.journal", 1
_ORIGIN = "0" * 64
_KEYS = {
    "run": {"kind", "format", "version", "run_id", "privacy_unit", "neighboring_relation", "chain"},
    "train": {"kind", "facts", "chain"},
    "step": {"kind", "sample_rate", "noise_multiplier", "chain"},
}


@dataclass(frozen=True)
class Mark:
    """A place in a journal: what a checkpoint remembers of it.

    Attributes:
        run_id: of the first line.
        records: lines up to here.
        chain: of the last of them.
    """

    run_id: str
    records: int
    chain: str


@dataclass(frozen=True)
class History:
    """What a journal says.

    Attributes:
        run_id: of the first line.
        calls: facts of each call of `train()`, in order.
        ledger: every step charged, a torn last line included.
        chains: of every whole line.
        steps_before: number of steps charged up to and including each whole line.
        torn_at: offset of the torn last line in bytes, None if the file ends well.
    """

    run_id: str
    calls: tuple[Mapping[str, Any], ...]
    ledger: Ledger
    chains: tuple[str, ...]
    steps_before: tuple[int, ...]
    torn_at: int | None

    def contains(self, mark: Mark) -> bool:
        """Whether this journal went through `mark`."""
        inside = 0 < mark.records <= len(self.chains)
        return inside and mark.run_id == self.run_id and self.chains[mark.records - 1] == mark.chain


def read_journal(folder: str | Path) -> History | None:
    """Read `privacy/ledger.jsonl` below `folder` and check every line; None if there is no such file.

    A last line that was not written to its end counts as a step: its noise may have been meant to follow.

    Raises:
        LedgerRefused: a line was changed, left out, added or cannot be read.
    """
    path = Path(folder) / FOLDER / FILE
    if not path.exists():
        return None
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    records = _checked(path, (whole + newline).splitlines(keepends=True))
    calls, ledger, counts = [], Ledger(), []
    for record in records:
        if record["kind"] == "train":
            calls.append(record["facts"])
        elif record["kind"] == "step":
            ledger.charge(record["sample_rate"], record["noise_multiplier"])
        counts.append(ledger.steps)
    if torn:
        ledger.charge(calls[-1]["sample_rate"], calls[-1]["noise_multiplier"])
    return History(
        run_id=records[0]["run_id"],
        calls=tuple(calls),
        ledger=ledger,
        chains=tuple(record["chain"] for record in records),
        steps_before=tuple(counts),
        torn_at=len(whole + newline) if torn else None,
    )


class Journal:
    """The open ledger file of one call of `train()`; one process writes it, and no other can meanwhile.

    Guarantee: when `charge` returns, the step is on the disk; when it raises, the step must not be taken.

    Args:
        folder: the output folder; the file is `privacy/ledger.jsonl` below it.

    Raises:
        LedgerRefused: the folder is being trained in, or what lies there cannot be trusted.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self._path = self.folder / FOLDER / FILE
        try:
            _make_folder(self._path.parent)
            self._lock = FolderLock(self._path.parent / LOCK)
        except OSError as error:
            raise _unwritable(error) from error
        self._descriptor: int | None = None
        self.mark: Mark | None = None
        try:
            self.history = read_journal(self.folder)
        except (LedgerRefused, OSError):
            self._lock.release()
            raise

    def start(self, facts: Mapping[str, Any], *, privacy_unit: str, neighboring_relation: str) -> None:
        """Write that `train()` is called with these facts, into a new file if there is none yet.

        A torn last line is replaced by the step it is counted as, without a moment in which it is not counted.
        """
        if self.history is None:
            self._create(facts, privacy_unit, neighboring_relation)
        else:
            self.mend()
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        if self.history is not None:
            self._append({"kind": "train", "facts": dict(facts)})

    def mend(self) -> Mark:
        """Replace a torn last line by the step it is counted as, and return where the ledger stands."""
        if self.history is None:
            raise LedgerError("There is no ledger whose last line could be torn. Call start().")
        chains = self.history.chains
        self.mark = self._repaired(self.history, Mark(self.history.run_id, len(chains), chains[-1]))
        return self.mark

    def charge(self, sample_rate: float, noise_multiplier: float) -> None:
        """Put one step on the disk.

        Raises:
            LedgerError: it could not be written, for example because the disk is full.
        """
        self._append(_step(sample_rate, noise_multiplier))

    def close(self) -> None:
        """End writing and let other trainers have the folder; `mark` stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._lock.release()

    def _append(self, content: dict[str, Any]) -> None:
        if self._descriptor is None or self.mark is None:
            raise LedgerError("The ledger is closed: steps are taken inside train() only. Call train().")
        line, chain = _line(self.mark.chain, content)
        try:
            written = os.write(self._descriptor, line)
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._failed(error) from error
        if written != len(line):
            raise self._failed(OSError(f"{written} of {len(line)} bytes were written"))
        self.mark = Mark(self.mark.run_id, self.mark.records + 1, chain)

    def _failed(self, error: OSError) -> LedgerError:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None  # nothing may follow a line that could be torn
        return LedgerError(
            f"The ledger {FOLDER}/{FILE} could not be written ({error}): a step that is not written down must not be "
            "taken, so no noise was drawn and training stops. Make room and resume from the last checkpoint."
        )

    def _create(self, facts: Mapping[str, Any], privacy_unit: str, neighboring_relation: str) -> None:
        run_id = str(uuid.uuid4())
        head = {"kind": "run", "format": _FORMAT, "version": _VERSION, "run_id": run_id}
        head |= {"privacy_unit": privacy_unit, "neighboring_relation": neighboring_relation}
        first, chain = _line(_ORIGIN, head)
        second, chain = _line(chain, {"kind": "train", "facts": dict(facts)})
        draft = self._path.with_suffix(".new")
        try:
            with draft.open("wb") as file:
                file.write(first + second)
                file.flush()
                os.fsync(file.fileno())
            draft.rename(self._path)
            sync(self._path.parent)
        except OSError as error:
            raise _unwritable(error) from error
        self.mark = Mark(run_id, 2, chain)

    def _repaired(self, history: History, mark: Mark) -> Mark:
        if history.torn_at is None:
            return mark
        facts = history.calls[-1]
        line, chain = _line(mark.chain, _step(facts["sample_rate"], facts["noise_multiplier"]))
        try:
            with self._path.open("r+b", buffering=0) as file:
                file.seek(history.torn_at)
                file.write(line)
                file.truncate()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(error) from error
        return Mark(mark.run_id, mark.records + 1, chain)


def _step(sample_rate: float, noise_multiplier: float) -> dict[str, Any]:
    return {"kind": "step", "sample_rate": float(sample_rate), "noise_multiplier": float(noise_multiplier)}


def _line(before: str, content: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return the line of a record and its chain; the text of a record is unique, so any change of it shows."""
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    chain = hashlib.sha256(f"{before}{text}".encode()).hexdigest()
    return (json.dumps({**content, "chain": chain}, sort_keys=True, allow_nan=False) + "\n").encode(), chain


def _checked(path: Path, lines: list[bytes]) -> list[dict[str, Any]]:
    """Parse whole lines and compare each with what this module would have written.

    Raises:
        LedgerRefused: naming the line.
    """
    records: list[dict[str, Any]] = []
    chain = _ORIGIN
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            expected, chain = _line(chain, {name: value for name, value in record.items() if name != "chain"})
            known = set(record) == _KEYS[record["kind"]] and expected == line
            if record["kind"] == "step":
                Event(record["sample_rate"], record["noise_multiplier"])
        except (ValueError, KeyError, AttributeError, TypeError, ArgumentRefused):
            known = False
        if not known:
            raise _broken(path, f"line {number} was changed, or a line before it was removed or added")
        records.append(record)
    kinds = [record["kind"] for record in records]
    if kinds[:2] != ["run", "train"] or "run" in kinds[1:]:
        raise _broken(path, "its first lines are not those of a run")
    if (records[0]["format"], records[0]["version"]) != (_FORMAT, _VERSION):
        raise _broken(path, f"it is of version {records[0]['version']!r} and this release reads {_VERSION}")
    return records


def _broken(path: Path, what: str) -> LedgerRefused:
    return LedgerRefused(
        f"The ledger {path.parent.parent.name}/{FOLDER}/{path.name} cannot be trusted: {what}. What the run spent "
        "cannot be known from it. Restore the file from a copy, or start anew in another output_dir; the epsilons of "
        "both runs add up."
    )


def _unwritable(error: OSError) -> LedgerError:
    return LedgerError(
        f"The ledger {FOLDER}/{FILE} could not be made ready ({error}), so nothing was trained. Make room, or choose "
        "an output_dir that can be written to."
    )


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)
        sync(folder)


def sync(path: Path) -> None:
    """Return when a file, or the list of names of a folder, is on the disk and would survive a loss of power.

    Raises:
        OSError: it could not be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
