"""Scikit-learn's 1,797 scanned handwritten digits, with a held-out part that never changes.

Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits" (UCI), the copy that ships inside
scikit-learn: real handwriting of several people, 8 x 8 pixels, 17 grey levels. No network is needed.
"""

from __future__ import annotations

import io

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits as _load_scans


TEST_SIZE = 360
_SPLIT_SEED = 0  # RandomState's stream is frozen by numpy, so the held-out part is the same everywhere


def load_digits() -> DatasetDict:
    """Return the scans as `{"train": 1437 rows, "test": 360 rows}` with columns `image` and `label` (ten classes).

    Grey levels 0..16 become 0..255, bright ink on black, as stored. The split is a fixed permutation that does not
    look at the images or labels; the same people wrote both parts (the copy does not say who wrote what).
    """
    scans = _load_scans()
    pixels = np.rint(scans.images * (255 / 16)).astype(np.uint8)
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(pixels))
    parts = {"train": np.sort(order[TEST_SIZE:]), "test": np.sort(order[:TEST_SIZE])}
    return DatasetDict({name: _part(pixels[rows], scans.target[rows]) for name, rows in parts.items()})


def _part(pixels: np.ndarray, labels: np.ndarray) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    columns = {"image": [{"bytes": _png(scan), "path": None} for scan in pixels], "label": labels.tolist()}
    return Dataset.from_dict(columns, features=features)


def _png(scan: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(scan).save(buffer, format="PNG")
    return buffer.getvalue()
