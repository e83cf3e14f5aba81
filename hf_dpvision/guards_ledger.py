"""Whether the ledger on disk is that of the run at hand."""

from __future__ import annotations

from .accounting.journal import FILE, FOLDER, History, Journal
from .checkpoints import ResumePoint
from .errors import LedgerRefused


def resumable(history: History | None, point: ResumePoint, folder: str) -> History:
    """Return the history, if it is that of the run which is to be resumed.

    Args:
        history: of the ledger on disk; None if there is none.
        point: where the run is taken up.
        folder: name of the output folder.

    Raises:
        LedgerRefused: it is missing, or another one, or does not have what the checkpoint has.
    """
    where = f"{folder}/{FOLDER}/{FILE}"
    if history is None:
        raise LedgerRefused(
            f"There is no {where}: what the run has spent is in its ledger and nowhere else, so that it cannot be "
            "continued without it. Restore the file, or set output_dir to the folder that has it."
        )
    if point.folder is None:
        return history
    if point.mark is None:
        raise LedgerRefused(
            f"{point.folder.name} names no ledger: it was saved without privacy, or by a release that kept none. "
            "Start a new run from its weights; nothing can be claimed for what they have seen."
        )
    if not history.contains(point.mark) or history.steps_before[point.mark.records - 1] < point.step:
        raise LedgerRefused(
            f"{point.folder.name} was saved when the ledger of run {point.mark.run_id} had {point.mark.records} "
            f"records; {where} is of run {history.run_id}, has {len(history.chains)} records, and did not go through "
            "that state. It is another run's, or an older copy, and would hide what was spent. Restore the right one."
        )
    return history


def refuse_another_run(history: History | None, earlier: Journal, now: Journal) -> None:
    """Raise unless the ledger on disk has what this trainer wrote into it.

    Args:
        history: of the ledger on disk; None if there is none.
        earlier: the ledger at the last call of `train()`.
        now: that of this call.

    Raises:
        LedgerRefused: it was removed or replaced, or lies in another folder.
    """
    if now.folder != earlier.folder:
        raise LedgerRefused(
            f"output_dir was {earlier.folder.name!r} at the first train() and is {now.folder.name!r} now: the ledger "
            "of a run stays where it is. Set it back, or make a new DPTrainer; its epsilon adds to what was spent."
        )
    if history is None or not history.contains(earlier.mark):
        raise LedgerRefused(
            f"{now.folder.name}/{FOLDER}/{FILE} no longer has what this trainer wrote into it: it was removed or "
            "replaced. Restore it from a copy."
        )
