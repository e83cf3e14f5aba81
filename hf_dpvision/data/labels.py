"""The trainer's own look at the labels, where they can be read without decoding a picture."""

from __future__ import annotations

from typing import Any

from datasets import ClassLabel, Dataset, Value

from .examples import ImageExamples
from .validation import check_labels


def refuse_labels(dataset: Any, num_labels: int) -> None:
    """Check that every class label of `dataset` is a whole number in `0 .. num_labels - 1`, if that is cheap.

    It is for `ImageExamples`, and for a `datasets.Dataset` without a transform whose column "labels" or "label" holds
    whole numbers. Other data sets pass unseen: there a wrong label contributes nothing when it is met. With one output
    (`num_labels` 1) labels are not classes, and nothing is checked.

    Raises:
        DataRefused: naming the first example whose label is missing or outside the classes.
    """
    if num_labels < 2:
        return
    names = [str(label) for label in range(num_labels)]
    if isinstance(dataset, ImageExamples):
        check_labels(dataset.rows, dataset.columns.label, names, dataset.part)
    elif isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        for column in ("labels", "label"):
            feature = dataset.features.get(column)
            if isinstance(feature, ClassLabel) or isinstance(feature, Value) and "int" in feature.dtype:
                check_labels(dataset, column, names)
