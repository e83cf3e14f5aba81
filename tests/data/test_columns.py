from __future__ import annotations

import pytest
from datasets import ClassLabel, Features, Image, Value

from hf_dpvision.data import Columns, find_columns
from hf_dpvision.errors import DataRefused


CLASSES = ClassLabel(names=["a", "b"])


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"img": Image(), "label": CLASSES}, ("img", "label")),  # cifar10
        ({"img": Image(), "fine_label": CLASSES, "coarse_label": CLASSES}, ("img", "fine_label")),  # cifar100
        ({"image_file_path": Value("string"), "image": Image(), "labels": CLASSES}, ("image", "labels")),  # beans
        ({"photo": Image(), "species": CLASSES}, ("photo", "species")),  # the only ones of their type
        ({"img": Image(), "image": Image(), "labels": CLASSES, "label": CLASSES}, ("image", "label")),  # order
    ],
)
def test_usual_columns_are_found(features, expected):
    assert find_columns(Features(features)) == Columns(*expected)


def test_given_names_win():
    features = Features({"img": Image(), "fine_label": CLASSES, "coarse_label": CLASSES})
    assert find_columns(features, label="coarse_label") == Columns("img", "coarse_label")


@pytest.mark.parametrize("arguments", [{"label": "species"}, {"image": "photo"}, {}])
def test_a_missing_column_lists_those_present(arguments):
    features = Features({"img": Image(), "class_a": CLASSES, "class_b": CLASSES})
    with pytest.raises(DataRefused, match="columns present: img, class_a, class_b"):
        find_columns(features, **arguments)
