"""What all labs share: parts, a folder, and how a run is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .data import Passing, Visits
from .models import Pictures, everything
from .parts import Parts
from .runs import Seen, run


NOISELESS = 1e-7  # a noise multiplier whose noise is far below the tolerances
BOUND = 1.0  # C lies among the norms of the examples


class Bench:
    """Runs of a trainer made of these parts.

    Args:
        parts: honest, or with one fault.
        folder: for the outputs of the runs.
    """

    def __init__(self, parts: Parts, folder: Path) -> None:
        self.parts, self.folder = parts, folder

    def _run(self, name: str, dataset: Pictures | Visits | Passing, **settings: Any) -> Seen:
        model = settings.pop("model", None) or everything()
        return run(self.parts, self.folder / name, dataset, model, **settings)
