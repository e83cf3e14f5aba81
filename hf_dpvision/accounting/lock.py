"""One trainer per folder: a lock that the operating system gives back when its process dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from hf_dpvision.errors import LedgerRefused


_PATIENCE = 20.0  # seconds; data loading workers hold the lock of a killed trainer until they notice its death


class FolderLock:
    """Holds `path` for this process from construction until `release`.

    Raises:
        LedgerRefused: another process, or another trainer of this one, holds it; the message names its process id.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + _PATIENCE
        while not self._taken():
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            if _lives(holder) or time.monotonic() > deadline:
                os.close(self._descriptor)
                raise LedgerRefused(
                    f"The run in {path.parent.parent.name!r} is being trained by process {holder or 'unknown'}: two "
                    "trainers would overwrite each other's checkpoints and mix what they spend. Wait for it, end it, "
                    "or choose another output_dir."
                )
            time.sleep(0.1)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let others have it. The file stays: removing it would let two processes lock two files of one name."""
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _lives(process: str) -> bool:
    if not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
