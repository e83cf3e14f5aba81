"""The trainer's own look at the labels, where they can be read without decoding a picture."""

from __future__ import annotations

from typing import Any

from datasets import ClassLabel, Dataset, Value

from ..errors import DataRefused
from .examples import ImageExamples
from .validation import check_labels


def refuse_labels(dataset: Any, num_labels: int) -> None:
    """Check that every class label of `dataset` is a whole number in `0 .. num_labels - 1`, if that is cheap.

    It is for `ImageExamples`, and for a `datasets.Dataset` without a transform whose column "labels" or "label" holds
    whole numbers. Other data sets pass unseen: there a wrong label contributes nothing when it is met. With one output
    (`num_labels` 1) labels are not classes, and nothing is checked.

    Raises:
        DataRefused: naming the first example whose label is missing or outside the classes, or the number of
            declared classes where the model has another number of outputs.
    """
    if num_labels < 2:
        return
    names = [str(label) for label in range(num_labels)]
    if isinstance(dataset, ImageExamples):
        _refuse_other_count(dataset.rows.features[dataset.columns.label], dataset.columns.label, num_labels)
        check_labels(dataset.rows, dataset.columns.label, names, dataset.part)
    elif isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        for column in ("labels", "label"):
            feature = dataset.features.get(column)
            if isinstance(feature, ClassLabel) or isinstance(feature, Value) and "int" in feature.dtype:
                _refuse_other_count(feature, column, num_labels)
                check_labels(dataset, column, names)


def _refuse_other_count(feature: Any, column: str, num_labels: int) -> None:
    if isinstance(feature, ClassLabel) and feature.num_classes != num_labels:
        raise DataRefused(
            f"Column {column!r} declares {feature.num_classes} classes and the model has {num_labels} outputs: the "
            f"same number would mean different classes. Load the model with num_labels={feature.num_classes}."
        )
