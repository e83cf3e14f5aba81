from __future__ import annotations

import hashlib

import numpy as np
import sklearn.datasets

from hf_dpvision.data import load_digits


def test_every_scan_is_in_exactly_one_part():
    digits = load_digits()
    assert {part: len(rows) for part, rows in digits.items()} == {"train": 1437, "test": 360}
    stored = [np.asarray(row["image"]).tobytes() for part in digits.values() for row in part]
    scans = np.rint(sklearn.datasets.load_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(stored) == sorted(scan.tobytes() for scan in scans)


def test_the_held_out_part_never_changes():
    held_out = load_digits()["test"]
    digest = hashlib.sha256(bytes(held_out["label"][:]))
    for row in held_out:
        digest.update(np.asarray(row["image"]).tobytes())
    assert digest.hexdigest() == "c54edd63473679a3800738df76f6cde4d60e76f823cacd9d758b8443b1d65c07"
    assert set(held_out["label"]) == set(range(10))
