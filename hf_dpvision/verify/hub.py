"""A model on the Hub as a folder: its names, and the content of the two files that speak; no weights are fetched."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # of whichever client it uses; its own errors derive from it

from ..accounting.journal import FILE, FOLDER
from ..errors import ArgumentRefused, DPVisionError
from ..model_card import CARD_NAME
from .schema import STATEMENT_FILE


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_READ = (CARD_NAME, STATEMENT_FILE, f"{FOLDER}/{FILE}")


@contextmanager
def fetched(folder_or_id: str) -> Iterator[Path]:
    """Lend the folder, or a copy of a Hub model in which every file but those that are read is empty.

    All files are those of one commit, so that the list and the content belong together.

    Raises:
        ArgumentRefused: neither a folder nor a Hub id.
        DPVisionError: the Hub does not answer, or does not have the model.
    """
    if Path(folder_or_id).is_dir():
        yield Path(folder_or_id)
        return
    if _HUB_ID.fullmatch(folder_or_id) is None or folder_or_id.startswith("."):
        raise ArgumentRefused(f"{folder_or_id!r} is neither a folder nor a Hub id such as owner/name.")
    with tempfile.TemporaryDirectory() as scratch:
        _copy(folder_or_id, Path(scratch))
        yield Path(scratch)


def _copy(hub_id: str, target: Path) -> None:
    api = HfApi()
    try:
        info = api.model_info(hub_id)
        for name in (sibling.rfilename for sibling in info.siblings or ()):
            path = (target / name).resolve()
            if not path.is_relative_to(target.resolve()):
                raise DPVisionError(f"{hub_id!r} has a file named {name!r}, which points out of its folder.")
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in _READ:
                cached = api.hf_hub_download(hub_id, name, revision=info.sha)
                path.write_bytes(Path(cached).read_bytes())
            else:
                path.touch()
    except (HTTPError, OSError) as error:
        raise DPVisionError(f"{hub_id!r} is no folder here, and could not be had from the Hub ({error}).") from error
