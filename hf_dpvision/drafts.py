"""A checkpoint takes its place among the others only when all of it is on the disk; until then it is a draft.

The draft is written beside them under a name that nobody takes for a checkpoint's. Its files get checksums, are
synchronised with the disk, and are moved as one folder. A crash, a full disk or a loss of power in between leaves the
older checkpoints as they were.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import processes
from .accounting.journal import sync
from .errors import CheckpointError, DPVisionError


CHECKSUMS = "checksums.json"  # file name -> SHA-256; written last
_DRAFTS = "_unfinished-checkpoint"  # the Hub ignores names with an underscore in front


class Draft:
    """A checkpoint while it is being written.

    Args:
        run_dir: the folder that has the checkpoints.
        name: of the checkpoint.

    Attributes:
        root: to be taken for `run_dir` by whoever writes the files.
        folder: where the files go.
        place: where they will be.
    """

    def __init__(self, run_dir: str | Path, name: str) -> None:
        self.root = Path(run_dir) / _DRAFTS
        self.folder = self.root / name
        self.place = Path(run_dir) / name

    def publish(self, checksums: bool) -> None:
        """Put the finished draft in its place; a checkpoint of the same name, from before a resume, makes way.

        Args:
            checksums: whether to write them, in the process that has written the checkpoint; a process with a disk of
                its own has the states of its generators there, and no more.

        Raises:
            OSError: the disk is full or cannot be written to.
        """
        if checksums:
            (self.folder / CHECKSUMS).write_text(json.dumps(checksums_of(self.folder), indent=2), encoding="utf-8")
        for path in self.folder.rglob("*"):
            sync(path)
        sync(self.folder)
        if self.place.exists():
            self.place.rename(self.root / "replaced")
        self.folder.rename(self.place)
        sync(self.place.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the draft, whatever there is of it."""
        shutil.rmtree(self.root, ignore_errors=True)

    @contextmanager
    def by_all(self, device: torch.device) -> Iterator[None]:
        """Around a part of the writing: every process succeeds, or none does and no draft is left.

        Raises:
            CheckpointError: in every process, if one of them failed.
            ProcessLost: another process has ended.
        """
        try:
            yield
        except DPVisionError:
            raise
        except Exception as error:  # torch, safetensors and the operating system each have their own for a full disk
            processes.any_of(True, device)  # first: another process must not find its folder gone before it is told
            self.discard()
            raise self._failed(f"{type(error).__name__}: {error}") from error
        if processes.any_of(False, device):
            self.discard()
            raise self._failed("another process failed to write its part")

    def _failed(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.place.name} could not be saved ({why}), and nothing of it was left behind. The checkpoints before "
            "it are whole, and every step taken is in the ledger. Make room, or mend what failed, and go on with "
            "train(resume_from_checkpoint=True)."
        )


def discard_drafts(run_dir: str | Path) -> None:
    """Remove what a run that was killed while it saved has left; for whoever holds the lock of the folder."""
    shutil.rmtree(Path(run_dir) / _DRAFTS, ignore_errors=True)


def checksums_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below `folder` by its relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {path.relative_to(folder).as_posix(): checksum(path) for path in files}


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
