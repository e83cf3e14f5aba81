"""Bad data ends in one clear refusal before the first step."""

from __future__ import annotations

import io

import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from hf_dpvision.data import Columns, check_images, check_labels, declared_classes
from hf_dpvision.data.validation import encode_labels
from hf_dpvision.errors import DataRefused


NAMES = ["cat", "dog", "owl"]


def _labels(values: list, feature: object) -> Dataset:
    return Dataset.from_dict({"label": values}, features=Features({"label": feature}))


@pytest.mark.parametrize(
    ("values", "feature", "message"),
    [
        ([], Value("int64"), "part 'train' of the data set is empty"),
        ([0, 1, None], Value("int64"), "example 2 .* None, is missing"),
        ([0, -1, 1], Value("int64"), "example 1 .* -1, is negative"),
        ([0, 1, 2, 3], Value("int64"), "example 3 .* 3, is outside the 3 classes 0..2"),
        ([0.0, 1.0], Value("float32"), "are float: a class is a whole number"),
        ([[0, 1]], List(Value("int64")), "one class per image is expected"),
        (["cat"], Value("string"), "whole numbers are expected"),
    ],
)
def test_bad_labels_are_refused(values, feature, message):
    with pytest.raises(DataRefused, match=message):
        check_labels(_labels(values, feature), "label", NAMES)


def test_good_labels_pass_also_after_shuffling_and_selecting():
    check_labels(_labels([0, 1, 2, 2], Value("int8")), "label", NAMES)
    check_labels(_labels([True, False], Value("bool")), "label", NAMES[:2])
    check_labels(_labels([0, 9, 1], Value("int64")).select([0, 2]).shuffle(seed=0), "label", NAMES)


def test_the_index_named_is_that_of_the_rows_in_use():
    rows = _labels([0, 0, 9, 1], Value("int64")).select([3, 2])
    with pytest.raises(DataRefused, match="example 1 of part 'test'"):
        check_labels(rows, "label", NAMES, "test")


def test_class_names_are_declared_never_inferred():
    assert declared_classes(_labels([0], ClassLabel(names=NAMES)), "label") == NAMES
    assert declared_classes(_labels(["owl"], Value("string")), "label", NAMES) == NAMES
    for feature, value in ((Value("string"), "owl"), (Value("int64"), 0)):
        with pytest.raises(DataRefused, match="declares no class names"):
            declared_classes(_labels([value], feature), "label")


def test_declared_names_must_be_distinct_and_as_many_as_the_classes():
    with pytest.raises(DataRefused, match="repeats a name"):
        declared_classes(_labels([0], Value("int64")), "label", ["cat", "cat"])
    with pytest.raises(DataRefused, match="2 names, column 'label' declares 3"):
        declared_classes(_labels([0], ClassLabel(names=NAMES)), "label", ["cat", "dog"])


def test_text_labels_are_looked_up_in_the_declared_names():
    encoded = encode_labels(_labels(["owl", "cat"], Value("string")), "label", NAMES)
    assert encoded["label"][:] == [2, 0]
    with pytest.raises(DataRefused, match="example 1 .* 'emu', is not one of the declared classes"):
        encode_labels(_labels(["owl", "emu"], Value("string")), "label", NAMES)
    with pytest.raises(DataRefused, match="example 1 .* is missing"):
        check_labels(encode_labels(_labels(["owl", None], Value("string")), "label", NAMES), "label", NAMES)


def _pictures(broken: int | None, count: int = 5) -> Dataset:
    buffer = io.BytesIO()
    PILImage.new("L", (4, 4)).save(buffer, format="PNG")
    good = {"bytes": buffer.getvalue(), "path": None}
    bad = {"bytes": buffer.getvalue()[:40], "path": None}
    column = [bad if index == broken else good for index in range(count)]
    return Dataset.from_dict({"image": column}, features=Features({"image": Image()}))


def test_an_unreadable_image_is_named_before_training():
    check_images(_pictures(None), Columns("image", "label"))
    with pytest.raises(DataRefused, match="example 3 of part 'train'"):
        check_images(_pictures(3), Columns("image", "label"))


def test_the_check_names_every_broken_image():
    rows = Dataset.from_dict({"image": [b"1", None, b"3"], "label": [0, 1, 2]})
    with pytest.raises(DataRefused, match="example 0 of part 'train' .*So are 2 others: examples 1, 2"):
        check_images(rows, Columns("image", "label"))


def test_a_long_check_shows_its_progress(monkeypatch, capsys):
    monkeypatch.setattr("hf_dpvision.data.validation.LONG_PASS", 3)
    check_images(_pictures(None), Columns("image", "label"))
    assert "checking the images of 'train'" in capsys.readouterr().err
    check_images(_pictures(None), Columns("image", "label"), quiet=True)
    assert capsys.readouterr().err == ""


def test_rows_found_whole_are_not_decoded_again_and_broken_ones_are(monkeypatch, tmp_path):
    whole, broken = _pictures(None), _pictures(3)
    check_images(whole, Columns("image", "label"), remember=tmp_path / "notes")
    for _ in range(2):
        with pytest.raises(DataRefused, match="example 3"):
            check_images(broken, Columns("image", "label"), remember=tmp_path / "notes")
    decoded = []
    monkeypatch.setattr("hf_dpvision.data.validation.read_image", lambda value, index, part: decoded.append(index))
    check_images(whole, Columns("image", "label"), remember=tmp_path / "notes")
    assert not decoded
    check_images(whole.select([1, 0, 2]), Columns("image", "label"), remember=tmp_path / "notes")
    check_images(whole, Columns("image", "label"))
    assert decoded == [0, 1, 2, *range(len(whole))]
