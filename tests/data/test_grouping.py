"""Rows with the same value are one unit; what leaves that open is refused by the index of a row, not its value."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch.utils.data import Subset

from hf_dpvision.data import Columns, image_examples
from hf_dpvision.data.examples import OneByOne
from hf_dpvision.data.grouping import group_rows, refuse_repeated_ids, without_columns
from hf_dpvision.data.units import NO_ROW, WEIGHTS, ReadableUnits, UnitByUnit
from hf_dpvision.errors import DataRefused


def truth(values: list) -> list[list[int]]:
    """Rows of each value, values in the order in which they first occur."""
    found: dict = {}
    for row, value in enumerate(values):
        found.setdefault(value, []).append(row)
    return list(found.values())


@pytest.mark.parametrize("kind", ["int8", "int64", "string", "large_string"])
def test_rows_are_grouped_as_by_a_loop(kind):
    numbers = np.random.default_rng(0).integers(0, 100, 2000).tolist()
    values = numbers if "int" in kind else [f"patient {number}" for number in numbers]
    units = group_rows(Dataset.from_dict({"who": values}, features=Features({"who": Value(kind)})), "who")
    assert [units.rows_of(unit).tolist() for unit in range(len(units))] == truth(values)


def test_a_shuffled_selection_is_grouped_as_it_is_read():
    rows = Dataset.from_dict({"who": [f"p{i % 7}" for i in range(100)]}).shuffle(seed=1).select(range(40))
    units = group_rows(rows, "who")
    assert [units.rows_of(unit).tolist() for unit in range(len(units))] == truth(rows["who"][:])


def test_several_files_are_grouped_together(tmp_path):
    for name in ("a", "b"):
        Dataset.from_dict({"who": [name, "both", name]}).to_parquet(tmp_path / f"{name}.parquet")
    rows = Dataset.from_parquet([str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")])
    units = group_rows(rows, "who")
    assert [units.rows_of(unit).tolist() for unit in range(len(units))] == [[0, 2], [1, 4], [3, 5]]


def test_a_million_rows_are_grouped_without_a_loop():
    units = group_rows(Dataset.from_dict({"who": np.arange(1_000_000) % 300_000}), "who")
    assert len(units) == 300_000 and units.rows_of(5).tolist() == [5, 300_005, 600_005, 900_005]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["Ann", None, "Bob"], "row 1 is missing protected"),
        ([1, 2, None], "row 2 is missing protected"),
        ([1.0, 2.0], "type double whole numbers and text Cast"),
        ([[1], [2]], "whole numbers and text Cast"),
        ([None, None], "row 0 is missing"),
    ],
)
def test_values_that_leave_the_unit_open_are_refused(values, words):
    with pytest.raises(DataRefused) as refusal:
        group_rows(Dataset.from_dict({"who": values}), "who")
    assert "Ann" not in str(refusal.value) and "Bob" not in str(refusal.value)
    for word in ("privacy_unit_column='who'", *words.split()):
        assert word in str(refusal.value)


def test_the_first_repeated_id_is_named_by_its_rows():
    rows = Dataset.from_dict({"scan": ["x-ray 1", "x-ray 2", "x-ray 3", "x-ray 2", "x-ray 1", "x-ray 2"]})
    with pytest.raises(DataRefused, match="rows 1 and 3 have the same value, and 3 rows in all") as refusal:
        refuse_repeated_ids(rows, "scan")
    assert "x-ray" not in str(refusal.value) and "privacy_unit_column='scan'" in str(refusal.value)


def test_ids_that_differ_pass_and_a_missing_one_does_not():
    refuse_repeated_ids(Dataset.from_dict({"scan": list(range(50))}), "scan")
    with pytest.raises(DataRefused, match="id_column='scan': the value of row 1 is missing"):
        refuse_repeated_ids(Dataset.from_dict({"scan": [1, None, 1]}), "scan")


def test_a_column_or_data_set_that_cannot_be_grouped_is_refused_with_a_way_out():
    rows = Dataset.from_dict({"who": [1, 2]})
    for dataset, words in (
        (rows, "'person' is not a column of the data set; columns present: who"),
        (Subset(rows, [0]), "has no columns.*image_examples"),
        ([{"person": 1}], "has no columns"),
    ):
        with pytest.raises(DataRefused, match=words):
            group_rows(dataset, "person")


def pictured(values: list) -> Dataset:
    features = Features({"image": Image(), "label": Value("int64"), "who": Value("string")})
    pictures = [PILImage.new("L", (4, 4), row) for row in range(len(values))]
    columns = {"image": pictures, "label": [row % 2 for row in range(len(values))], "who": values}
    return Dataset.from_dict(columns, features=features)


def tensor_of(picture: PILImage.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


def test_image_examples_keep_the_column_and_do_not_read_it():
    rows = pictured(["a", "b", "a"])
    examples = image_examples(rows, Columns("image", "label"), tensor_of, keep=["who"])
    assert [group_rows(examples, "who").rows_of(unit).tolist() for unit in (0, 1)] == [[0, 2], [1]]
    assert set(examples[0]) == {"pixel_values", "labels"} and examples.rows.column_names == ["image", "label"]
    assert len(group_rows(pickle.loads(pickle.dumps(examples)), "who")) == 2
    with pytest.raises(DataRefused, match=r"did not keep that column.*keep=\['who'\]"):
        group_rows(image_examples(rows, Columns("image", "label"), tensor_of), "who")
    with pytest.raises(DataRefused, match="'person' is not a column of part 'train'; columns present: image"):
        image_examples(rows, Columns("image", "label"), tensor_of, keep=["person"])


def test_columns_are_left_out_of_what_is_read_unless_a_transform_decides():
    rows = pictured(["a", "b"])
    assert without_columns(rows, ["who", "absent"]).column_names == ["image", "label"]
    transformed = rows.with_transform(lambda batch: batch)
    assert without_columns(transformed, ["who"]) is transformed


def numbered(count: int, broken: tuple[int, ...] = ()) -> list:
    class Rows(list):
        def __getitem__(self, row):
            if row in broken:
                raise ValueError("broken")
            return {"x": torch.tensor(float(row)), "labels": row}

    return Rows(range(count))


def collate(rows: list[dict]) -> dict:
    return {"x": torch.stack([row["x"] for row in rows])}


def test_a_unit_is_filled_up_with_its_own_rows_at_weight_zero():
    units = UnitByUnit(OneByOne(numbered(10, broken=(4, 6, 7))))
    drawn = [[1, 2, 3], [5, NO_ROW, NO_ROW], [4, 8, NO_ROW], [6, 7, NO_ROW]]
    batch = ReadableUnits(collate)([units[rows] for rows in drawn])
    assert batch["x"].tolist() == [1, 2, 3, 5, 5, 5, 8, 8, 8]
    assert batch[WEIGHTS].tolist() == [1, 1, 1, 1, 0, 0, 0, 1, 0]


def test_all_views_of_an_example_have_its_weight():
    units = UnitByUnit(OneByOne(numbered(10, broken=(4,)), views=2))
    batch = ReadableUnits(collate)([units[[1, 4]]])
    assert batch["x"].tolist() == [1, 1, 1, 1] and batch[WEIGHTS].tolist() == [1, 1, 0, 0]


def test_a_microbatch_without_a_readable_unit_is_empty():
    units = UnitByUnit(OneByOne(numbered(10, broken=(4,))))
    assert ReadableUnits(collate)([units[[4, NO_ROW]]]) == {}
