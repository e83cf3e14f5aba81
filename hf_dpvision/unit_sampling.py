"""From drawn units to the rows that take part: at most k of each, chosen anew at every step by a keyed function."""

from __future__ import annotations

import hashlib

import numpy as np

from .data.grouping import Units
from .data.units import NO_ROW
from .sampling import PoissonSampler


class UnitSampler:
    """Draw logical batches of units, and for each drawn unit the rows by which it takes part.

    Guarantee: units are drawn by `sampler`, independently of one another and of their sizes. Of a unit with more than
    `most` rows a uniformly random set of `most` takes part. It is a function of (key, step, unit) and of the number of
    the unit's own rows, so that no other unit has any influence on it, and every process and repetition agrees.

    Args:
        sampler: draws numbers of units.
        units: the rows of each.
        key: the secret key of the sampler; words for draws and for choices are independent.
        most: k, the most rows of one unit in one step, at least 1.
    """

    def __init__(self, sampler: PoissonSampler, units: Units, key: bytes, most: int) -> None:
        self._sampler, self._units, self._key, self._most = sampler, units, key, most

    def share(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        """Return for each unit of this process's part of the draw its `most` rows, filled up with `NO_ROW`."""
        chosen = (self._chosen(step, unit).tolist() for unit in self._sampler.share(step, rank, world_size))
        return [rows + [NO_ROW] * (self._most - len(rows)) for rows in chosen]

    def done_before(self, step: int) -> None:
        """Nothing is kept for a step."""

    def _chosen(self, step: int, unit: int) -> np.ndarray:
        rows = self._units.rows_of(unit)
        if len(rows) <= self._most:
            return rows
        message = step.to_bytes(8, "little") + unit.to_bytes(8, "little")
        digest = hashlib.blake2b(message, key=self._key, digest_size=16, person=b"hf_dpvision rows").digest()
        words = np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64)).random_raw(len(rows))
        return rows[np.sort(np.argsort(words, kind="stable")[: self._most])]  # the places of the smallest words
